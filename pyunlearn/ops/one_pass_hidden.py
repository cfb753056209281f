"""linear_value_and_grad: statistics from hidden states and the gradients of a loss whose gradient per token is known.

Rows of logits go by a block at a time, as many as the budget lets be there: `value_and_grad` turns a block into its
d(logits) in place, and two GEMMs take that up. No logits are kept and none are made twice: 3 GEMMs whatever the
budget, where `linear_token_stats` and its backward need 4 beyond it, and 2 N V of traffic where they need 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._declined import decline
from ..distributed import is_sharded
from .backends import choose, why_eager
from .contract import NO_INDEX, TokenRule, TokenStats, check_range, make_options, statistics_dtype, unpack
from .first_order import in_functions, refuse_tangents
from .from_hidden import Reference, check_call, projection_here, reference_here
from .memory import budget_of
from .one_pass import FACTOR_ONE, at_once, by_name, check_weights, per_token, wanted
from .products import slices
from .projection import ALL, Gradients, both_logits
from .sharded import Columns

SHORTEST = 64  # rows of a block: fewer make no GEMM


class LinearGradients(NamedTuple):
    """Of those that require grad, in their shapes and dtypes; None of the others."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    adapter: tuple[Tensor | None, Tensor | None] = (None, None)


def linear_value_and_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor | Mapping[str, Tensor],
    rule: TokenRule = FACTOR_ONE,
    floor: Tensor | None = None,
    bias: Tensor | None = None,
    outputs: str | Sequence[str] | None = None,
    reference: Reference | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    budget_bytes: int | None = None,
    k: int = 20,
    backend: str | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
) -> tuple[TokenStats, LinearGradients]:
    """Statistics of the logits `hidden @ weight.T + bias`, and the gradients of sum over tokens and outputs of
    sg(weight of the token) * statistic in hidden, weight, bias and adapter.

    Nothing is recorded for autograd: pass d(hidden) on with `hidden.backward(gradients.hidden)`, and add the others,
    such as `gradients.weight`, to `.grad` of what they are of.

    Args:
        hidden, weight, targets, bias, reference, temperature, softcap, ignore_index, k, backend, adapter: as in
            `linear_token_stats`, but for a head that is a DTensor, which it alone takes.
        weights, rule, floor, outputs: as in `value_and_grad`; `pyunlearn.objectives.one_pass` gives them.
        budget_bytes: logits (the reference's included) that may be held at once, never fewer than 64 rows; default a
            quarter of the free memory of the device. Where they are not all of them, the sum of d(weight), if it is
            wanted, is held in float32 beside it.

    Returns:
        (TokenStats, LinearGradients). Where two passes over the logits were made, `.declined["one pass"]` says why.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `linear_token_stats` and `value_and_grad`; the message
            names the argument.

    >>> hidden, weight = torch.ones(1, 2, requires_grad=True), torch.zeros(4, 2)
    >>> stats, gradients = linear_value_and_grad(hidden, weight, torch.tensor([1]), torch.tensor([-1.0]))
    >>> stats.logp.tolist(), gradients.hidden.tolist(), gradients.weight
    ([-1.3862943649291992], [[0.0, 0.0]], None)
    """
    weights = by_name(weights)
    index = NO_INDEX if ignore_index is None else ignore_index
    options = make_options(wanted(weights, outputs), temperature, softcap, index, k, reference is not None)
    if is_sharded(weight):
        raise TypeError("weight: needs a plain tensor, got a DTensor; linear_token_stats takes one")
    check_call(hidden, weight, targets, bias, options, reference, budget_bytes, adapter)
    check_weights(weights, rule, floor, targets)
    in_functions("linear_value_and_grad", needs="linear_token_stats(..., backend='eager')")
    given = (bias, hidden, *(adapter or ())[:1], weight, *(adapter or ())[1:])
    refuse_tangents("linear_value_and_grad", *given)
    chosen = choose(backend, hidden.device)
    declined = why_eager(hidden.device) if backend is None and chosen == "eager" else {}

    here = Columns.all(weight.size(0))
    head = projection_here(here, hidden, weight, bias, adapter).detach()
    frozen = None if reference is None else reference_here(here, reference)
    mask = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    flat, rows, n = targets.flatten(), None, targets.numel()
    dtype = statistics_dtype(head.inputs[0])
    ups, floor = per_token(weights, floor, options, flat.shape, dtype)
    compiling = torch.compiler.is_compiling()
    if flat.device.type == "cpu" and not compiling:
        check_range(flat, weight.size(0), ignore_index)
    if ignore_index is not None and not compiling:  # rows that do not count never reach the head
        rows = mask.flatten().nonzero().squeeze(-1)
        if rows.numel() == n:
            rows = None
        else:
            head, frozen, flat, ups = head.rows(rows), frozen and frozen.rows(rows), flat[rows], ups[:, rows]
            floor = None if floor is None else floor[rows]

    row_bytes = weight.size(0) * sum(p.dtype(options).itemsize for p in (head, frozen) if p is not None)
    budget = budget_of(flat.device) if budget_bytes is None else budget_bytes
    height = n if compiling else max(SHORTEST, budget // row_bytes)
    blocks = slices(flat.numel(), height)
    sums = Gradients(head, [t is not None and t.requires_grad for t in given], several_rows=len(blocks) != 1)
    stats, why = ups.new_empty(ups.shape), ""
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        for block in blocks:
            logits, ref_logits = both_logits(head.rows(block), frozen and frozen.rows(block), ALL, options)
            rest = (rule, None if floor is None else floor[block], options, chosen, logits)
            stats[:, block], d, why = at_once(logits, flat[block], ref_logits, ups[:, block].contiguous(), *rest)
            sums.add(d, rows=block)
            del logits, ref_logits, rest, d  # one block at a time
        found = sums.results(here, rows, n)
        if rows is not None:
            stats = stats.new_zeros(len(stats), n).index_copy_(1, rows, stats)
    if why:
        declined = {**declined, "one pass": decline("one pass", why)}
    back = [d if d is None or t is None else d.to(t.dtype).view(t.shape) for t, d in zip(given, found, strict=True)]
    told = unpack(stats.view(len(stats), *targets.shape), options.outputs, mask, declined)
    if adapter is None:
        return told, LinearGradients(back[1], back[2], back[0])
    return told, LinearGradients(back[1], back[3], back[0], (back[2], back[4]))
