"""linear_token_stats with its head sharded over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS
from pyunlearn.ops.sharded import Columns

N, H, R, V = 13, 24, 3, 1501  # the first rank holds 751 columns, the second 750
SLICES = 300  # columns that a budget of SLICES * N * size of the dtype holds
DIFFERENTIABLE = tuple(name for name in OUTPUTS if name not in ("variance", "greedy"))
STREAMING = OUTPUTS[:-1]  # without topk
PLAIN = ("logp", "log_nll", "entropy", "variance", "uniform_ce", "lse", "greedy")

# what differs from float32, all options, within the budget
CASES: dict[str, dict[str, Any]] = {
    "within": dict(),
    "float64": dict(dtype=torch.float64),
    "bfloat16": dict(dtype=torch.bfloat16),
    "slices": dict(columns=SLICES),
    "slices in bfloat16": dict(columns=SLICES, dtype=torch.bfloat16),
    "narrowest slices": dict(columns=0),
    "frozen head": dict(frozen=("weight", "bias", "b")),
    "frozen hidden": dict(frozen=("hidden", "x")),
    "no reference, no adapter": dict(without=("ref_hidden", "ref_weight", "x", "b"), outputs=PLAIN),
    "a whole reference": dict(plain=("ref_weight",)),
    "replicated DTensors": dict(replicate=("hidden", "targets", "x", "ref_hidden")),
    "a 2-D mesh": dict(mesh=(1, 2)),
    "eager": dict(backend="eager"),
    "eager by blocks of rows": dict(backend="eager", columns=SLICES),
    "top k": dict(outputs=OUTPUTS),
    "few upstream rows": dict(zero_rows=10),
    "few upstream rows in slices": dict(zero_rows=10, columns=SLICES),
    "all ignored": dict(ignored=range(N)),
    "every row counts": dict(ignored=(), ignore_index=None),
    "one token on two ranks": dict(vocabulary=1),
    "three tokens on two ranks": dict(vocabulary=3),
    "autocast": dict(autocast=True),
}
SHARDED = ("weight", "bias", "b", "ref_weight")


def problem(
    dtype: torch.dtype = torch.float32, vocabulary: int = V, ignored: Any = (3, 9), without: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "weight": (vocabulary, H), "bias": (vocabulary,), "x": (N, R), "b": (vocabulary, R)}
    shapes |= {"ref_hidden": (N, H + 1), "ref_weight": (vocabulary, H + 1)}
    tensors = {name: (torch.randn(shape, generator=g) / 2).to(dtype) for name, shape in shapes.items()}
    tensors["targets"] = torch.randint(0, vocabulary, (N,), generator=g)
    tensors["targets"][list(ignored)] = -100
    return {name: tensor for name, tensor in tensors.items() if name not in without}


def run(
    tensors: dict[str, Tensor],
    outputs: tuple[str, ...] = STREAMING,
    columns: int | None = None,
    zero_rows: int = 0,
    autocast: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Statistics, and gradients of a sum of all of them with random weights, in float64."""
    t = tensors
    if columns is not None:
        options["budget_bytes"] = 2 * columns * N * t["hidden"].element_size()  # the reference's count too
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stats = pu.linear_token_stats(
            t["hidden"], t["weight"], t["targets"], t.get("bias"), outputs,
            (t["ref_hidden"], t["ref_weight"]) if "ref_weight" in t else None,
            adapter=(t["x"], t["b"]) if "x" in t else None, **options,
        ).as_dict()  # fmt: skip
    g = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for name in DIFFERENTIABLE:
        upstream = torch.randn(N, generator=g, dtype=torch.float64)
        upstream[:zero_rows] = 0
        loss = loss + (stats[name].double() * upstream).sum() if name in stats else loss
    loss.backward()
    values = {name: value.detach().double() for name, value in stats.items()}
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            values["d" + name] = tensor.grad
    return values


def case(how: dict[str, Any], shard: bool) -> dict[str, Tensor]:
    options = dict(how)
    kinds = {name: options.pop(name) for name in ("dtype", "vocabulary", "ignored", "without") if name in options}
    frozen, plain, replicate = (options.pop(name, ()) for name in ("frozen", "plain", "replicate"))
    shape = options.pop("mesh", (2,))
    tensors = problem(**kinds)
    if shard:
        mesh = init_device_mesh("cpu", shape)
        rest = [Replicate()] * (len(shape) - 1)
        for name in SHARDED:
            if name in tensors and name not in plain:
                tensors[name] = distribute_tensor(tensors[name], mesh, [*rest, Shard(0)])
        for name in replicate:
            tensors[name] = distribute_tensor(tensors[name], mesh, [*rest, Replicate()])
    for name in ("hidden", "weight", "bias", "x", "b"):
        if name in tensors and name not in frozen:
            tensors[name] = tensors[name].requires_grad_()
    return run(tensors, **options)


def whole(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in values.items()}


def refusals() -> dict[str, str]:
    """The message of every layout that cannot be served."""
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))

    def uneven(tensor: Tensor) -> DTensor:
        rank = torch.distributed.get_rank()
        part = tensor[:500] if rank == 0 else tensor[500:]
        return DTensor.from_local(part, line, [Shard(0)], shape=tensor.shape, stride=tensor.stride())

    def over(mesh: Any, *placements: Any) -> Any:
        return lambda tensor: distribute_tensor(tensor, mesh, placements)

    sharded = {name: over(line, Shard(0)) for name in SHARDED}
    changes: dict[str, dict[str, Any]] = {
        "by hidden columns": sharded | dict(weight=over(line, Shard(1))),
        "replicated": dict(weight=over(line, Replicate())),
        "partial": dict(weight=lambda t: DTensor.from_local(t, line, [Partial()])),
        "twice": dict(weight=over(square, Shard(0), Shard(0))),
        "uneven": dict(weight=uneven),
        "plain bias": sharded | dict(bias=lambda t: t),
        "plain weight": sharded | dict(weight=lambda t: t),
        "plain B": sharded | dict(b=lambda t: t),
        "B by columns": sharded | dict(b=over(line, Shard(1))),
        "reference by columns": sharded | dict(ref_weight=over(line, Shard(1))),
        "rows of hidden": sharded | dict(hidden=over(line, Shard(0))),
        "rows of targets": sharded | dict(targets=over(line, Shard(0))),
        "hidden alone": dict(hidden=over(line, Replicate())),
        "another mesh": sharded | dict(hidden=over(square, Replicate(), Replicate())),
    }
    messages = {}
    for name, change in changes.items():
        tensors = problem()
        for key, layout in change.items():
            tensors[key] = layout(tensors[key])
        try:
            run(tensors)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def gathered() -> Tensor:
    """States of 3 rows, 2 parts and 4 fields that say where they come from: 1000 rank + 100 row + 10 part + field."""
    weight = distribute_tensor(torch.zeros(5, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    state = torch.arange(3)[:, None, None] * 100 + torch.arange(2)[:, None] * 10 + torch.arange(4)
    return Columns.of(weight).gather(state + 1000 * torch.distributed.get_rank())


def declined() -> dict[str, dict[str, str]]:
    """What a sharded head says of each output that it was asked for."""
    tensors = problem(without=("x", "b", "ref_weight"))
    weight = distribute_tensor(tensors["weight"], init_device_mesh("cpu", (2,)), [Shard(0)])
    inputs = tensors["hidden"], weight, tensors["targets"]
    return {name: pu.linear_token_stats(*inputs, outputs=name).declined for name in ("logp", "topk")}


def sharded(_: Path) -> dict[str, Any]:
    cases = {name: whole(case(how, shard=True)) for name, how in CASES.items()}
    again = {name: whole(case(how, shard=True)) for name, how in CASES.items()}
    local = case(CASES["within"], shard=True)
    layouts = {name: str(local["d" + name].placements) for name in ("weight", "bias", "b")}
    results = {"cases": cases, "again": again, "layouts": layouts}
    return results | {"refusals": refusals(), "gathered": gathered(), "declined": declined()}
