"""Three samples in one right-padded batch, and the textbook path to their token likelihoods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..float64 import MODELS, V, make_model

torch.set_num_threads(1)
LENGTHS, PROMPTS = (11, 6, 9), (4, 2, 3)
Batch = dict[str, Tensor]


def make_rows(seed: int = 1) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each sample, the prompt not supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, prompt in zip(LENGTHS, PROMPTS, strict=True):
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


def pad(rows: list[tuple[list[int], list[int]]], to: int, left: bool = False, pad_id: int = 0) -> Batch:
    def padded(values: list[int], fill: int) -> list[int]:
        rest = [fill] * (to - len(values))
        return rest + values if left else values + rest

    columns = {
        "input_ids": [padded(ids, pad_id) for ids, _ in rows],
        "labels": [padded(labels, -100) for _, labels in rows],
        "attention_mask": [padded([1] * len(ids), 0) for ids, _ in rows],
    }
    return {name: torch.tensor(values) for name, values in columns.items()}


def nlls(model: Any, batch: Batch) -> list[Tensor]:
    """L_t of each sample's scored tokens by cross_entropy on whole logits, one sample at a time, without padding."""
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        logits = model(input_ids=ids[None, mask != 0]).logits[0, :-1]
        targets = labels[mask != 0][1:]
        found.append(F.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none"))
    return found


@pytest.fixture(scope="session")
def batch() -> Batch:
    return pad(make_rows(), max(LENGTHS))


@pytest.fixture(scope="session", params=list(MODELS))
def any_model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def model():
    return make_model("llama")
