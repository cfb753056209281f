"""Sharded parameters get the noise that whole ones get, and come back bitwise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pyunlearn as pu

NOISE = dict(sigma=0.1, seed=4, draw=2)
CASES = {  # (shape, placements, bfloat16 numbers)
    "dim 0": ((8, 5), Shard(0)),
    "dim 0, uneven": ((7, 5), Shard(0)),
    "dim 0, one rank is empty": ((1, 5), Shard(0)),
    "dim 1": ((4, 6), Shard(1)),
    "dim 1, uneven": ((6, 9, 4), Shard(1)),
    "last of three": ((3, 2, 7), Shard(2)),
    "vector": ((13,), Shard(0)),
    "replicated": ((5, 6), Replicate()),
    "long rows": ((3, 70001), Shard(1)),
}


def parameter(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return w.bfloat16().float() if kind == "snap" else w


def sharded_parameters(mesh, mode: str, backend: str | None) -> dict[str, bool]:
    right = {}
    for name, (shape, placement) in CASES.items():
        whole, sharded = nn.ParameterDict({"w": parameter(shape, mode)}), nn.ParameterDict()
        sharded["w"] = nn.Parameter(distribute_tensor(whole["w"].data, mesh, [placement]))
        with pu.perturbed(whole, **NOISE, mode="overlay", backend=backend):
            expected = whole["w"].detach().clone()
        with pu.perturbed(sharded, **NOISE, mode=mode, backend=backend):
            same = torch.equal(sharded["w"].full_tensor(), expected)
        right[f"{name}, {mode}, {backend}"] = same and torch.equal(sharded["w"].full_tensor(), whole["w"])
    return right


def fsdp(mesh) -> dict[str, bool]:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    whole, sharded, x = network(), network(), torch.randn(4, 5)
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    with torch.no_grad():
        clean = sharded(x)
        with pu.perturbed(whole, **NOISE):
            expected = whole(x)
        with pu.perturbed(sharded, **NOISE) as weights:
            got, copied = sharded(x), weights.mode == "copy" and "overlay: sharded" in weights.declined
        return {"fsdp": torch.equal(got, expected) and copied, "after": torch.equal(sharded(x), clean)}


def refusals(mesh) -> dict[str, str]:
    holder = nn.ParameterDict({"w": nn.Parameter(distribute_tensor(torch.ones(4, 4).bfloat16(), mesh, [Shard(0)]))})
    assert isinstance(holder["w"], DTensor)
    messages = {}
    for mode in ("auto", "overlay", "streamed", "snap"):
        try:
            with pu.perturbed(holder, mode=mode):
                messages[mode] = "entered"
        except ValueError as error:
            messages[mode] = str(error)
    return messages


def sharded(_: Path) -> tuple[dict[str, bool], dict[str, str]]:
    mesh = init_device_mesh("cpu", (2,))
    right: dict[str, bool] = {}
    for mode in ("auto", "copy", "snap"):
        right |= sharded_parameters(mesh, mode, None)
    right |= sharded_parameters(mesh, "copy", "eager") | fsdp(mesh)
    return right, refusals(mesh)
