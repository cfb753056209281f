"""The way through the head that holds at most a budget of logits, forward and backward.

Within the budget the logits are made once (3 GEMMs forward + backward) and backward turns their buffer into d(logits).
Beyond it the vocabulary goes by in slices that are made again in backward (4 GEMMs), with extra memory for one slice
and one (N, H) sum whatever V is; what needs whole rows (top k, the eager twin) goes by in blocks of rows instead.

A gradient that comes from one tile of d(logits) is one GEMM, rounded once to its dtype: dX within the budget, dW of a
slice. One that several tiles or ranks add to is summed in float32, products included, and rounded at the end: dX over
slices and ranks, dW over blocks of rows.

Where statistics cancel (KL, entropy, variance) the logits of 16-bit factors stay in float32, as their GEMM sums them,
and so does d(logits) on a CPU: rounded first, a KL of nearby models would have a gradient 1 to 20 % off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._declined import decline
from .backends import kernels
from .contract import NEEDS_REFERENCE, NO_INDEX, Options, statistics_dtype
from .first_order import first_order, in_functions, refuse_tangents
from .from_logits import stacked_stats
from .memory import budget_of, empty
from .products import FLOAT32_PRODUCTS, product, slices
from .sharded import Columns

NARROWEST = 256  # columns of a slice
CANCEL = frozenset({"entropy", "variance"}) | NEEDS_REFERENCE  # outputs whose sums of logits nearly cancel
CACHED = 2 << 20  # bytes of logits that stay in a CPU's cache
ALL = slice(None)
BEYOND_BUDGET = "they exceed the budget: slices of the vocabulary, or blocks of rows, are made again in backward"


@dataclass(frozen=True)
class Projection:
    """Rows and the head they meet: logits = sum of inputs[i] @ weights[i].T, + bias. A second pair is an adapter's."""

    inputs: tuple[Tensor, ...]  # (N, H), (N, r)
    weights: tuple[Tensor, ...]  # (V, H), (V, r)
    bias: Tensor | None = None  # (V,)

    @staticmethod
    def of(bias: Tensor | None, *factors: Tensor) -> Projection:
        half = len(factors) // 2
        return Projection(factors[:half], factors[half:], bias)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.bias, *self.inputs, *self.weights

    def detach(self) -> Projection:
        bias = None if self.bias is None else self.bias.detach()
        return Projection.of(bias, *(tensor.detach() for tensor in self.inputs + self.weights))

    def rows(self, rows: Any) -> Projection:
        return Projection(tuple(x[rows] for x in self.inputs), self.weights, self.bias)

    def dtype(self, options: Options) -> torch.dtype:
        """Of the logits that a call's statistics are made of."""
        own = self.inputs[0].dtype
        return own if CANCEL.isdisjoint(options.outputs) else torch.promote_types(own, torch.float32)

    def logits(self, columns: slice, dtype: torch.dtype) -> Tensor:
        if dtype != self.inputs[0].dtype:
            return self.wide_logits(columns, dtype)
        bias = None if self.bias is None else self.bias[columns]
        first, weight = self.inputs[0], self.weights[0][columns]
        if first.is_cuda or torch.is_grad_enabled() or in_functions("linear_token_stats", "eager"):
            logits = F.linear(first, weight, bias)
        else:
            logits = empty((first.size(0), weight.size(0)), dtype, first.device)
            if bias is None:
                torch.mm(first, weight.t(), out=logits)
            else:
                torch.addmm(bias, first, weight.t(), out=logits)
        for x, weight in zip(self.inputs[1:], self.weights[1:], strict=True):
            logits = logits.addmm_(x, weight[columns].t())
        return logits

    def wide_logits(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """Nothing is rounded to the factors' 16 bits. A CPU widens the head by blocks of rows."""
        weights = [weight[columns] for weight in self.weights]
        bias = None if self.bias is None else self.bias[columns].to(dtype)
        with torch.autocast(weights[0].device.type, enabled=False):
            if torch.is_grad_enabled() or in_functions("linear_token_stats", "eager"):  # they, or torch.compile, follow
                logits = F.linear(self.inputs[0].to(dtype), weights[0].to(dtype), bias)
                for x, weight in zip(self.inputs[1:], weights[1:], strict=True):
                    logits = logits + x.to(dtype) @ weight.to(dtype).t()
                return logits
            logits = empty((self.inputs[0].size(0), weights[0].size(0)), dtype, weights[0].device)
            whole = logits.is_cuda and FLOAT32_PRODUCTS
            for part in slices(logits.size(1), logits.size(1) if whole else NARROWEST):
                block = logits[:, part]
                for i, (x, weight) in enumerate(zip(self.inputs, weights, strict=True)):
                    product(x, weight[part].t(), block, add=i > 0)
                if bias is not None:
                    block += bias[part]
            return logits


def both_logits(
    head: Projection, reference: Projection | None, columns: slice, options: Options
) -> tuple[Tensor, Tensor | None]:
    logits = head.logits(columns, head.dtype(options))
    return logits, None if reference is None else reference.logits(columns, reference.dtype(options))


def lower_(reference: Tensor, targets: Tensor, lowered: Tensor, options: Options, first: int) -> None:
    """Lowers z of the targets, in place: in their logits, (N, width) from column `first` on, without a softcap."""
    at = targets - first
    inside = (at >= 0) & (at < reference.size(1))
    index = torch.where(inside, at, 0).long().unsqueeze(1)
    less = torch.where(inside, options.temperature * lowered, 0.0).to(reference.dtype).unsqueeze(1)
    reference.scatter_(1, index, reference.gather(1, index) - less)


def stats_in_budget(
    head: Projection,
    targets: Tensor,
    reference: Projection | None,
    options: Options,
    budget: int | None,
    backend: str,
    here: Columns,
    lowered: Tensor | None = None,
) -> tuple[Tensor, dict[str, str]]:
    """Stacked statistics (outputs, N), by the cheapest way that holds at most `budget` bytes of logits; and why they
    are not held whole, where they would be by default or within a larger budget."""
    n, width = targets.numel(), head.weights[0].size(0)
    streams = False
    if budget is None:
        graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in head.tensors)
        # A CPU writes logits to memory, pages it never touched, only where backward or top k reads them again.
        streams = targets.device.type == "cpu" and not graph and "topk" not in options.outputs
        budget = CACHED if streams else budget_of(targets.device)
    column_bytes = n * sum(p.dtype(options).itemsize for p in (head, reference) if p is not None)
    fits = column_bytes * width <= budget
    declined = {} if fits or streams else {"kept logits": decline("kept logits", BEYOND_BUDGET)}
    capped = lowered is not None and options.softcap is not None
    if backend != "eager" and not capped and (fits or "topk" not in options.outputs):
        if not fits:
            width = min(width, max(NARROWEST, budget // column_bytes // 64 * 64))
        refuse_tangents("linear_token_stats", *head.tensors)
        stats = _ByColumns.apply(targets, reference, options, backend, here, width, fits, lowered, *head.tensors)
        return stats, declined
    if fits:
        logits, ref_logits = both_logits(head, reference, ALL, options)
        return stacked_stats(logits, targets, ref_logits, options, backend, lowered=lowered), declined
    height = max(1, budget // (column_bytes // n * width))
    refuse_tangents("linear_token_stats", *head.tensors)
    return _ByRows.apply(targets, reference, options, backend, height, lowered, *head.tensors), declined


class _ByColumns(torch.autograd.Function):
    """Streaming statistics, `width` columns at a time; the logits stay for backward (`keep`) when that is all."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        reference: Projection | None,
        options: Options,
        backend: str,
        here: Columns,
        width: int,
        keep: bool,
        lowered: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        head, module = Projection.of(*tensors), kernels(backend)
        # every rank's state needs as many parts, and a backend may make that depend on the columns
        state = module.new_state(head.inputs[0], targets.numel(), width if here.group is None else here.most)
        logits = ref_logits = index = belief = None
        for columns in slices(head.weights[0].size(0), width):
            del logits, ref_logits  # one slice at a time
            logits, ref_logits = both_logits(head, reference, columns, options)
            if lowered is not None and ref_logits is not None:
                lower_(ref_logits, targets, lowered, options, here.first + columns.start)
            rest = (here.first + columns.start, here.vocabulary, columns.start == 0)
            module.accumulate(logits, targets, ref_logits, state, options, *rest)
        stats, saved = module.finish(here.gather(state), targets, reference is not None, options, here.vocabulary)
        if "topk" in options.outputs:
            index, belief = module.topk(logits, targets, stats, saved, options)
        kept = (None,) * 3 if reference is None else reference.tensors
        ctx.save_for_backward(targets, stats, saved, index, belief, lowered, *kept, *tensors)
        ctx.has_reference, ctx.options, ctx.backend, ctx.here = reference is not None, options, backend, here
        ctx.width, ctx.keep = width, keep
        ctx.logits = (logits, ref_logits) if keep and any(ctx.needs_input_grad) else None
        return stats

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, stats, saved, index, belief, lowered, bias, ref_x, ref_w, *tensors = ctx.saved_tensors
        head, here = Projection.of(*tensors), ctx.here
        reference = Projection.of(bias, ref_x, ref_w) if ctx.has_reference else None
        if ctx.keep and ctx.logits is None:
            raise RuntimeError(
                "linear_token_stats: a second backward: the logits were turned into their gradient; pass budget_bytes=0"
            )
        whole, ctx.logits = ctx.logits, None  # the buffer becomes d(logits) and is gone with this call

        # Rows of weight 0 meet no GEMM: always where logits are made again, else where copying the others pays, and
        # never at the price of a sync for a GPU that has its logits already, or whose caller looks for no position.
        rows, n = None, grad.size(1)
        if not (grad.is_cuda and (ctx.keep or ctx.options.ignore_index == NO_INDEX)):
            rows = grad.ne(0).any(0).nonzero().squeeze(-1)
            rows = rows if rows.numel() <= (n // 2 if ctx.keep else n - 1) else None
        if rows is not None:
            head = head.rows(rows)
            if not ctx.keep:
                grad, stats, saved, targets = grad[:, rows], stats[:, rows], saved[:, rows], targets[rows]
                reference = reference and reference.rows(rows)
                lowered = lowered if lowered is None else lowered[rows]
        parts = slices(head.weights[0].size(0), ctx.width)
        several = len(parts) > 1 or here.group is not None
        sums = Gradients(head, ctx.needs_input_grad[8:], several_columns=several)
        with torch.autocast(grad.device.type, enabled=False):
            for columns in parts:
                logits, ref_logits = whole or both_logits(head, reference, columns, ctx.options)
                if lowered is not None and ref_logits is not None and whole is None:
                    lower_(ref_logits, targets, lowered, ctx.options, here.first + columns.start)
                rest = (targets, ref_logits, index, belief, ctx.options, logits, here.first + columns.start)
                d = kernels(ctx.backend).backward(grad, stats, saved, logits, *rest, here.vocabulary)
                sums.add(d[rows] if ctx.keep and rows is not None else d, columns=columns)
                del logits, ref_logits, rest, d  # one slice at a time
            return *[None] * 8, *sums.results(here, rows, n)


class _ByRows(torch.autograd.Function):
    """Whole rows of logits, `height` at a time, made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        reference: Projection | None,
        options: Options,
        backend: str,
        height: int,
        lowered: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        kept = (None,) * 3 if reference is None else reference.tensors
        ctx.save_for_backward(targets, lowered, *kept, *tensors)
        ctx.has_reference, ctx.options, ctx.backend, ctx.height = reference is not None, options, backend, height
        head, stats = Projection.of(*tensors), []
        for rows in slices(targets.numel(), height):
            logits, ref_logits = both_logits(head.rows(rows), reference and reference.rows(rows), ALL, options)
            less = lowered if lowered is None else lowered[rows]
            stats.append(stacked_stats(logits, targets[rows], ref_logits, options, backend, lowered=less))
        return torch.cat(stats, dim=1)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, lowered, bias, ref_x, ref_w, *tensors = ctx.saved_tensors
        head = Projection.of(*tensors)
        reference = Projection.of(bias, ref_x, ref_w) if ctx.has_reference else None
        sums = Gradients(head, ctx.needs_input_grad[6:], several_rows=True)
        with torch.autocast(grad.device.type, enabled=False):
            for rows in slices(targets.numel(), ctx.height):
                logits, ref_logits = both_logits(head.rows(rows), reference and reference.rows(rows), ALL, ctx.options)
                logits.requires_grad_()
                less = lowered if lowered is None else lowered[rows]
                rest = (ref_logits, ctx.options, ctx.backend)
                with torch.enable_grad():
                    stats = stacked_stats(logits, targets[rows], *rest, inplace=True, lowered=less)
                (d,) = torch.autograd.grad(stats, logits, grad[:, rows])
                sums.add(d, rows=rows)
                del logits, ref_logits, rest, stats, d  # one block at a time
            return *[None] * 6, *sums.results(Columns.all(0))


class Gradients:
    """d(bias), d(inputs), d(weights) of a projection from d(logits), tile by tile.

    What several tiles add to is summed in the statistics' dtype; the rest is written by the one GEMM that makes it.
    """

    def __init__(
        self, head: Projection, wanted: Sequence[bool], several_columns: bool = False, several_rows: bool = False
    ):
        self.head, self.several_columns, self.several_rows = head, several_columns, several_rows
        wide = statistics_dtype(head.inputs[0])
        several = (True, *[several_columns] * len(head.inputs), *[several_rows] * len(head.weights))
        self.sums = [
            None if not want or t is None else torch.zeros_like(t, dtype=wide) if add else torch.empty_like(t)
            for t, want, add in zip(head.tensors, wanted, several, strict=True)
        ]

    def add(self, d: Tensor, rows: slice = ALL, columns: slice = ALL) -> None:
        """d: d(logits) of these rows and columns."""
        half = len(self.head.inputs) + 1
        d_bias, d_inputs, d_weights = self.sums[0], self.sums[1:half], self.sums[half:]
        if d_bias is not None:
            d_bias[columns] += d.sum(0, dtype=d_bias.dtype)
        if d.is_cuda:  # tensor cores take it rounded
            d = d.to(self.head.inputs[0].dtype)
        for x, weight, d_x, d_weight in zip(self.head.inputs, self.head.weights, d_inputs, d_weights, strict=True):
            if d_x is not None:
                product(d, weight[columns], d_x[rows], self.several_columns)
            if d_weight is not None:
                product(d.t(), x[rows], d_weight[columns], self.several_rows)

    def results(self, here: Columns, rows: Tensor | None = None, n: int = 0) -> list[Tensor | None]:
        """In the order and the dtypes of `Projection.tensors`; `rows`: those of the n that were added."""
        for i in range(1, len(self.head.inputs) + 1):
            d_x = self.sums[i]
            if d_x is not None and rows is not None:
                d_x = d_x.new_zeros(n, d_x.size(1)).index_copy_(0, rows, d_x)
            self.sums[i] = d_x if d_x is None else here.sum(d_x)
        return [
            d if d is None or t is None else d.to(t.dtype) for t, d in zip(self.head.tensors, self.sums, strict=True)
        ]
