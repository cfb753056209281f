"""Layers by their influence: what components are, ranks with ties by hand, hybrids to the bit, the choice of k."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pyunlearn.calibration import choose_count, components, influence_order, stored, write_tensors
from pyunlearn.calibration.cru import KINDS, REST, changed, load


@pytest.mark.parametrize("kind", KINDS)
def test_components_part_the_model(tiny, kind):
    for model in (tiny.model(), GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=30))):
        parts = components(model, kind)
        depth = model.config.num_hidden_layers
        assert list(parts) == [*(f"{kind} {i}" for i in range(depth)), REST]
        names = [name for own in parts.values() for name in own]
        assert sorted(names) == sorted(stored(model))  # each once


def test_what_is_in_a_block(tiny):
    model, at = tiny.model(), "model.layers.1."
    found = {kind: {name.removeprefix(at) for name in components(model, kind)[f"{kind} 1"]} for kind in KINDS}
    assert found["attention"] == {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    assert found["mlp"] == {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert found["norm"] == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert found["layer"] == found["attention"] | found["mlp"] | found["norm"]
    with pytest.raises(ValueError, match="component='layers': did you mean layer"):
        components(model, "layers")


def test_patches_are_swapped_to_the_bit(tiny, tmp_path):
    first, second = tiny.model(seed=0), tiny.model(seed=1)
    before, after = write_tensors(first, tmp_path / "before"), write_tensors(second, tmp_path / "after")
    model, parts = tiny.model(seed=0), components(first)
    load(model, after, parts["layer 1"])
    for name, (tensor, names) in stored(model).items():
        assert torch.equal(tensor, (after if name in parts["layer 1"] else before).read(names)), name
    for names in parts.values():
        load(model, after, names)
    assert all(torch.equal(t, after.read(names)) for t, names in stored(model).values())  # k = all: the unlearned
    for names in parts.values():
        load(model, before, names)
    assert all(torch.equal(t, before.read(names)) for t, names in stored(model).values())  # k = 0: the original


def test_what_unlearning_left_alone_is_no_component(tiny, tmp_path):
    model = tiny.model()
    before = write_tensors(model, tmp_path / "before")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] += 1e-6
    after = write_tensors(model, tmp_path / "after")
    every = {name: names for name, (_, names) in stored(model).items()}
    assert changed(components(model), every, before, after) == ["layer 0"]
    assert changed(components(model, "attention"), every, before, after) == [REST]


def test_rank_sums_by_hand():
    influence = {"a": (0.9, 0.1), "b": (0.8, 0.4), "c": (0.9, 0.2), "d": (0.5, 0.4)}
    # utility: a and c share ranks 1 and 2, b 3, d 4; forgetting: b and d share 1 and 2, c 3, a 4
    assert influence_order(influence) == [("c", 4.5), ("b", 4.5), ("a", 5.5), ("d", 5.5)]


def test_ties_go_to_the_shallower():
    assert [name for name, _ in influence_order(dict.fromkeys("xyz", (0.5, 0.5)))] == ["x", "y", "z"]
    assert influence_order(dict.fromkeys("xyz", (0.5, 0.5)))[0][1] == 4.0
    with pytest.raises(ValueError, match="NaN"):
        influence_order({"x": (math.nan, 1.0)})


def test_the_k_of_most_use_among_those_that_forget_enough():
    curve = [(0.9, 0.0), (0.95, 0.5), (0.7, 0.85), (0.8, 0.91), (0.6, 1.0)]
    assert choose_count(curve, 0.9) == (3, pytest.approx(0.9))
    assert choose_count(curve, 0.5) == (1, pytest.approx(0.5))
    assert choose_count(curve, 1.0) == (4, 1.0)
    assert choose_count([(0.5, -30.0), (0.5, -2.0), (0.5, -2.0), (0.1, -1.0)], 0.9)[0] == 1  # ln p; ties: the smaller k


def test_nothing_to_choose_by():
    with pytest.raises(ValueError, match="has forgotten nothing of the validation rows"):
        choose_count([(0.9, 0.4), (0.8, 0.4)], 0.9)
    with pytest.raises(ValueError, match=r"target=1\.5"):
        choose_count([(0.9, 0.0), (0.8, 0.4)], 1.5)
    with pytest.raises(ValueError, match="at least"):
        choose_count([(0.9, 0.0)], 0.5)
