"""Greedy generation against argmax token by token, and ROUGE-L recall by hand."""

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import GPT2Config, GPT2LMHeadModel

from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import greedy_generate, rouge_l_recall
from pyunlearn.metrics.generation import before_stops, common_length, first_tokens, greedy_tokens

from ..model.zoo import kinds, make

TEXTS = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
SUPPRESSED = list(range(8, 300))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def llama(tokenizer):
    return tiny_llama(tokenizer, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=48)


def gpt2(tokenizer):
    """Absolute positions: wrong ones under left padding would show."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=48,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def argmax_tokens(model, prompt, max_new_tokens, end=None):
    ids = list(prompt)
    model.eval()
    while len(ids) < len(prompt) + max_new_tokens and (len(ids) == len(prompt) or ids[-1] != end):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def argmax_by_hand(model, tokenizer, prompt, max_new_tokens):
    written = argmax_tokens(model, prompt, max_new_tokens, tokenizer.eos_token_id)
    return tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_batches_equal_argmax_one_by_one(tokenizer, build):
    model = build(tokenizer)
    with torch.no_grad():  # peaked logits and varied text
        model.get_input_embeddings().weight.mul_(30)
    prompts = [tokenizer(text)["input_ids"] for text in ("the quick", "pack my box with", "dog", "fox jumps over")]
    model.train()
    texts = greedy_generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=3, progress=False)
    assert all(module.training for module in model.modules())
    assert texts == [argmax_by_hand(model, tokenizer, prompt, 12) for prompt in prompts]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("name", "dtype", "attention"), kinds((torch.float32, None), (torch.float64, "eager")), ids=str
)
def test_every_architecture_writes_in_a_batch_as_alone(tokenizer, name, dtype, attention):
    model = make(name, dtype, attention)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]

    def tokens(prompts):
        return greedy_tokens(model, tokenizer, prompts, max_new_tokens=5, batch_size=3, progress=False)

    alone = [argmax_tokens(model, prompt, 5, tokenizer.eos_token_id) for prompt in prompts]
    assert tokens(prompts) == alone
    assert [tokens([prompt])[0] for prompt in prompts] == alone


SETTINGS = {
    "do_sample": True, "temperature": 9.0, "num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1, "encoder_repetition_penalty": 9.0, "encoder_no_repeat_ngram_size": 1, "min_length": 30,
    "min_new_tokens": 12, "suppress_tokens": SUPPRESSED, "begin_suppress_tokens": SUPPRESSED, "forced_bos_token_id": 7,
    "forced_eos_token_id": 7, "bad_words_ids": [[token] for token in SUPPRESSED], "max_time": 0.0, "max_length": 3,
    "sequence_bias": [[[7], 99.0]], "exponential_decay_length_penalty": (1, 9.0), "guidance_scale": 3.0,
    "prompt_lookup_num_tokens": 2, "watermarking_config": {"bias": 99.0}, "renormalize_logits": True,
    "stop_strings": ["e"], "token_healing": True, "use_cache": False, "cache_implementation": "static",
    "output_scores": True, "return_dict_in_generate": True, "penalty_alpha": 0.5, "dola_layers": "low",
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_model_applies(tokenizer, name):
    model = gpt2(tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(30)
    prompt = tokenizer("the quick")["input_ids"]
    expected = argmax_tokens(model, prompt, 6, tokenizer.eos_token_id)
    assert expected[0] in SUPPRESSED
    setattr(model.generation_config, name, SETTINGS[name])
    own = model.generation_config
    assert greedy_tokens(model, tokenizer, [prompt], max_new_tokens=6, progress=False) == [expected]
    assert model.generation_config is own


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_router_logits_are_for_training(tokenizer, name):
    """In a padded batch too, whose mask is longer than the step that is routed."""
    model, prompts = make(name), [[5, 6, 7], [8, 9]]
    expected = [argmax_tokens(model, prompt, 4) for prompt in prompts]
    model.config.output_router_logits = True
    assert greedy_tokens(model, tokenizer, prompts, max_new_tokens=4, progress=False) == expected
    assert model.config.output_router_logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_their_prompts(tokenizer, value):
    model = make("gpt2")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.transformer.wte.weight[50] = value
    prompts = [[5, 6], [7, 50], [8, 9], [50]]
    with pytest.raises(ValueError, match=r"its logits after prompts \[1, 3\] are NaN or infinite"):
        greedy_tokens(model, tokenizer, prompts, max_new_tokens=2, progress=False)


def test_adapters_write_too(tokenizer):
    model = peft.get_peft_model(gpt2(tokenizer), peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    expected = [argmax_tokens(model, prompt, 5, tokenizer.eos_token_id) for prompt in ([5, 6, 7], [8, 9])]
    model.base_model.model.generation_config.suppress_tokens = SUPPRESSED
    assert greedy_tokens(model, tokenizer, [[5, 6, 7], [8, 9]], max_new_tokens=5, progress=False) == expected


def test_a_text_ends_with_the_context_whatever_it_is_batched_with(tokenizer):
    model = gpt2(tokenizer)
    prompts = [list(range(3, 43)), [5, 6, 7]]  # of 48 positions
    texts = greedy_tokens(model, tokenizer, prompts, max_new_tokens=20, progress=False)
    assert texts == [argmax_tokens(model, prompts[0], 8), argmax_tokens(model, prompts[1], 20)]


def test_it_ends_at_any_end_token_of_model_and_tokenizer(tokenizer):
    model = llama(tokenizer)
    prompt = tokenizer("the quick")["input_ids"]
    written = []
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            written.append(ids[-1])
    model.generation_config.eos_token_id = [written[0], 5]
    text = greedy_generate(model, tokenizer, [prompt], max_new_tokens=3, progress=False)[0]
    assert text == tokenizer.decode(written[:1]).strip()


def test_the_context_bounds_the_continuation(tokenizer):
    model = gpt2(tokenizer)  # beyond its 48 positions it would fail
    prompt = (tokenizer(" ".join(TEXTS))["input_ids"] * 9)[:44]
    with torch.no_grad():
        expected = argmax_by_hand(model, tokenizer, prompt, 4)
    assert greedy_generate(model, tokenizer, [prompt], max_new_tokens=100, progress=False) == [expected]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 5], []], {}, r"prompts\[1\]: has 0 tokens"),
        ([[5] * 48], {}, r"prompts\[0\]: has 48 tokens.*context, 48"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments(tokenizer, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        greedy_generate(llama(tokenizer), tokenizer, prompts, **options)


@pytest.mark.parametrize(
    ("generated", "answer", "recall"),
    [
        ("Paris", "Paris", 1.0),
        ("The tower stands in Paris, France.", "Paris", 1.0),  # recall does not punish length
        ("a b c d", "a x b y c", 3 / 5),  # longest common subsequence a b c
        ("c b a", "a b c", 1 / 3),  # order counts
        ("He was writing books", "he writes book", 1.0),  # stems: he, write, book
        ("", "something", 0.0),
        ("nothing in common", "Hsiao Yun-Hwa", 0.0),
        ("Yun Hwa", "Hsiao Yun-Hwa", 2 / 3),  # a hyphen parts words
    ],
)
def test_rouge_l_recall(generated, answer, recall):
    assert rouge_l_recall(generated, answer) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("generated", "answer", "recall"),
    [
        ("東京は日本の首都です", "東京は日本の首都です", 1.0),
        ("首都は東京", "東京", 1.0),
        ("京都", "東京", 1 / 2),
        ("Столица — Париж.", "Париж", 1.0),
        ("القاهرة", "القاهرة عاصمة مصر", 1 / 3),
        ("กรุงเทพ", "กรุงเทพ", 1.0),
        ("दिल्ली", "नई दिल्ली", 1 / 2),
        ("Its capital", "Its capital is 東京", 2 / 5),  # not 1: words of one script do not stand for the others
        ("He was writing 東京", "he writes 東京", 1.0),  # Latin words are stemmed there too
        ("👍", "👍", 1.0),
        ("", "東京", 0.0),
        ("Tokyo", "東京", 0.0),
        ("1945", "1945", 1.0),
        ("١٩٤٥", "١٩٤٥", 1.0),
        ("a\x00b\ud800", "a\x00b\ud800", 1.0),
    ],
)
def test_rouge_l_recall_of_other_scripts(generated, answer, recall):
    assert rouge_l_recall(generated, answer) == pytest.approx(recall)


@given(answer=st.text(min_size=1).filter(lambda text: text.strip() != ""))
def test_a_copy_recalls_everything(answer):
    assert rouge_l_recall(answer, answer) == 1.0


def test_a_text_ends_before_its_first_stop():
    stops = ("\n\n", "\nQuestion", "Question:")
    assert before_stops("A poet.\nQuestion: who?\n\nQuestion: where?", stops) == "A poet."
    assert before_stops("\n\nA poet.", stops) == ""
    assert before_stops("A question", stops) == "A question"


def test_the_first_tokens_of_a_text(tokenizer):
    ids = tokenizer(TEXTS[0])["input_ids"]  # BOS is one of them
    assert first_tokens(TEXTS[0], tokenizer, 4) == tokenizer.decode(ids[1:4])
    assert first_tokens(TEXTS[0], None, None) == TEXTS[0]
    for bad, limit in ((tokenizer, 0), (None, 3)):
        with pytest.raises(ValueError, match=f"longest={limit}: needs a number of tokens >= 1, and a tokenizer"):
            first_tokens(TEXTS[0], bad, limit)


LATIN = st.text(st.sampled_from("abcDEF 019é,-'\n"), max_size=40)


@given(generated=LATIN, answer=LATIN.filter(lambda text: any(c.isascii() and c.isalnum() for c in text)))
def test_of_latin_text_it_is_the_packages(generated, answer):
    theirs = RougeScorer(["rougeL"], use_stemmer=True).score(answer, generated)["rougeL"].recall
    assert rouge_l_recall(generated, answer) == theirs


def test_an_answer_without_a_word_is_an_error():
    with pytest.raises(ValueError, match="answer=' ': needs something other than white space"):
        rouge_l_recall("anything", " ")


@given(a=st.lists(st.sampled_from("abc")), b=st.lists(st.sampled_from("abcd")))
def test_common_length_is_the_textbooks(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_length(a, b) == table[-1][-1]


def test_long_texts_take_no_table():
    words = [f"w{i % 977}" for i in range(30_000)]
    assert rouge_l_recall(" ".join(words), " ".join(words[::2])) == 1.0
