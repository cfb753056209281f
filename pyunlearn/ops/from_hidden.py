"""linear_token_stats: the same statistics from hidden states and the head, without holding more logits than a budget.

Within the budget the logits are made once (3 GEMMs forward + backward) and backward turns their buffer into d(logits).
Beyond it the vocabulary goes by in slices that are made again in backward (4 GEMMs): every slice of dW is written once,
only an (N, H) dX accumulates, and the extra memory is N * slice whatever V is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .backends import choose, kernels
from .contract import (
    Options,
    TokenStats,
    check_dtype,
    check_range,
    check_same_device,
    check_targets,
    make_options,
    unpack,
)
from .from_logits import stacked_stats

Head = tuple[Tensor, ...]  # (hidden, weight) or (hidden, weight, bias) of the reference


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    outputs: str | Sequence[str] = ("logp",),
    reference: Head | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    budget_bytes: int | None = None,
    k: int = 20,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of the logits `hidden @ weight.T + bias` at `targets`, differentiable in hidden, weight and bias.

    Args:
        hidden: (..., H) last hidden states. Rows whose target is `ignore_index` never reach the head.
        weight: (V, H), the head; same dtype as hidden (autocast casts both). A frozen head costs no dW.
        targets: (...) int64 or int32.
        bias: (V,) or None.
        outputs, temperature, softcap, ignore_index, k, backend: as in `token_stats`.
        reference: (ref_hidden (..., H_ref), ref_weight (V, H_ref)) or with a bias (V,) as a third entry.
        budget_bytes: logits (the reference's included) that may be held at once; default a quarter of the free memory
            of the device. Beyond it: slices of the vocabulary, recomputed in backward. A slice is never narrower than
            256 columns. Under torch.compile the budget is not looked at.

    Returns:
        TokenStats, as `token_stats`.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; the message names the argument.
        RuntimeError: a second backward within the budget (the logits became their gradient; budget_bytes=0 allows it).

    >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8, requires_grad=True)
    >>> linear_token_stats(hidden, weight, torch.tensor([0, 4, -100])).logp.exp()
    tensor([0.2000, 0.2000, 1.0000], grad_fn=<ExpBackward0>)
    """
    options = make_options(outputs, temperature, softcap, ignore_index, k, reference is not None)
    check_head(hidden, weight, bias, "hidden", "weight", "bias")
    check_targets(targets, hidden.shape[:-1], "hidden", hidden)
    if reference is not None:
        check_reference(reference, hidden, weight)
    if "topk" in options.outputs and k > weight.size(0):
        raise ValueError(f"k={k}: needs at most V={weight.size(0)}")
    chosen = choose(backend, hidden.device)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = autocast(hidden), autocast(weight), autocast(bias)
        reference = None if reference is None else tuple(autocast(tensor) for tensor in reference)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"weight: needs the dtype of hidden, {hidden.dtype}, got {weight.dtype}")

    mask = targets != ignore_index
    if torch.compiler.is_compiling():  # no data-dependent shapes: the compiler sees two ops
        ref_logits = None if reference is None else F.linear(*reference).detach()
        stacked = stacked_stats(F.linear(hidden, weight, bias), targets, ref_logits, options, chosen)
        return unpack(stacked, options.outputs, mask)

    flat, rows = targets.flatten(), mask.flatten().nonzero().squeeze(-1)
    if hidden.device.type == "cpu":
        check_range(flat, weight.size(0), ignore_index)
    hidden = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden.unsqueeze(0)
    frozen = None
    if reference is not None:
        rows_of = reference[0].detach()
        rows_of = rows_of.flatten(0, -2) if rows_of.dim() > 1 else rows_of.unsqueeze(0)
        frozen = Frozen(rows_of, *(tensor.detach() for tensor in reference[1:]))
    everything = rows.numel() == flat.numel()
    if not everything:
        hidden, flat = hidden[rows], flat[rows]
        frozen = None if frozen is None else frozen.rows(rows)
    stacked = in_budget(hidden, weight, bias, flat, frozen, options, budget_bytes, chosen)
    if not everything:
        stacked = stacked.new_zeros(len(options.outputs), targets.numel()).index_copy(1, rows, stacked)
    return unpack(stacked.view(len(options.outputs), *targets.shape), options.outputs, mask)


@dataclass(frozen=True)
class Frozen:
    """The reference's side of the rows: logits = hidden @ weight.T + bias, no gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, columns: slice = slice(None)) -> Tensor:
        bias = None if self.bias is None else self.bias[columns]
        return F.linear(self.hidden, self.weight[columns], bias)

    def rows(self, rows: Any) -> Frozen:
        return Frozen(self.hidden[rows], self.weight, self.bias)


def in_budget(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frozen: Frozen | None,
    options: Options,
    budget: int | None,
    chosen: str,
) -> Tensor:
    """Stacked statistics of rows that all count, by the cheapest way that holds at most `budget` bytes of logits."""
    n, vocabulary = hidden.size(0), weight.size(0)
    budget = free_bytes(hidden.device) // 4 if budget is None else budget
    column_bytes = n * hidden.element_size() * (1 if frozen is None else 2)
    fits = column_bytes * vocabulary <= budget
    if chosen != "eager" and (fits or "topk" not in options.outputs):
        width = vocabulary if fits else min(vocabulary, max(256, budget // column_bytes // 64 * 64))
        return _LinearTokenStats.apply(hidden, weight, bias, targets, frozen, options, chosen, width, fits)

    def block(part: slice) -> Tensor:
        logits = F.linear(hidden[part], weight, bias)
        ref_logits = None if frozen is None else frozen.rows(part).logits()
        return stacked_stats(logits, targets[part], ref_logits, options, chosen)

    if fits:
        return block(slice(None))
    # No streaming state across columns here (eager twin, top k): whole rows by blocks, made again in backward.
    height = max(1, budget // max(1, column_bytes // max(1, n) * vocabulary))
    parts = [slice(i, i + height) for i in range(0, n, height)]
    return torch.cat([checkpoint(block, part, use_reentrant=False) for part in parts], dim=1)


class _LinearTokenStats(torch.autograd.Function):
    """The fused path; `width` columns at a time, kept for backward when that is the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        frozen: Frozen | None,
        options: Options,
        backend: str,
        width: int,
        keep: bool,
    ) -> Tensor:
        module, vocabulary = kernels(backend), weight.size(0)
        state = module.new_state(hidden, hidden.size(0), width)
        logits, ref_logits = hidden.new_empty(0), None
        for columns in slices(vocabulary, width):
            del logits, ref_logits  # one slice at a time
            logits, ref_logits = both_logits(hidden, weight, bias, frozen, columns)
            first = columns.start
            module.accumulate(logits, targets, ref_logits, state, options, first, vocabulary, first == 0)
        stats, saved = module.finish(state, targets, frozen is not None, options, vocabulary)
        index = belief = None
        if "topk" in options.outputs:
            index, belief = module.topk(logits, targets, stats, saved, options)
        ctx.save_for_backward(hidden, weight, bias, targets, stats, saved, index, belief)
        ctx.frozen, ctx.options, ctx.backend, ctx.width, ctx.keep = frozen, options, backend, width, keep
        ctx.logits = (logits, ref_logits) if keep and any(ctx.needs_input_grad[:3]) else None
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, stats, saved, index, belief = ctx.saved_tensors
        frozen, options, vocabulary = ctx.frozen, ctx.options, weight.size(0)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        if ctx.keep and ctx.logits is None:
            raise RuntimeError(
                "linear_token_stats: a second backward: the logits were turned into their gradient; pass budget_bytes=0"
            )
        held, ctx.logits = ctx.logits, None  # the buffer becomes d(logits) and is gone with this call

        # Tokens of weight 0 are dropped before the GEMMs: always when logits are made again, else where it pays.
        rows = (grad != 0).any(0).nonzero().squeeze(-1)
        share = rows.numel() / max(1, grad.size(1))
        drop = share < 1 if held is None else share <= 0.5
        if drop and held is None:
            grad, stats, saved, targets = grad[:, rows], stats[:, rows], saved[:, rows], targets[rows]
            frozen = None if frozen is None else frozen.rows(rows)
        used = hidden[rows] if drop else hidden
        # summed over slices in the statistics' dtype: float32 for half precision
        d_used = used.new_zeros(used.shape, dtype=stats.dtype) if want_hidden else None
        d_weight = torch.empty_like(weight) if want_weight else None
        d_bias = torch.empty_like(bias) if want_bias else None
        for columns in slices(vocabulary, ctx.width):
            logits, ref_logits = held or both_logits(used, weight, bias, frozen, columns)
            rest = (targets, ref_logits, index, belief, options)
            d = kernels(ctx.backend).backward(grad, stats, saved, logits, *rest, logits, columns.start, vocabulary)
            if drop and held is not None:
                d = d[rows]
            if d_used is not None and d.dtype == d_used.dtype:
                d_used.addmm_(d, weight[columns])
            elif d_used is not None:
                d_used += d @ weight[columns]
            if d_weight is not None:
                torch.mm(d.t(), used, out=d_weight[columns])
            if d_bias is not None:
                torch.sum(d, 0, out=d_bias[columns])
            del logits, ref_logits, rest, d
        d_hidden = None if d_used is None else d_used.to(hidden.dtype)
        if drop and d_hidden is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden)
        return d_hidden, d_weight, d_bias, *[None] * 6


def slices(vocabulary: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, vocabulary)) for i in range(0, vocabulary, width)]


def both_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen | None, columns: slice
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight[columns], None if bias is None else bias[columns])
    return logits, None if frozen is None else frozen.logits(columns)


def autocast(tensor: Any) -> Any:
    return None if tensor is None else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *names: str) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.size(-1) != weight.size(1):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{names[0]}, {names[1]}: need shapes (..., H) and (V, H), got {shapes}")
    for name, tensor in zip(names, (hidden, weight, bias), strict=True):
        if tensor is not None:
            check_dtype(name, tensor)
            check_same_device(name, tensor, names[0], hidden)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names[2]}: needs shape ({weight.size(0)},), got {tuple(bias.shape)}")


def check_reference(reference: Head, hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(reference, tuple) or len(reference) not in (2, 3):
        raise TypeError(
            f"reference: needs a tuple (ref_hidden, ref_weight) or with a ref_bias, got {type(reference).__name__}"
        )
    ref_hidden, ref_weight = reference[:2]
    ref_bias = reference[2] if len(reference) == 3 else None
    check_head(ref_hidden, ref_weight, ref_bias, "reference[0]", "reference[1]", "reference[2]")
    check_same_device("reference[0]", ref_hidden, "hidden", hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_weight.size(0) != weight.size(0):
        raise ValueError(
            f"reference: needs hidden states for the rows of hidden {tuple(hidden.shape[:-1])} and a head of "
            f"V={weight.size(0)}, got {tuple(ref_hidden.shape)} and {tuple(ref_weight.shape)}"
        )
    if ref_hidden.dtype != ref_weight.dtype:
        raise TypeError(f"reference[1]: needs the dtype of reference[0], {ref_hidden.dtype}, got {ref_weight.dtype}")
