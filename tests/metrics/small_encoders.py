"""Encoders of a few thousand weights on disk, as transformers and sentence-transformers lay them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    "the",
    "sea",
    ".",
]
LONGEST = 48


def save_bert(folder: Path, kind: Any = BertModel, labels: tuple[str, ...] = (), **options: Any) -> str:
    """A random BERT of this kind with its tokenizer; the folder's name."""
    torch.manual_seed(len(labels))
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LONGEST, initializer_range=0.5, **(named if labels else {}), **options,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)


def save_classifier(folder: Path, *labels: str, **options: Any) -> str:
    return save_bert(folder, BertForSequenceClassification, labels, **options)


def save_sentence_files(
    folder: Path, max_seq_length: int, pooling: str = "mean_tokens", last: str = "Normalize"
) -> None:
    """What sentence-transformers keeps beside a model."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Last": last}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
