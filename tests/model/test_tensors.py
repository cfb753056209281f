"""Tensors of models on disk: all of them, each once, and none in memory before it is read."""

from __future__ import annotations

import copy

import pytest
import torch

from pyunlearn.model.tensors import Tensors, stored, write_files, write_tensors


def tied(tiny):
    model = tiny.model()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.register_buffer("count", torch.tensor(3))
    return model


def test_every_tensor_once_and_back_to_the_bit(tiny, tmp_path):
    model = tied(tiny)
    held = stored(model)
    assert held["model.embed_tokens.weight"][1] == ("model.embed_tokens.weight", "lm_head.weight")
    assert "lm_head.weight" not in held
    assert "count" in held
    tensors = write_tensors(model, tmp_path / "all", shard=20_000)
    assert len(list((tmp_path / "all").iterdir())) > 3
    assert tensors.hold(model)
    for tensor, names in held.values():
        assert torch.equal(tensors.read(names), tensor)
        assert torch.equal(tensors.read(names[::-1]), tensor)  # by whichever name it is held


def test_what_shares_memory_is_written_as_it_is(tmp_path):
    """Which safetensors itself refuses."""
    whole = torch.arange(6.0)
    tensors = write_files([("whole", whole), ("part", whole[1:3]), ("turned", whole.view(2, 3).T)], tmp_path)
    assert torch.equal(tensors.read(["whole"]), whole)
    assert torch.equal(tensors.read(["part"]), whole[1:3])
    assert torch.equal(tensors.read(["turned"]), whole.view(2, 3).T)


def test_tensors_are_asked_for_when_they_are_written(tmp_path):
    """So that no more is held of what is made for it than goes into a file."""
    files = []

    def made():
        for i in range(6):
            files.append(len(list(tmp_path.iterdir())))
            yield f"{i}", torch.full((100,), float(i))

    write_files(made(), tmp_path, shard=800)
    assert files == [0, 0, 0, 1, 1, 2]


def test_a_saved_model_is_read_where_it_stands(tiny, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    assert Tensors(tmp_path).hold(model)
    assert not Tensors(tmp_path).hold(tied(tiny))  # which has a buffer more


def test_other_shapes_are_told_by_name(tiny, tmp_path):
    model = tiny.model()
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(60, 32))
    tensors = write_tensors(other, tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj.weight: has shape \(64, 32\) before .* \(60, 32\)"
    ):
        tensors.check(model)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: .*none does not have it"):
        Tensors(tmp_path / "none").check(model)
    with pytest.raises(KeyError, match="has no tensor weight"):
        tensors.read(["weight"])
    file = next((tmp_path / "other").iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{file.name}: is damaged"):
        Tensors(tmp_path / "other")
