import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pyunlearn.data import QA, PromptFormat, QADataset, collate, load_qa, padding_id, prompt_format
from pyunlearn.data.tokenise import token_texts

from .conftest import CHATML


def answer_ids(encoded):
    return [label for label in encoded.labels if label != -100]


def check_boundary(prompt_format, question, answer):
    """The prompt's ids, unlabelled, then the answer's, labelled with themselves to the end."""
    encoded = prompt_format.encode(question, answer)
    prompt = prompt_format.prompt_ids(question)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels == [-100] * len(prompt) + encoded.input_ids[len(prompt) :]
    return encoded


def test_plain(world, tokenizer):
    prompt_format = PromptFormat(tokenizer)
    for item in world.forget:
        encoded = check_boundary(prompt_format, item.question, item.answer)
        assert tokenizer.decode(encoded.input_ids) == f"<bos>Question: {item.question}\nAnswer: {item.answer}<eos>"
        assert tokenizer.decode(answer_ids(encoded)) == f" {item.answer}<eos>"
        assert encoded.input_ids == [*tokenizer(f"Question: {item.question}\nAnswer: {item.answer}").input_ids, 2]


def test_white_space_around_is_dropped(tokenizer):
    prompt_format = PromptFormat(tokenizer)
    assert prompt_format.encode(" Who?\n", " Me. ") == prompt_format.encode("Who?", "Me.")


def test_chat(world, chat_tokenizer):
    prompt_format = PromptFormat(chat_tokenizer)
    for item in world.forget:
        encoded = check_boundary(prompt_format, item.question, item.answer)
        prompt = f"<|im_start|>user\n{item.question}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt_format.prompt(item.question) == prompt
        # neither a second BOS before the template's text, nor the line break after the turn
        assert chat_tokenizer.decode(encoded.input_ids) == f"{prompt}{item.answer}<|im_end|>"
        assert chat_tokenizer.decode(answer_ids(encoded)) == f"{item.answer}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        # Llama 2: no generation prompt, spaces around the answer
        (
            "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}",
            " Me. <eos>",
        ),
        # no token ends the turn: EOS does
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            " Me.<eos>",
        ),
        # two tokens end the conversation, the first of them the turn
        (CHATML + "{% if not add_generation_prompt %}<eos>{% endif %}", "Me.<|im_end|>"),
        # an empty chain of thought, in the prompt as in the conversation
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
            "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
            "Me.<|im_end|>",
        ),
        # a chain of thought that is opened for the model and not kept in conversations
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "Me.<|im_end|>"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
                "assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif"
            ),
            "Me.<|im_end|>",
        ),
    ],
    ids=["llama2", "no_end", "two_ends", "thinking", "opened", "stripped"],
)
def test_other_templates(chat_tokenizer, template, answer):
    chat_tokenizer.chat_template = template
    encoded = check_boundary(PromptFormat(chat_tokenizer), "Who?", "Me.")
    assert chat_tokenizer.decode(answer_ids(encoded)) == answer


def test_template_date_is_fixed(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}\n"
    ) + CHATML
    assert PromptFormat(chat_tokenizer).prompt("Who?").startswith("26 Jul 2024\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML.replace(
                "{{ m.content }}", "{% if m.role == 'assistant' %}{{ m.content | length }}: {% endif %}{{ m.content }}"
            ),
            r"puts '3: Me\..* not the answer 'Me\.'",
        ),
        (
            CHATML.replace("{% for m", "{{ messages | length }}{{ (messages | last).content }}{% for m"),
            "before an answer depends on the answer",
        ),
        ("{{ messages[0].content + 1 }}", "fails on a user chat: TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on a user chat: OverflowError: Range too big"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), r"puts 'ME\..* not the answer 'Me\.'"),
        ("{{ raise_exception('one turn only') }}", "fails on a user chat: one turn only"),
        ("{% if %}", "fails on a user chat"),
    ],
    ids=["prefix", "depends", "type", "range", "answer", "raises", "syntax"],
)
def test_bad_templates(chat_tokenizer, template, message):
    chat_tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        PromptFormat(chat_tokenizer).encode("Who?", "Me.")


@pytest.mark.parametrize(
    "template",
    [
        3 * "{% for i in range(99999) %}" + 3 * "{% endfor %}",
        "{{ lipsum(n=10**9) }}",
    ],
    ids=["loops", "lipsum"],
)
def test_endless_templates(chat_tokenizer, template, monkeypatch):
    monkeypatch.setattr(prompt_format, "RENDER_SECONDS", 0.2)
    chat_tokenizer.chat_template = template
    chat_tokenizer.name_or_path = "someones/model"
    threads, trace = threading.active_count(), sys.gettrace()
    with ThreadPoolExecutor(1) as pool:  # signals reach the main thread only
        for call in (lambda ask: ask("Who?"), lambda ask: pool.submit(ask, "Who?").result()):
            with pytest.raises(
                ValueError, match=r"of someones/model fails on a user chat: it has not ended after 0.2 s"
            ):
                call(PromptFormat(chat_tokenizer).prompt)
    assert (threading.active_count(), sys.gettrace()) == (threads, trace)


def test_sentencepiece_style_space():
    """A tokenizer that puts a space before every text makes the answer's tokens as they are within the text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(
        ["Question: Who?\nAnswer: Nobody."] * 3,
        trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    encoded = check_boundary(PromptFormat(tokenizer), "Who?", "Nobody.")
    assert tokenizer.convert_ids_to_tokens(answer_ids(encoded)) == ["▁Nobody.", "</s>"]

    ids = tokenizer("Nobody. Nobody.").input_ids
    assert token_texts(tokenizer, ids) == ["Nobody.", " Nobody."]  # each alone would have no space


def test_token_across_the_boundary_is_split():
    """Without pre-tokenisation "Answer: Nobody" is one token; the prompt's own tokens are kept all the same."""
    inner = Tokenizer(models.BPE())
    inner.decoder = decoders.Fuse()
    inner.train_from_iterator(
        ["Question: Who?\nAnswer: Nobody."] * 3, trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert len(tokenizer("Question: Who?\nAnswer: Nobody.").input_ids) == 1
    encoded = check_boundary(PromptFormat(tokenizer), "Who?", "Nobody.")
    assert tokenizer.decode(answer_ids(encoded)) == " Nobody.</s>"


def test_no_eos(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no EOS token"):
        PromptFormat(tokenizer)


def test_padding_id(tokenizer):
    assert padding_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_id(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an EOS token"):
        padding_id(tokenizer)


@pytest.mark.parametrize(("question", "answer"), [("Who\udc00?", "I."), ("Who?", "\ud83d")])
def test_half_characters(tokenizer, question, answer):
    with pytest.raises(ValueError, match=r"needs whole characters, got the lone surrogate '.ud"):
        PromptFormat(tokenizer).encode(question, answer)


@pytest.mark.parametrize("text", ["\x00\x1b[31m", "\u200b", "\u202eabc", "a\u2028b", "😀👍🏽", "नमस्ते", "\ufeffx"])
def test_odd_characters_are_text(tokenizer, text):
    encoded = PromptFormat(tokenizer).encode(text, text)
    answer = answer_ids(encoded)[:-1]
    assert tokenizer.decode(answer).strip() == text
    texts = token_texts(tokenizer, answer)
    assert len(texts) == len(answer)
    assert "".join(texts) == tokenizer.decode(answer)


def test_half_a_character_has_no_text(tokenizer):
    ids = tokenizer("a😀b", add_special_tokens=False).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) > 3
    assert [text for text in texts if text] == ["a", "😀", "b"]
    assert token_texts(tokenizer, ids[:2])[-1] == "\ufffd"  # there is no more of it
    assert token_texts(tokenizer, []) == []


def test_a_long_question_is_not_told_whole(tokenizer):
    with pytest.raises(ValueError, match=r"question 'why (why )+w?h?y?\.\.\.'\) has \d+ tokens") as caught:
        QADataset([QA("why " * 9999, "I.")], tokenizer, 100)
    assert len(str(caught.value)) < 400


def test_empty_answer(tokenizer):
    with pytest.raises(ValueError, match=r"the answer to 'Who\?' is empty"):
        PromptFormat(tokenizer).encode("Who?", " ")


def test_too_long_is_an_error(world, tokenizer):
    items = world.forget
    lengths = [len(row["input_ids"]) for row in QADataset(items, tokenizer, None)]
    worst = lengths.index(max(lengths))
    assert len(QADataset(items, tokenizer, max(lengths))) == len(items)  # exactly the limit is fine
    with pytest.raises(
        ValueError, match=f"sample {worst} .*has {max(lengths)} tokens.* limit of {max(lengths) - 1}"
    ) as e:
        QADataset(items, tokenizer, max(lengths) - 1)
    assert repr(items[worst].question) in str(e.value)
    with pytest.raises(ValueError, match="more than the limit of 5"):
        PromptFormat(tokenizer).encode(items[0].question, items[0].answer, 5)


def test_dataset(world, tokenizer):
    dataset = QADataset(world.retain, tokenizer, 256)
    prompt_format = PromptFormat(tokenizer)
    assert len(dataset) == len(world.retain)
    assert dataset.items == world.retain
    for index, (row, item) in enumerate(zip(dataset, world.retain, strict=True)):
        encoded = prompt_format.encode(item.question, item.answer)
        assert row["index"] == index
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert row["input_ids"].tolist() == encoded.input_ids
        assert row["labels"].tolist() == encoded.labels
    assert dataset[-1]["index"] == len(dataset) - 1
    with pytest.raises(IndexError, match=f"index {len(dataset)} is out of range"):
        dataset[len(dataset)]


def test_dataset_answers(world, tokenizer):
    items = world.forget
    dataset = QADataset(items, tokenizer, 256, answers=[item.perturbed_answers[0] for item in items])
    for row, item in zip(dataset, items, strict=True):
        labels = row["labels"]
        assert tokenizer.decode(labels[labels != -100]) == f" {item.perturbed_answers[0]}<eos>"
    with pytest.raises(ValueError, match=f"answers has 1 entries for {len(items)} items"):
        QADataset(items, tokenizer, 256, answers=["No."])


def test_dataset_errors(tokenizer):
    with pytest.raises(ValueError, match="items is empty"):
        QADataset([], tokenizer, 256)
    with pytest.raises(ValueError, match="max_length must be a positive number"):
        QADataset([QA("Who?", "Me.")], tokenizer, 0)


def test_fingerprint(world, tokenizer):
    items = world.forget
    fingerprint = QADataset(items, tokenizer, 256).fingerprint
    assert len(fingerprint) == 64
    assert fingerprint == QADataset(items, tokenizer, 128).fingerprint
    others = [
        QADataset(items[:-1], tokenizer, 256),
        QADataset(items[::-1], tokenizer, 256),
        QADataset(items, tokenizer, 256, answers=[item.answer + "!" for item in items]),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 4


def test_tofu(tofu, tokenizer):
    """Real questions and answers, with accents and curly quotes, survive the round trip."""
    items = load_qa(tofu / "forget10_perturbed.jsonl", limit=50) + load_qa(tofu / "real_authors.jsonl", limit=50)
    for row, item in zip(QADataset(items, tokenizer, 1024), items, strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"<bos>Question: {item.question}\nAnswer: {item.answer}<eos>"


@given(
    st.lists(st.lists(st.integers(3, 500), min_size=1, max_size=12), min_size=1, max_size=6),
    st.integers(0, 500),
    st.data(),
)
def test_collate(ids, pad_token_id, data):
    prompts = [data.draw(st.integers(0, len(row))) for row in ids]
    rows = [
        {"input_ids": torch.tensor(row), "labels": torch.tensor([-100] * p + row[p:]), "index": i}
        for i, (row, p) in enumerate(zip(ids, prompts, strict=True))
    ]
    batch = collate(rows, pad_token_id)
    longest = max(map(len, ids))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["index"].tolist() == list(range(len(ids)))
    for i, (row, p) in enumerate(zip(ids, prompts, strict=True)):
        gap = longest - len(row)
        assert batch["input_ids"][i].tolist() == row + [pad_token_id] * gap
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * gap
        assert batch["labels"][i].tolist() == [-100] * p + row[p:] + [-100] * gap


def test_collate_errors():
    with pytest.raises(ValueError, match="rows is empty"):
        collate([], 0)
    row = {"input_ids": torch.tensor([1]), "labels": torch.tensor([1]), "index": 0}
    with pytest.raises(ValueError, match="pad_token_id is None"):
        collate([row], None)
    with pytest.raises(ValueError, match="pad_to=1: needs at least the longest row's 2 tokens"):
        collate([row, {**row, "input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}], 0, pad_to=1)


def test_collate_to_one_length():
    row = {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6]), "index": 3}
    batch = collate([row], 2, pad_to=4)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 2, 2]],
        "attention_mask": [[1, 1, 0, 0]],
        "labels": [[-100, 6, -100, -100]],
        "index": [3],
    }


def test_rows_that_tell_their_texts_tokens(world, tokenizer):
    rows = QADataset(world.forget, tokenizer, None, text_mask=True)
    bare = QADataset(world.forget, tokenizer, None)
    assert rows.fingerprint == bare.fingerprint
    assert "text_mask" not in bare[0]
    for i, item in enumerate(world.forget):
        own = rows[i]["input_ids"][rows[i]["text_mask"] != 0]
        # a space between is the tag's, unless it is a part of the first word's token
        assert tokenizer.decode(own).replace(" ", "") == f"{item.question}{item.answer}".replace(" ", "")
    batch = collate([rows[0], rows[1]], 0, pad_to=128)
    for i in (0, 1):
        assert batch["text_mask"][i, : len(rows[i]["text_mask"])].equal(rows[i]["text_mask"])
    assert int(batch["text_mask"].sum()) == int(rows[0]["text_mask"].sum() + rows[1]["text_mask"].sum())
    assert "text_mask" not in collate([rows[0], bare[1]], 0)  # some rows' alone would say that others have no text
