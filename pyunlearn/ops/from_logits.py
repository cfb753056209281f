"""token_stats: per-token statistics of logits; one streaming read forward, one pass backward (3 N V of traffic)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._declined import decline
from .backends import choose, eager, kernels, why_eager
from .contract import (
    Options,
    TokenStats,
    check_logits,
    check_lowered,
    make_options,
    shares_memory,
    statistics_dtype,
    unpack,
)
from .first_order import first_order, owner, refuse_tangents
from .memory import empty

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def token_stats(
    logits: Tensor,
    targets: Tensor,
    outputs: str | Sequence[str] = ("logp",),
    reference: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    k: int = 20,
    backend: str | None = None,
    lowered: float | Tensor = 0.0,
) -> TokenStats:
    """Per-token statistics of `logits` at `targets`, differentiable in `logits` with any gradient per token.

    Args:
        logits: (..., V), bfloat16, float16, float32 or float64; the last dimension has stride 1. To leave padded
            vocabulary columns out, pass the slice `logits[..., :V]`: no copy is made.
        targets: (...) int64 or int32 token ids; `ignore_index` marks positions that are left out.
        outputs: names from `pyunlearn.ops.OUTPUTS`: logp, log_nll, entropy, variance, kl_pq, kl_qp, uniform_ce, lse,
            greedy, topk. `pyunlearn.ops.contract` has the formulas; all are in nats.
        reference: (..., V) logits of a frozen reference, for kl_pq and kl_qp, read in its own dtype; no gradient flows
            into it. Where its dtype is not that of logits, "cpu" and "cuda" read copies of both in float32 (in
            float64 for float64 logits).
        temperature, softcap: z = softcap * tanh(logits / softcap) / temperature, for the reference too.
        inplace_backward: backward writes d(logits) into the memory of `logits` (no second N V buffer). `logits` must
            not be used afterwards, and a second backward raises. Declined by the eager backend, under torch.compile and
            torch.func.
        k: size of the belief set of `topk`, 1 to 256 (bootstrapping's BS-T).
        backend: None (the fastest that is there), "cpu", "triton", "cuda" or "eager".
        lowered: a number, or (...) one a token, that the reference's z of the target is less by: kl_pq and kl_qp are to
            softmax(r - lowered [j = t]), for `undial`. Costs a copy of reference in float32.

    Returns:
        TokenStats: one attribute per output, each (...), float32 (float64 for float64 logits; greedy: bool), 0 at
        ignored positions; `.mask` (bool).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or option; the message names the argument.
        IndexError: a target outside [0, V) on the CPU (its row becomes NaN on a GPU, where looking would be a sync).
        RuntimeError: a backend that is not available here, a second backward after an in-place one, a second or a
            forward-mode derivative (the eager backend has both).

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> stats = token_stats(logits, torch.tensor([1, -100]), outputs=("logp", "entropy"))
    >>> stats.logp.tolist(), stats.mask.tolist()
    ([-1.3862943649291992, 0.0], [True, False])
    """
    options = make_options(outputs, temperature, softcap, ignore_index, k, reference is not None)
    check_logits(logits, targets, reference, options)
    less = check_lowered(lowered, targets, options, reference is not None)
    if inplace_backward:
        check_inplace(logits)
    chosen = choose(backend, logits.device)
    shape = targets.shape
    logits, targets, reference = in_rows(logits, targets, reference)
    less = less if less is None else less.reshape(targets.shape)
    stacked = stacked_stats(logits, targets, reference, options, chosen, inplace_backward, less)
    declined = why_eager(logits.device) if backend is None and chosen == "eager" else None
    owned = inplace_backward and owner("token_stats", chosen, logits, targets, reference)
    capped = less is not None and options.softcap is not None
    if inplace_backward and (chosen == "eager" or owned or capped):
        why = "with lowered= the softcap is autograd's" if capped else f"{owned} owns the memory"
        why = "backward is autograd's in the eager twin" if chosen == "eager" else why
        declined = {**(declined or {}), "in-place backward": decline("in-place backward", why)}
    mask = targets.view(shape) != ignore_index
    return unpack(stacked.view(len(options.outputs), *shape), options.outputs, mask, declined)


def in_rows(logits: Tensor, targets: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As kernels take them: two leading dimensions, which covers logits[:, :-1] without a copy, columns of stride 1."""
    if reference is not None and reference.stride(-1) != 1:
        reference = reference.contiguous()
    if logits.dim() > 3:
        logits, targets = logits.flatten(0, -3), targets.flatten(0, -2)
        reference = None if reference is None else reference.flatten(0, -3)
    return logits, targets, reference


def stacked_stats(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    options: Options,
    backend: str,
    inplace: bool = False,
    lowered: Tensor | None = None,
) -> Tensor:
    """(outputs, *targets.shape) by `backend`; arguments were checked."""
    if lowered is not None and reference is not None:
        logits, reference, options = lower(logits, targets, reference, options, lowered)
    if backend == "eager":
        return eager.token_stats(logits, targets, reference, options)
    if owner("token_stats", backend, logits, targets, reference):
        return torch.ops.pyunlearn.token_stats.default(logits, targets, reference, *options.flat(), backend)[0]
    refuse_tangents("token_stats", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return _TokenStats.apply(logits, targets, reference, options, backend, inplace)
    return forward(logits, targets, reference, options, backend)[0]


def lower(
    logits: Tensor, targets: Tensor, reference: Tensor, options: Options, lowered: Tensor
) -> tuple[Tensor, Tensor, Options]:
    """What kernels take for a reference whose z of the target is `lowered` less. A softcap comes before: no logit of
    the reference could make up for it afterwards."""
    wide = torch.promote_types(reference.dtype, statistics_dtype(logits))
    reference = reference.detach().to(wide)
    if (cap := options.softcap) is not None:
        logits = cap * torch.tanh(logits.to(statistics_dtype(logits)) / cap)
        reference, options = cap * torch.tanh(reference / cap), replace(options, softcap=None)
    index = targets.clamp(0, reference.size(-1) - 1).long().unsqueeze(-1)
    other = reference.gather(-1, index) - (options.temperature * lowered).to(wide).unsqueeze(-1)
    return logits, reference.scatter(-1, index, other), options


def check_inplace(logits: Tensor) -> None:
    if logits.requires_grad and not torch.is_grad_enabled():
        raise ValueError("inplace_backward=True: needs a backward, got no_grad; pass inplace_backward=False")
    check_writable("inplace_backward=True", logits)


def check_writable(asked: str, logits: Tensor) -> None:
    if shares_memory(logits):
        raise ValueError(f"{asked}: logits of strides {logits.stride()} share memory between rows")


def forward(logits: Tensor, targets: Tensor, reference: Tensor | None, options: Options, backend: str) -> Forward:
    """-> (stats, saved, index, belief); the last two hold the top-k lanes, (rows, k), or (rows, 0)."""
    module, vocabulary, n = kernels(backend), logits.size(-1), targets.numel()
    state = module.new_state(logits, n, vocabulary)
    module.accumulate(logits, targets, reference, state, options, 0, vocabulary, True)
    stats, saved = module.finish(state, targets, reference is not None, options, vocabulary)
    index, belief = module.topk(logits, targets, stats, saved, options)
    return stats, saved, index, belief


class _TokenStats(torch.autograd.Function):
    """Eager mode: no dispatcher between Python and the kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        reference: Tensor | None,
        options: Options,
        backend: str,
        inplace: bool,
    ) -> Tensor:
        stats, saved, index, belief = forward(logits, targets, reference, options, backend)
        ctx.save_for_backward(logits, targets, reference, stats, saved, index, belief)
        ctx.options, ctx.backend, ctx.inplace, ctx.consumed = options, backend, inplace, False
        return stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.consumed:
            raise RuntimeError(
                "token_stats: a second backward after inplace_backward=True: logits now hold their gradient"
            )
        logits, targets, reference, stats, saved, index, belief = ctx.saved_tensors
        out = logits.detach() if ctx.inplace else empty(logits.shape, logits.dtype, logits.device)
        rest = (reference, index, belief, ctx.options, out)
        kernels(ctx.backend).backward(grad, stats, saved, logits, targets, *rest)
        if ctx.inplace:
            ctx.consumed = True
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None
