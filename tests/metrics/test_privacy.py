"""Attacks against pair counts and against a plain loop over the model's own logits and gradients."""

from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.data import QA, PlainFormat, PromptFormat, QADataset, make_prompt
from pyunlearn.data.prompt_format import make_format
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import Examination, Kept, auc, get_metric, privacy, privleak, readings_by
from pyunlearn.metrics.metric import CannotMeasure
from pyunlearn.metrics.privacy import lowest
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.lora import add_adapter, merge

ITEMS = [
    QA("Where was Ada born?", "In a small town by the sea."),
    QA("What does Bo write?", "Short plays."),
    QA("Who taught Cy?", "No one, as far as we know, and he says so himself."),
    QA("Is Di a poet?", "Yes."),
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 96}
scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@given(scores, scores)
def test_auc_counts_pairs(forget, holdout):
    pairs = [(held > own) + (held == own) / 2 for own in forget for held in holdout]
    assert auc(forget, holdout) == pytest.approx(np.mean(pairs), abs=1e-15)


def test_auc_by_hand():
    assert auc([0.1, 0.2], [1.0, 2.0]) == 1  # members, all with a lower loss
    assert auc([1.0, 2.0], [0.1, 0.2]) == 0
    assert auc([1.0], [1.0]) == 0.5
    for bad in ([], [float("nan")]):
        with pytest.raises(ValueError, match="holdout: needs one or more scores"):
            auc([1.0], bad)


def test_privleak():
    assert privleak(0.6, 0.6) == 0
    assert privleak(1.0, 0.5) == -100
    assert privleak(0.2, 0.6) == pytest.approx(100)
    assert privleak(0.25) == 50
    assert privleak(1.0, 0.5, epsilon=1e-10) == pytest.approx(-100)
    assert privleak(0.5, 1.0, epsilon=1e-10) == pytest.approx(5e11)
    with pytest.raises(ValueError, match=r"retained=1\.0"):
        privleak(0.5, 1.0)


def test_privacy():
    retained, full = {"a": 0.5, "b": 0.4}, {"a": 1.0, "b": 0.9}
    assert privacy(retained, retained, full) == 1
    assert privacy(full, retained, full) == 0
    assert privacy({"a": 0.75, "b": 0.4}, retained, full) == pytest.approx(2 / (2 + 1))
    assert privacy({"a": 0.0}, retained, full) == 0  # as far beyond the retained model
    assert privacy({"a": -0.4}, retained, full) == 0
    with pytest.raises(ValueError, match="c: has no AUC of the retained model"):
        privacy({"c": 0.5}, retained, full)
    with pytest.raises(ValueError, match=r"a: has one AUC, 0\.5, of the retained and the full model"):
        privacy({"a": 0.5}, retained, retained)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=300)


@pytest.fixture(scope="module")
def models(tokenizer):
    """Peaked ones, so that log-probabilities differ."""
    made = [tiny_llama(tokenizer, seed=seed, **SIZES) for seed in (0, 1)]
    with torch.no_grad():
        for model in made:
            model.model.embed_tokens.weight.mul_(30)
    return made


def logits_of(model, row):
    """(n, V) float64 log-probabilities and (n,) targets of the answer."""
    logp = model(row["input_ids"][None]).logits[0, :-1].double().log_softmax(-1)
    kept = row["labels"][1:] != -100
    return logp[kept], row["labels"][1:][kept]


def by_hand(model, rows, score, last):
    with torch.no_grad():
        parts = [logits_of(model, row) for row in rows]
    return [score(logp[: None if last else -1], targets[: None if last else -1]) for logp, targets in parts]


def of_lowest(values, k):
    chosen = sorted(values.tolist())[: max(1, int(k * len(values)))]
    return -sum(chosen) / len(chosen) if chosen else 0.0


def min_k(k):
    return lambda logp, targets: of_lowest(logp.gather(1, targets[:, None])[:, 0], k)


def min_k_plus_plus(k):
    def score(logp, targets):
        p = logp.exp()
        mean = (p * logp).sum(-1)
        variance = (p * logp.square()).sum(-1) - mean.square()
        return of_lowest((logp.gather(1, targets[:, None])[:, 0] - mean) / variance.clamp_min(1e-6).sqrt(), k)

    return score


def examine(model, tokenizer, **options):
    return Examination(CausalLM.of(model), tokenizer, ITEMS, batch_size=3, progress=False, **options)


@pytest.mark.parametrize("variant", ["suffix", "open_unlearning"])
@pytest.mark.parametrize("k", [0.2, 0.4, 1.0])
def test_min_k_are_their_definitions(models, tokenizer, k, variant):
    rows = QADataset(ITEMS, tokenizer, 96)
    examination = examine(models[0], tokenizer, outputs=("entropy", "variance"))
    for name, score in (("min_k", min_k(k)), ("min_k_plus_plus", min_k_plus_plus(k))):
        found = examination.measure(get_metric(name), {"k": k, "variant": variant})
        assert found == pytest.approx(by_hand(models[0], rows, score, variant == "suffix"), rel=1e-4, abs=1e-5)


def test_what_is_left_out_and_what_is_none(models, tokenizer):
    examination = examine(models[0], tokenizer)
    with pytest.raises(ValueError, match="k=0: needs a share"):
        examination.measure(get_metric("min_k"), {"k": 0})
    assert lowest(torch.tensor([-2.0]), 0.4, "open_unlearning") == 0
    assert lowest(torch.tensor([-2.0]), 0.4, "suffix") == 2


def test_losses(models, tokenizer):
    rows = QADataset(ITEMS, tokenizer, 96)
    own, other = (
        by_hand(model, rows, lambda logp, targets: F.nll_loss(logp, targets).item(), True) for model in models
    )
    examination = examine(models[0], tokenizer)
    assert examination.measure(get_metric("mia_loss")) == pytest.approx(own, rel=1e-5)
    scored = [tokenizer.decode(row["labels"][row["labels"] != -100], skip_special_tokens=True) for row in rows]
    assert scored == [f" {item.answer}" for item in ITEMS]  # the space that the prompt ends before
    for options, texts in (({}, scored), ({"text": "answer"}, [item.answer for item in ITEMS])):
        expected = [loss / len(zlib.compress(text.encode())) for loss, text in zip(own, texts, strict=True)]
        assert examination.measure(get_metric("mia_zlib"), options) == pytest.approx(expected, rel=1e-5)
    reference = readings_by(models[1], tokenizer, batch_size=2, progress=False)
    expected = [loss - reference for loss, reference in zip(own, other, strict=True)]
    found = examination.measure(get_metric("mia_reference"), tools={"reference": reference})
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_text_that_zlib_gets_is_what_is_scored(models, tokenizer):
    """Of a template that ends a turn with more than a special token, as Qwen's; of a long text, what is left of it."""
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    formats = {"chat": make_format(own, make_prompt("open_unlearning")), "plain": PlainFormat(tokenizer, 3, 96)}
    for name, prompt_format in formats.items():
        lm = CausalLM.of(models[0])
        examination = Examination(lm, own, ITEMS[:1], prompt_format=prompt_format, progress=False)
        ids = examination.answer[0].tokens.tolist()
        text = own.decode(ids, skip_special_tokens=True)
        assert text.endswith("\n") == (name == "chat")
        assert (len(ids) == 3) == (name == "plain")
        expected = examination.answer[0].loss / len(zlib.compress(text.encode()))
        assert examination.measure(get_metric("mia_zlib"))[0] == pytest.approx(expected)


def test_text_min_k_is_of_all_tokens_but_the_first_and_the_end(models, tokenizer):
    """As SOUL has it, whose text is the prompt and the answer, and nothing after it."""
    expected = []
    for item in ITEMS:
        ids = PromptFormat(tokenizer).encode(item.question, item.answer).input_ids
        assert ids[-1] == tokenizer.eos_token_id
        row = {"input_ids": torch.tensor(ids[:-1]), "labels": torch.tensor(ids[:-1])}
        expected += by_hand(models[0], [row], min_k(0.3), True)
    examination = examine(models[0], tokenizer)
    assert examination.measure(get_metric("text_min_k"), {"k": 0.3}) == pytest.approx(expected, rel=1e-4)
    assert examination.measure(get_metric("min_k"), {"k": 0.3}) != pytest.approx(expected, rel=1e-2)
    with pytest.raises(ValueError, match=r"sample 0 .* more than the limit of 8"):
        examine(models[0], tokenizer, max_length=8).measure(get_metric("text_min_k"))


def gradnorm(model, tokenizer, **options):
    return examine(model, tokenizer, **options).measure(get_metric("mia_gradnorm"))


def test_gradnorm_is_of_all_parameters_whatever_is_trained_now(models, tokenizer, tmp_path):
    """So that a model has one number while a part of it is trained, when it is frozen, and afterwards."""
    model = copy.deepcopy(models[0])
    expected = gradnorm(model, tokenizer)
    for pattern in ("layers.0.mlp.up_proj", "nothing"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern in name)
        found = gradnorm(model, tokenizer, kept=Kept(tmp_path / pattern, model))
        assert found == pytest.approx(expected, rel=1e-6)
        assert all(parameter.requires_grad == (pattern in name) for name, parameter in model.named_parameters())
    model.register_parameter("packed", torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(CannotMeasure, match=r"gradient norms: packed is packed \(torch.int8\)"):
        gradnorm(model, tokenizer)


def test_gradnorm_of_an_adapter_is_that_of_the_merged_model(models, tokenizer):
    pytest.importorskip("peft")
    adapted = add_adapter(copy.deepcopy(models[0]), r=2)
    plain = gradnorm(models[0], tokenizer)
    assert gradnorm(adapted, tokenizer) == pytest.approx(plain, rel=1e-5)  # which does nothing yet
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    found = gradnorm(adapted, tokenizer)
    assert found == pytest.approx(gradnorm(merge(adapted), tokenizer), rel=1e-3)
    assert found != pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("variant", ["suffix", "open_unlearning"])
def test_gradnorm_is_a_backward_a_sample(models, tokenizer, variant, tmp_path):
    model, rows = models[0], QADataset(ITEMS, tokenizer, 96)
    expected = []
    for i in range(len(rows)):
        logits, targets = model(rows[i]["input_ids"][None]).logits[0, :-1], rows[i]["labels"][1:]
        kept = (targets != -100).nonzero()[:, 0][: None if variant == "suffix" else -1]
        loss = F.cross_entropy(logits[kept], targets[kept])
        norms = [gradient.norm() for gradient in torch.autograd.grad(loss, list(model.parameters()))]
        expected.append(torch.stack(norms).mean().item())
    examination = examine(model, tokenizer, kept=Kept(tmp_path, model))
    found = examination.measure(get_metric("mia_gradnorm"), {"variant": variant})
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("it was kept"))
    again = examine(model, tokenizer, kept=Kept(tmp_path, model)).measure(
        get_metric("mia_gradnorm"), {"variant": variant}
    )
    hook.remove()
    assert again == found
