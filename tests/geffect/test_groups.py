"""Which blocks are shallow, middle and deep, and groups by patterns."""

from __future__ import annotations

import pytest
from torch import nn

import pyunlearn as pu
from pyunlearn.gradients.groups import PAPER, assign_groups, layer_of
from tests.float64 import make_model

from .common import METRICS, OBJECTIVE


class Stack(nn.Module):
    """The shape of a causal LM with any number of blocks."""

    def __init__(self, depth: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(2)
        self.lm_head = nn.Linear(2, 3, bias=False)


def blocks_by_group(depth: int) -> dict[str, list[str]]:
    model = Stack(depth)
    groups = assign_groups(model, [name for name, _ in model.named_parameters()], "paper")
    return {group: list(dict.fromkeys(layer_of(name) for name in names)) for group, names in groups.items()}


def test_paper_groups_of_llama_2_7b():
    """Figure 2: layers 1-11, 12-22 and 23-33, where the 33rd is the final norm."""
    groups = blocks_by_group(32)
    assert tuple(groups) == PAPER
    assert groups["embed"] == ["embed_tokens"]
    assert groups["shallow"] == [f"layers.{i}" for i in range(11)]
    assert groups["middle"] == [f"layers.{i}" for i in range(11, 22)]
    assert groups["deep"] == [*(f"layers.{i}" for i in range(22, 32)), "norm"]
    assert groups["lm_head"] == ["lm_head"]


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7, 24])
def test_thirds_of_any_depth(depth):
    groups = blocks_by_group(depth)
    sizes = [sum(name.startswith("layers") for name in groups.get(third, [])) for third in PAPER[1:4]]
    assert sum(sizes) == depth
    assert max(sizes) - min(sizes) <= 1


def test_groups_by_patterns():
    model = make_model("llama")
    groups = {"attention": "*.self_attn.*", "mlp": ["*.gate_proj.*", "*.up_proj.*"], "first": "model.layers.0.*"}
    effect = pu.g_effect(model, OBJECTIVE, METRICS, groups)
    dots = effect.per_parameter["retain"]
    assert list(effect.per_group["retain"]) == list(groups)
    assert effect.per_group["retain"]["mlp"] == pytest.approx(
        sum(v for n, v in dots.items() if "gate_proj" in n or "up_proj" in n), rel=1e-12
    )
