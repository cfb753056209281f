"""Perplexity of answers and of texts, against the model's own loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import evaluate, text_perplexity

TEXT = "the quick brown fox jumps over the lazy dog and packs my box with five dozen liquor jugs"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=48)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model.eval()


def losses(model, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none").tolist()


def test_windows_are_read_by_themselves(model, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    opening = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    width = 11 - len(opening)
    pieces = [opening + ids[start : start + width] for start in range(0, len(ids), width)]
    expected = [loss for piece in pieces for loss in losses(model, piece)]
    value = text_perplexity(model, tokenizer, TEXT, window=11, batch_size=3, progress=False)
    assert value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert value != pytest.approx(text_perplexity(model, tokenizer, TEXT, progress=False), rel=1e-3)


def test_of_the_answers_as_texts(model, tokenizer):
    items = [QA("", TEXT), QA("not read", "the lazy dog")]
    for window, used in ((11, 11), (4096, 48)):
        result = evaluate(model, tokenizer, items, metrics=["text_perplexity"], progress=False,
                          options={"text_perplexity": {"window": window}})  # fmt: skip
        expected = [text_perplexity(model, tokenizer, item.answer, window=used, progress=False) for item in items]
        assert [record["text_perplexity"] for record in result.records] == pytest.approx(expected)


def test_of_an_answer_it_is_one_over_the_probability(model, tokenizer):
    names = ["perplexity", "probability"]
    result = evaluate(model, tokenizer, [QA("the quick?", "brown fox")], metrics=names, progress=False)
    assert result.summary["perplexity"] == pytest.approx(1 / result.summary["probability"])


def test_a_collapsed_model_has_an_infinite_one(tokenizer):
    """A loss beyond 709 nats, of which float64 has no exponential."""
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=48)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    names = ["perplexity", "text_perplexity", "probability"]
    result = evaluate(model, tokenizer, [QA("the quick?", "brown fox")], metrics=names, progress=False)
    assert result.summary == {"perplexity": math.inf, "text_perplexity": math.inf, "probability": 0}
    assert result.records[0]["nll"] / result.records[0]["num_tokens"] > 710
    assert text_perplexity(model, tokenizer, TEXT, progress=False) == math.inf


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [(TEXT, 1, "window=1: needs"), (TEXT, 49, "window=49: needs .* context, 48"), ("", None, "text: has 0 tokens")],
)
def test_bad_arguments(model, tokenizer, text, window, message):
    with pytest.raises(ValueError, match=message):
        text_perplexity(model, tokenizer, text, window=window, progress=False)
