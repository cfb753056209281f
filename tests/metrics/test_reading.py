"""What is kept of a model's readings and texts: used again for the same model, text and settings, and for no other."""

from __future__ import annotations

import pytest
import torch

from pyunlearn.data import QA, QADataset
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import Kept, evaluate, greedy_tokens, read_rows
from pyunlearn.metrics import reading as reading_module
from pyunlearn.store import Damaged

ITEMS = [QA(f"Who is number {i}?", " and ".join(["one"] * (i + 1)) + ".") for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=300)


@pytest.fixture
def model(tokenizer):
    return tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)


@pytest.fixture
def rows(tokenizer):
    dataset = QADataset(ITEMS, tokenizer, 64)
    return [dataset[i] for i in range(len(dataset))]


class Forwards:
    """How often a model has been run."""

    def __init__(self, model):
        self.count = 0
        model.model.register_forward_pre_hook(self.add)

    def add(self, *_):
        self.count += 1


def read(model, rows, folder, **options):
    return read_rows(model, rows, **{"batch_size": 3, "progress": False, **options}, kept=Kept(folder, model))


def test_a_reading_is_one_row_alone(model, rows):
    """Whatever it is batched with, and in the items' order."""
    together = read_rows(model, rows, outputs=("entropy", "variance"), progress=False)
    for row, reading in zip(rows, together, strict=True):
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1].double()
        kept = row["labels"][1:] != -100
        logp = logits.log_softmax(-1)[kept]
        targets = row["labels"][1:][kept]
        torch.testing.assert_close(reading.logp, logp.gather(1, targets[:, None])[:, 0].float(), atol=2e-6, rtol=0)
        assert torch.equal(reading.greedy, logp.argmax(-1) == targets)
        entropy = -(logp.exp() * logp).sum(-1)
        torch.testing.assert_close(reading.more["entropy"], entropy.float(), atol=2e-6, rtol=0)
        variance = (logp.exp() * logp**2).sum(-1) - entropy**2
        torch.testing.assert_close(reading.more["variance"], variance.float(), atol=1e-5, rtol=0)
        assert reading.nll == pytest.approx(-logp.gather(1, targets[:, None]).sum().item(), abs=1e-5)
        assert reading.loss == pytest.approx(reading.nll / len(targets))


def test_what_is_kept_is_not_read_again(model, rows, tmp_path):
    forwards = Forwards(model)
    first = read(model, rows, tmp_path)
    assert forwards.count >= 3
    forwards.count = 0
    again = read(model, rows, tmp_path)
    assert forwards.count == 0
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.logp, other.logp)
        assert torch.equal(one.greedy, other.greedy)


@pytest.mark.parametrize("change", ["weights", "config", "text", "outputs", "attention"])
def test_anything_else_is_read_anew(model, rows, tokenizer, tmp_path, change):
    read(model, rows, tmp_path)
    options = {}
    if change == "weights":
        with torch.no_grad():
            model.lm_head.weight[5, 3] += 1e-3
    elif change == "config":
        model.config.rms_norm_eps *= 2
    elif change == "attention":
        model.set_attn_implementation("eager")
    elif change == "text":
        rows = [{**row, "labels": row["labels"].clone()} for row in rows]
        for row in rows:
            row["labels"][:-2] = -100
    else:
        options["outputs"] = ("entropy",)
    forwards = Forwards(model)
    anew = read(model, rows, tmp_path, **options)
    assert forwards.count >= 3
    for one, other in zip(anew, read(model, rows, None, **options), strict=True):
        assert torch.equal(one.logp, other.logp)


def test_a_stop_loses_one_batch(model, rows, tmp_path):
    forwards = Forwards(model)

    def stop(*_):
        if forwards.count == 3:
            raise KeyboardInterrupt

    whole = read(model, rows, None)
    forwards.count = 0
    hook = model.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        read(model, rows, tmp_path)
    hook.remove()
    forwards.count = 0
    resumed = read(model, rows, tmp_path)
    assert forwards.count == 1
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(one.logp, other.logp)


def test_a_damaged_unit_is_told(model, rows, tmp_path):
    read(model, rows, tmp_path)
    unit = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(unit.read_bytes())
    content[-1] ^= 1
    unit.write_bytes(content)
    with pytest.raises(Damaged, match=unit.name):
        read(model, rows, tmp_path)


def test_texts_are_kept_too(model, tokenizer, rows, tmp_path):
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]

    def write(folder, **options):
        settings = {"max_new_tokens": 4, "batch_size": 2, "progress": False, **options}
        return greedy_tokens(model, tokenizer, prompts, **settings, kept=Kept(folder, model))

    first = write(tmp_path)
    assert first == write(None)
    forwards = Forwards(model)
    assert write(tmp_path) == first
    assert forwards.count == 0
    assert write(tmp_path, max_new_tokens=2) == [text[:2] for text in first]
    assert forwards.count > 0


def test_one_fingerprint_serves_several_sets(model, tokenizer, tmp_path, monkeypatch):
    """Of 7B weights one takes many seconds."""
    taken = []
    whole = reading_module.model_fingerprint
    monkeypatch.setattr(reading_module, "model_fingerprint", lambda lm: taken.append(lm) or whole(lm))
    options = {"progress": False, "metrics": ["probability"], "cache": Kept(tmp_path, model)}
    first = [evaluate(model, tokenizer, items, **options) for items in (ITEMS[:3], ITEMS[3:])]
    forwards = Forwards(model)
    again = evaluate(model, tokenizer, ITEMS[:3], **{**options, "cache": tmp_path})
    assert (again.records, forwards.count, len(taken)) == (first[0].records, 0, 2)


def test_metrics_that_are_added_cost_what_is_new(model, tokenizer, tmp_path):
    options = {"progress": False, "batch_size": 3, "max_new_tokens": 2, "cache": tmp_path}
    evaluate(model, tokenizer, ITEMS, metrics=["probability"], **options)
    forwards = Forwards(model)
    evaluate(model, tokenizer, ITEMS, metrics=["probability", "extraction_strength"], **options)
    assert forwards.count == 0
    evaluate(model, tokenizer, ITEMS, metrics=["probability", "rouge_l"], **options)
    assert forwards.count > 0
