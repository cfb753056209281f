"""Gradients of a model's trainable parameters, kept or streamed, while hooks and `p.grad` stay as they were found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distributed import is_sharded, local
from ..ops.parameters import canonical
from ..ops.segment_dot import segment_dot

Loss = Callable[[nn.Module], Tensor | Iterable[Tensor]]
Gradients = dict[str, Tensor]
WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}


@contextmanager
def probing(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The trainable parameters by name, without gradients; what `p.grad` held is back in place afterwards.

    Raises TypeError for wrappers that take hold of gradients themselves, ValueError for nothing to differentiate or
    parameters whose post-accumulate-grad hooks a probe would set off.
    """
    if type(model).__name__ in WRAPPERS:
        raise TypeError(
            f"model: is a {type(model).__name__}, which takes gradients over; pass the module inside (.module), plain "
            "or sharded by torch.distributed.fsdp.fully_shard"
        )
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # FSDP2: a forward without backward leaves whole parameters
            module.reshard()  # type: ignore[operator]
    parameters = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: has no trainable parameter (requires_grad)")
    for name, p in parameters.items():
        if p._post_accumulate_grad_hooks:
            raise ValueError(
                f"model: {name!r} has a post-accumulate-grad hook (an optimiser that steps in the backward?), which a "
                "probe would set off; remove it first"
            )
    before = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        yield parameters
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


def backwards(what: str, loss: Loss, model: nn.Module) -> Iterator[None]:
    """Runs `loss` and its backward, one micro-batch at a time."""
    with torch.enable_grad():
        result = loss(model)
        if not isinstance(result, Tensor | Iterable):
            raise TypeError(
                f"{what}: needs to return a scalar tensor or micro-batches of them, got {type(result).__name__}"
            )
        for value in (result,) if isinstance(result, Tensor) else result:
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{what}: needs scalar losses, got {got}")
            if not value.requires_grad:
                raise ValueError(f"{what}: its loss depends on no trainable parameter (no graph)")
            value.backward()
            yield


def accumulate_gradient(
    what: str, loss: Loss, model: nn.Module, parameters: dict[str, nn.Parameter], ema: float | None
) -> Gradients:
    """The gradient of the sum of the micro-batches, or their exponential average, by name (this rank's part).

    Parameters that the loss does not reach are left out. Raises ValueError where it reaches none.
    """
    gradients: Gradients = {}
    for _ in backwards(what, loss, model):
        if ema is None:
            continue  # p.grad adds up
        for name, gradient in take_gradients(parameters).items():
            if name in gradients:
                gradients[name].mul_(ema).add_(gradient, alpha=1 - ema)
            else:
                gradients[name] = gradient
    gradients = gradients if ema is not None else take_gradients(parameters)
    if not gradients:
        raise ValueError(f"{what}: its loss reaches no trainable parameter of this model")
    return gradients


def take_gradients(parameters: dict[str, nn.Parameter]) -> Gradients:
    """What `p.grad` holds by now (this rank's part), which is None afterwards."""
    gradients = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return gradients


@contextmanager
def streamed(parameters: dict[str, nn.Parameter], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `take` gets every gradient as it completes, which is then dropped: one layer's at a time is alive.

    Under reentrant checkpointing, or with micro-batches, a parameter's gradient comes in parts that add up.
    """
    name_of = {id(p): name for name, p in parameters.items()}

    def hook(p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        if gradient is not None:
            take(name_of[id(p)], local(gradient))

    handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def summed(values: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    """Each parameter's sums over its shards: all ranks' parts added, by one all-reduce a mesh dimension."""
    shards: dict[tuple, list[str]] = {}
    for name, p in parameters.items():
        if name in values:
            shards.setdefault(sharding(name, p), []).append(name)
    result: dict[str, list[float]] = {}
    for (mesh, *dimensions), names in shards.items():
        stacked = torch.stack([values[name].to(values[names[0]].device) for name in names])
        for dimension in dimensions:
            torch.distributed.all_reduce(stacked, group=mesh.get_group(dimension))
        result.update(zip(names, stacked.tolist(), strict=True))
    return result


def sharding(name: str, p: Tensor) -> tuple:
    """(device mesh, its dimensions that shard the parameter), or (None,)."""
    if not is_sharded(p):
        return (None,)
    placements = p.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"model: {name!r} is a sum over ranks ({placements}), needs shards or replicas")
    return p.device_mesh, *(i for i, placement in enumerate(placements) if placement.is_shard())  # type: ignore[attr-defined]


def squared_norms(gradients: Gradients, backend: str | None) -> dict[str, Tensor]:
    """<g, g> by name, 0-d float64: one launch a device."""
    by_device: dict[torch.device, list[str]] = {}
    for name, gradient in gradients.items():
        by_device.setdefault(gradient.device, []).append(name)
    squares: dict[str, Tensor] = {}
    for names in by_device.values():
        pairs = [(gradients[name], gradients[name]) for name in names]
        squares.update(zip(names, segment_dot(pairs, backend).dot, strict=True))
    return squares


def check_gradient(what: str, gradient: Gradients, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError unless `gradient` has tensors (this rank's part) for trainable ones of `parameters`."""
    if not gradient:
        raise ValueError(f"{what}: is empty, needs one tensor or more")
    for name, tensor in gradient.items():
        if name not in parameters:
            raise ValueError(f"{what}: the model has no parameter {name!r}")
        if not parameters[name].requires_grad:
            raise ValueError(f"{what}: {name!r} does not require grad")
        if tensor.shape != (needed := local(parameters[name]).shape):
            raise ValueError(f"{what}[{name!r}]: needs shape {tuple(needed)}, got {tuple(tensor.shape)}")


def check_finite(what: str, squares: dict[str, float]) -> None:
    """Raises ArithmeticError that names the first parameter whose gradient is not finite."""
    for name, square in squares.items():
        if not abs(square) < float("inf"):
            raise ArithmeticError(f"{what}: the gradient of {name!r} is not finite")


def scalars(values: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """0-d sums over this rank's part as numbers, over all parts."""
    return {name: row[0] for name, row in summed({n: v.view(1) for n, v in values.items()}, parameters).items()}
