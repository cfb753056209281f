"""What torch.compile and export see: the schema of every op, its fake, and its gradient where it has one.

Eager calls do not come by here: the dispatcher would cost more than some of the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import kernels
from .contract import SAVED, Options, statistics_dtype
from .from_logits import forward
from .ghost import dots_of
from .memory import empty
from .segment_dot import stacked_dots

DEVICES = ("cpu", "cuda")


# ---- token statistics ------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyunlearn::token_stats", mutates_args=(), device_types=DEVICES)
def token_stats(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    outputs: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(logits, targets, reference, Options.of(outputs, temperature, softcap, ignore_index, k), backend)


@token_stats.register_fake
def _(logits, targets, reference, outputs, temperature, softcap, ignore_index, k, backend):
    names = Options.of(outputs, temperature, softcap, ignore_index, k).outputs
    dtype = statistics_dtype(logits)
    rows, width = targets.numel(), k if "topk" in names else 0
    return (
        logits.new_empty((len(names), *targets.shape), dtype=dtype),
        logits.new_empty((SAVED, *targets.shape), dtype=dtype),
        logits.new_empty((rows, width), dtype=torch.int32),
        logits.new_empty((rows, width), dtype=dtype),
    )


@torch.library.custom_op("pyunlearn::token_stats_backward", mutates_args=(), device_types=DEVICES)
def token_stats_backward(
    grad_stats: Tensor,
    stats: Tensor,
    saved: Tensor,
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    index: Tensor,
    belief: Tensor,
    outputs: int,
    temperature: float,
    softcap: float,
    ignore_index: int,
    k: int,
    backend: str,
) -> Tensor:
    options = Options.of(outputs, temperature, softcap, ignore_index, k)
    out = empty(logits.shape, logits.dtype, logits.device)
    rest = (reference, index, belief, options, out)
    return kernels(backend).backward(grad_stats, stats, saved, logits, targets, *rest)


@token_stats_backward.register_fake
def _(grad_stats, stats, saved, logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, reference, *ctx.flat = inputs
    ctx.save_for_backward(logits, targets, reference, *output)


def differentiate(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets, reference, stats, saved, index, belief = ctx.saved_tensors
    tensors = (grad, stats, saved, logits, targets, reference, index, belief)
    return token_stats_backward(*tensors, *ctx.flat), *[None] * 8


token_stats.register_autograd(differentiate, setup_context=save)


# ---- inner products: none has a gradient -----------------------------------------------------------------------------


segment_dot = torch.library.custom_op("pyunlearn::segment_dot", stacked_dots, mutates_args=(), device_types=DEVICES)
ghost_dot = torch.library.custom_op("pyunlearn::ghost_dot", dots_of, mutates_args=(), device_types=DEVICES)


@segment_dot.register_fake
def _(a, b, backend):
    return a[0].new_empty((3, len(a)), dtype=torch.float64)


@ghost_dot.register_fake
def _(u_left, u_right, u_ends, *rest):
    return u_right.new_empty(u_right.size(0) if u_ends is None else u_ends.numel() - 1, dtype=torch.float64)
