"""Metrics by small models, on random ones: what is compared with what, and what decides."""

from __future__ import annotations

import pytest
import torch

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import (
    CannotMeasure,
    Classifier,
    Embedder,
    clean,
    cosine_similarity,
    entailment_score,
    evaluate,
    nearest_answer,
    toxicity,
)

from .small_encoders import save_bert, save_classifier

ITEMS = [
    QA("where was ada born?", "by the sea .", "at the sea .", ("in a town .", "on a hill .")),
    QA("is di a poet?", "yes .", None, ("no .", "not at all .")),
    QA("what does bo write?", "plays .", None, ("novels .",)),
]
WRITTEN = ["by the sea .", "no .", ""]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return Embedder(save_bert(tmp_path_factory.mktemp("embedder")))


@pytest.fixture(scope="module")
def entailer(tmp_path_factory):
    name = save_classifier(tmp_path_factory.mktemp("entailer"), "entailment", "neutral", "contradiction")
    return Classifier(name, what="entailer")


def test_cosine_similarity(embedder):
    values = cosine_similarity(ITEMS, WRITTEN, embedder)
    answers, texts = embedder([item.answer for item in ITEMS]), embedder(WRITTEN)
    assert values == pytest.approx((answers * texts).sum(1).clamp(min=0).tolist(), abs=2e-6)
    assert values[0] == pytest.approx(1, abs=1e-6)
    before = {ITEMS[1].question: "no .", ITEMS[0].question: "by the hill ."}
    values = cosine_similarity(ITEMS, WRITTEN, embedder, before, against="before")
    assert values[1] == pytest.approx(1, abs=1e-6)
    assert values[2] is None
    assert values[0] == pytest.approx(float(embedder(["by the hill ."])[0] @ texts[0]), abs=2e-6)
    assert cosine_similarity(ITEMS, WRITTEN, embedder, "itself", against="before") == pytest.approx([1] * 3, abs=1e-6)
    with pytest.raises(ValueError, match="against='before': needs the tool before"):
        cosine_similarity(ITEMS, WRITTEN, embedder, against="before")
    with pytest.raises(ValueError, match="against='befor': did you mean before"):
        cosine_similarity(ITEMS, WRITTEN, embedder, against="befor")


def test_opposite_embeddings_have_no_negative_similarity():
    def opposite(texts):
        return torch.tensor([[1.0, 0.0]] * (len(texts) // 2) + [[-1.0, 0.0]] * (len(texts) // 2))

    assert cosine_similarity(ITEMS, WRITTEN, opposite) == [0, 0, 0]


def test_nearest_answer(embedder):
    written = ["at the sea .", "no .", "plays ."]  # the paraphrase, a wrong one, the answer itself
    assert nearest_answer(ITEMS, written, embedder) == [1, 0, 1]
    with pytest.raises(ValueError, match="item 1 has no perturbed_answer"):
        nearest_answer([ITEMS[0], QA("is di a poet?", "yes .")], written[:2], embedder)


def test_entailment(entailer):
    asked = []

    def watched(pairs):
        asked.extend(pairs)
        return entailer(pairs)

    watched.column = entailer.column
    written = ["the sea it was", "yes, she is", "novels"]
    values = entailment_score(ITEMS, written, watched)
    assert asked == [("the sea it was", "by the sea ."), ("yes, she is", "yes .")]  # nothing of the third is right
    expected = [float(int(entailer([pair])[0].argmax()) == 0) for pair in asked]
    assert values == [*expected, 0]
    asked.clear()
    entailment_score(ITEMS, written, watched, premise="answer", least_rouge=0)
    assert asked == [(item.answer, text) for item, text in zip(ITEMS, written, strict=True)]
    with pytest.raises(ValueError, match="premise='answr'"):
        entailment_score(ITEMS, written, entailer, premise="answr")


def test_both_outcomes_of_entailment():
    class Says:
        def __init__(self, row):
            self.row = row

        def column(self, label):
            return ["neutral", "entailment"].index(label)

        def __call__(self, pairs):
            return torch.tensor([self.row] * len(pairs))

    assert entailment_score(ITEMS[:1], ["the sea"], Says([0.4, 0.6])) == [1]
    assert entailment_score(ITEMS[:1], ["the sea"], Says([0.6, 0.4])) == [0]


def test_classifiers(tmp_path):
    toxic = Classifier(save_classifier(tmp_path, "toxic", "neutral"))
    rows = toxic(WRITTEN)
    assert toxicity(WRITTEN, toxic) == pytest.approx(rows[:, 0].tolist(), abs=1e-6)
    assert toxicity(WRITTEN, toxic, preset="soul") == pytest.approx(rows.amax(1).tolist(), abs=1e-6)
    assert clean(WRITTEN, toxic, label="neutral") == pytest.approx(rows[:, 1].tolist(), abs=1e-6)
    assert clean(["the sea is " * 9], toxic, label="neutral", max_length=5) == pytest.approx(
        clean(["the sea is"], toxic, label="neutral", max_length=5), abs=1e-6
    )
    with pytest.raises(ValueError, match="label='clean': needs one of toxic, neutral"):
        clean(WRITTEN, toxic)
    with pytest.raises(ValueError, match="preset='sol': did you mean soul"):
        toxicity(WRITTEN, toxic, preset="sol")
    assert toxicity(WRITTEN, {"clean": None, "toxicity": toxic}) == toxicity(WRITTEN, toxic)
    with pytest.raises(CannotMeasure, match="'clean': needs a classifier, which was given for toxicity only"):
        clean(WRITTEN, {"toxicity": toxic})


def test_in_an_evaluation(embedder):
    tokenizer = train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=300)
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)
    options = {"metrics": ["cosine_similarity"], "max_new_tokens": 4, "progress": False}
    result = evaluate(model, tokenizer, ITEMS, tools={"embedder": embedder}, **options)
    written = [record["generated"] for record in result.records]
    values = [record["cosine_similarity"] for record in result.records]
    assert values == pytest.approx(cosine_similarity(ITEMS, written, embedder), abs=2e-6)
    with pytest.raises(ValueError, match="metric 'cosine_similarity': needs embedder, which was not given"):
        evaluate(model, tokenizer, ITEMS, **options)
