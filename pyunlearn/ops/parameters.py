"""The parameters of a module as memory: canonical names, tied ones once, and which elements of a shard lie where."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import is_sharded, local
from .contract import check_dtype
from .pieces import Piece, parameter_id


@dataclass
class Weight:
    """One parameter: its memory on this rank, and which elements of the whole it holds, as runs (`noise.Piece`)."""

    name: str
    parameters: list[nn.Parameter]  # all that share this memory
    local: Tensor
    starts: Tensor
    length: int
    sharded: bool

    def piece(self, source: Tensor, target: Tensor) -> Piece:
        return Piece(source, target, parameter_id(self.name), self.starts, self.length)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def canonical(name: str) -> str:
    """A parameter's name without what wrappers of inner modules put into it."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def weights_of(model: nn.Module, names: Collection[str] | None) -> list[Weight]:
    """The parameters to perturb, tied ones once, in the model's order. Raises TypeError or ValueError."""
    if isinstance(names, str):
        raise TypeError(f"parameters={names!r}: needs a collection of names")
    held: dict[tuple, Weight] = {}  # by memory
    known, wanted = set(), set()
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical(raw)
        if "_fsdp_wrapped_module" in raw.split("."):
            raise TypeError(
                f"{raw}: needs FSDP2 (fully_shard); FSDP1 keeps parameters flat, without their elements' places"
            )
        known.add(name)
        if parameter.is_meta:
            raise ValueError(f"{name}: needs loaded weights, is on the meta device")
        memory, starts, length = local_runs(name, parameter)
        place = (memory.device, memory.data_ptr(), memory.dtype, memory.shape, memory.stride())
        key = place if memory.numel() else (id(parameter),)
        weight = held.setdefault(key, Weight(name, [], memory, starts, length, is_sharded(parameter)))
        if not any(parameter is other for other in weight.parameters):
            weight.parameters.append(parameter)
        if names is None or name in names:
            wanted.add(weight.name)
    if names is not None and not known.issuperset(names):
        raise ValueError(f"parameters: the model has none of the name {sorted(set(names) - known)[0]!r}")
    weights = [weight for weight in held.values() if weight.name in wanted]
    check_ids(weights)
    return weights


def check_ids(weights: Sequence[Weight]) -> None:
    """Raises TypeError for a dtype that has no noise, ValueError for two names with one 32-bit id."""
    names: dict[int, str] = {}
    for weight in weights:
        check_dtype(weight.name, weight.local)
        other = names.setdefault(parameter_id(weight.name), weight.name)
        if other != weight.name:
            raise ValueError(
                f"parameters {other!r} and {weight.name!r}: their names have one 32-bit id, they would get the same "
                "noise; rename one or leave it out by parameters="
            )


def local_runs(name: str, parameter: nn.Parameter) -> tuple[Tensor, Tensor, int]:
    """(this rank's memory, its runs' first elements in the whole parameter, their length)."""
    if not is_sharded(parameter):
        return parameter.data, torch.tensor([0]), parameter.numel()
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(parameter, DTensor)
    if any(placement.is_partial() for placement in parameter.placements):
        raise ValueError(f"{name}: is a sum over ranks ({parameter.placements}), needs shards or replicas")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    with torch.no_grad():
        memory = local(parameter).detach()
    if memory.numel() == 0:
        return memory, torch.tensor([], dtype=torch.int64), 0
    return memory, *runs(parameter.shape, shape, offset)


def runs(whole: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> tuple[Tensor, int]:
    """The box `shape` at `offset` of a row-major tensor `whole` as runs: (first elements, length)."""
    stride = [math.prod(whole[d + 1 :]) for d in range(len(whole))]
    split = max((d for d in range(len(whole)) if shape[d] != whole[d]), default=0)  # from here on runs are unbroken
    starts = torch.tensor([sum(o * s for o, s in zip(offset, stride, strict=True))])
    for d in range(split):
        starts = (starts[:, None] + torch.arange(shape[d]) * stride[d]).flatten()
    return starts, math.prod(shape[split:])


def changed(weights: Sequence[Weight]) -> None:
    """Lets autograd know: what it saved of these parameters is not what they hold now."""
    for weight in weights:
        for parameter in weight.parameters:
            if not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)


def point(shown: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Each parameter to this memory."""
    for parameter, memory in shown:
        parameter.data = memory
