"""A model of two models' logits: forward, generation, statistics and files against the formula on both."""

import copy
import json

import pytest
import torch

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import evaluate, greedy_tokens
from pyunlearn.metrics.reading import Kept
from pyunlearn.model import forward
from pyunlearn.model.causal_lm import CausalLM, UnknownHeadError
from pyunlearn.model.combined import combine, make_combined, parts_of
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.forward import supervised_stats
from pyunlearn.model.load import load_model
from pyunlearn.mrd import mrd
from pyunlearn.ops import token_stats
from pyunlearn.training.folder import write_model

from .zoo import kinds, make

TEXTS = ["who wrote the book of the sea", "a man of the north wrote it", "where is the town", "by the sea"]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BATCH = {"input_ids": torch.arange(5, 25).view(2, 10), "labels": torch.arange(5, 25).view(2, 10)}
BATCH |= {"attention_mask": torch.ones_like(BATCH["labels"])}


def two(seeds=(0, 1), factor=5.0):
    models = [tiny_llama(TOKENIZER, seed=seed, **SIZES).eval() for seed in seeds]
    with torch.no_grad():
        for model in models:
            model.get_input_embeddings().weight.mul_(factor)
    return models


@torch.no_grad()
def straight(base, reinforced, strength, ids):
    """The formula, in float64."""
    one, other = (copy.deepcopy(model).double()(input_ids=ids).logits for model in (base, reinforced))
    return one - strength * torch.clamp(other - one, min=0)


@pytest.mark.parametrize("strength", [0.0, 0.5, 4.0, 256.0])
def test_logits(strength):
    base, reinforced = two()
    model, ids = make_combined(base, reinforced, strength), BATCH["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        if strength == 0:
            assert torch.equal(logits, base(input_ids=ids).logits)
    torch.testing.assert_close(
        logits.double(), straight(base, reinforced, strength, ids), rtol=1e-4, atol=1e-5 * (1 + strength)
    )
    loss = model(input_ids=ids, labels=ids).loss
    v = straight(base, reinforced, strength, ids)[:, :-1].flatten(0, 1)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(v, ids[:, 1:].flatten()).item(), rel=1e-4)


def test_half_precision_is_combined_in_float32():
    one, other = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0078125, 1.0]).bfloat16()
    assert combine(one, other, 256.0).tolist() == [1.0 - 256 * 0.0078125, 2.0]
    assert combine(one.double(), other.double(), 1.0).dtype == torch.float64


def test_it_writes_as_the_formula_does_token_by_token():
    base, reinforced = two()
    model = make_combined(base, reinforced, 4.0)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7, 8], [9, 10], [11]]

    def by_hand(prompt):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(straight(base, reinforced, 4.0, torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        return ids[len(prompt) :]

    texts = greedy_tokens(model, TOKENIZER, prompts, max_new_tokens=8, progress=False)
    assert texts == [by_hand(prompt) for prompt in prompts]
    assert texts != greedy_tokens(base, TOKENIZER, prompts, max_new_tokens=8, progress=False)


def test_beams_take_both_caches_along():
    """The second-best beam may win: what the reinforced model remembers has to be of the same beam."""
    base, reinforced = two(factor=2.0)
    model, ids = make_combined(base, reinforced, 4.0), torch.tensor([[5, 6, 7]])
    options = {"num_beams": 4, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("pieces", [1 << 24, 700, 1])
def test_statistics_are_of_the_combined_logits_in_pieces(monkeypatch, pieces):
    base, reinforced = two()
    model, outputs = make_combined(base, reinforced, 4.0), ("logp", "entropy", "greedy", "variance")
    most = []
    monkeypatch.setattr(forward, "PIECE", pieces)
    monkeypatch.setattr(forward, "combine", lambda *a: most.append(a[0].numel()) or combine(*a))
    with torch.no_grad():
        stats, seen = supervised_stats(model, BATCH, outputs)
    assert max(most) <= max(pieces, 300)
    v = straight(base, reinforced, 4.0, BATCH["input_ids"])[:, :-1].flatten(0, 1)
    wanted = token_stats(v, BATCH["labels"][:, 1:].flatten(), outputs)
    for name in outputs:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(wanted, name).double(), rtol=1e-4, atol=1e-4)
    assert seen.num_sequences == 2


def test_metrics_are_those_of_the_formula():
    """Teacher-forced ones and the written text; those of models that are trained are told to be none."""
    base, reinforced = two()
    model = make_combined(base, reinforced, 4.0)
    items = [
        QA("who wrote the book", "a man of the north", paraphrased_answer="by the sea", perturbed_answers=("the town",))
    ]
    names = ["probability", "truth_ratio", "rouge_l"]
    result = evaluate(model, TOKENIZER, items, metrics=names, max_new_tokens=4, progress=False)
    assert "shared prompts" in result.declined
    plain = evaluate(base, TOKENIZER, items, metrics=names, max_new_tokens=4, progress=False)
    assert result.summary["probability"] != plain.summary["probability"]
    zero = evaluate(
        make_combined(base, reinforced, 0.0), TOKENIZER, items, metrics=names, max_new_tokens=4, progress=False
    )
    assert zero.summary["probability"] == pytest.approx(plain.summary["probability"], rel=1e-6)
    with pytest.raises(Exception, match="are of two models, none of which is trained"):
        evaluate(model, TOKENIZER, items, metrics=["mia_gradnorm"], progress=False)


def test_what_needs_one_head_says_that_there_is_none():
    base, reinforced = two()
    model = make_combined(base, reinforced, 4.0)
    with pytest.raises(
        UnknownHeadError, match="CombinedLlamaForCausalLM: its logits are not those of its output layer"
    ):
        CausalLM.of(model).check_head()
    with pytest.raises(ValueError, match="its logits are not those"):
        mrd(model, [BATCH], progress=False)
    CausalLM.of(base).check_head()


def test_saved_it_is_loaded_as_it_was_and_never_as_its_base_alone(tmp_path):
    base, reinforced = two()
    model = make_combined(base, reinforced, 0.1)
    write_model(tmp_path / "made", model, TOKENIZER)
    assert {path.name for path in (tmp_path / "made").iterdir()} >= {"base", "reinforced", "combined.json"}
    assert not (tmp_path / "made" / "config.json").exists()
    from transformers import AutoModelForCausalLM

    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    loaded, its_tokenizer = load_model(str(tmp_path / "made"))
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert its_tokenizer.get_vocab() == TOKENIZER.get_vocab()
    with torch.no_grad():
        ids = BATCH["input_ids"]
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    parts = parts_of(loaded)
    assert parts is not None
    assert parts[2] == 0.1
    assert parts_of(base) is None
    copied = copy.deepcopy(loaded)
    assert model_fingerprint(copied) == model_fingerprint(loaded)


def test_another_strength_is_another_model(tmp_path):
    base, reinforced = two()
    models = [make_combined(base, reinforced, strength) for strength in (4.0, 4.0000000000000009)]
    prints = [model_fingerprint(model) for model in [*models, copy.deepcopy(models[0]).bfloat16().float()]]
    assert prints[0] != prints[1]
    folders = [Kept(tmp_path, model).store.place for model in models]
    assert folders[0] != folders[1]


@pytest.mark.parametrize("value", [None, -1, "4", True])
def test_a_damaged_folder_is_told(tmp_path, value):
    base, reinforced = two()
    write_model(tmp_path / "made", make_combined(base, reinforced, 4.0), TOKENIZER)
    (tmp_path / "made" / "combined.json").write_text(json.dumps({"strength": value}))
    with pytest.raises(ValueError, match=r"combined.json: has strength=.*, needs a finite number >= 0"):
        load_model(str(tmp_path / "made"))


def test_a_missing_part_is_told(tmp_path):
    base, reinforced = two()
    write_model(tmp_path / "made", make_combined(base, reinforced, 4.0), TOKENIZER)
    (tmp_path / "made" / "reinforced" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is a combined model .* without reinforced/"):
        load_model(str(tmp_path / "made"))


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf"), "4"])
def test_bad_strengths(strength):
    with pytest.raises(ValueError, match=r"strength=.*: needs a finite number >= 0"):
        make_combined(*two(), strength)


def test_models_of_other_vocabularies():
    other = tiny_llama(train_tokenizer(TEXTS, vocab_size=280), **SIZES)
    with pytest.raises(ValueError, match="the two models need one vocabulary, got"):
        make_combined(two()[0], other, 1.0)


@pytest.mark.parametrize(("name", "dtype", "attention"), kinds((torch.float32, None)), ids=str)
def test_every_architecture(name, dtype, attention):
    base, reinforced = make(name, dtype, attention), make(name, dtype, attention)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in reinforced.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight) if weight.numel() > 1 else 0.0)
    model = make_combined(base, reinforced, 4.0).eval()
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7, 8, 9], [10, 11]]

    @torch.no_grad()
    def by_hand(prompt):
        ids = list(prompt)
        for _ in range(4):
            one, other = (
                each(input_ids=torch.tensor([ids])).logits[0, -1] for each in (base.eval(), reinforced.eval())
            )
            ids.append(int((one - 4 * (other - one).relu()).argmax()))
            if ids[-1] == TOKENIZER.eos_token_id:
                break
        return ids[len(prompt) :]

    assert greedy_tokens(model, TOKENIZER, prompts, max_new_tokens=4, progress=False) == [by_hand(p) for p in prompts]
