"""linear_token_stats: the same statistics from hidden states and the head, without holding more logits than a budget.

Here are its arguments; `projection` holds, slices and recomputes the logits, `sharded` knows heads that lie on ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._declined import decline
from .backends import choose, why_eager
from .contract import (
    NO_GRADIENT,
    NO_INDEX,
    Options,
    TokenStats,
    check_dtype,
    check_lowered,
    check_number,
    check_range,
    check_same_device,
    check_targets,
    check_tensors,
    make_options,
    unpack,
)
from .first_order import in_functions, owner
from .from_logits import stacked_stats
from .projection import Projection, both_logits, stats_in_budget
from .sharded import Columns

Reference = tuple[Tensor, ...]  # (hidden, weight) or (hidden, weight, bias)
NEEDS_WHOLE_ROWS = (
    "the eager backend, top k, torch.compile, torch.func and lowered= under a softcap need whole rows: the head is "
    "gathered"
)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    outputs: str | Sequence[str] = ("logp",),
    reference: Reference | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    budget_bytes: int | None = None,
    k: int = 20,
    backend: str | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    lowered: float | Tensor = 0.0,
) -> TokenStats:
    """Statistics of the logits `hidden @ weight.T + bias` at `targets`, differentiable in hidden, weight and bias.

    Args:
        hidden: (..., H) last hidden states. Rows whose target is `ignore_index` never reach the head (under
            torch.compile and torch.func all do).
        weight: (V, H), the head; same dtype as hidden (autocast casts both). A frozen head costs no dW. Or a DTensor,
            see below.
        targets: (...) int64 or int32.
        bias: (V,) or None; same dtype as weight.
        outputs, temperature, softcap, k, backend: as in `token_stats`.
        reference: (ref_hidden (..., H_ref), ref_weight (V, H_ref)) or with a bias (V,) as a third entry.
        ignore_index: as in `token_stats`. Finding the rows that count is a sync on a GPU, which their GEMMs outweigh;
            None: all count, and nothing waits.
        budget_bytes: logits (the reference's included) that may be held at once; default a quarter of the free memory
            of the device (a GPU's driver is asked once), on a CPU without a graph or top k 2 MiB, which its cache
            holds. Beyond it: slices of the vocabulary, never narrower than 256 columns, recomputed in backward; always
            so with 0, which leaves a checkpoint around this call nothing to save. With kl_pq, kl_qp, entropy or
            variance among the outputs the logits of bfloat16 and float16 are held in float32, twice the bytes, and on a
            CPU multiplied in float32: rounded, they would spoil what is left of sums that cancel. Slicing moves the
            last bits: give a budget where they matter. Under torch.compile and torch.func it is not looked at.
        adapter: (x (..., r), B (V, r)), same dtype as hidden: adds x @ B.T to the logits, differentiable in both. With
            x = scaling * dropout(hidden) @ A.T that is a LoRA head: no dense gradient while weight is frozen.
        lowered: as in `token_stats`. It costs nothing, but with a softcap whole rows are needed, and autograd's copies
            of them.

    Vocabulary parallel: weight may be a DTensor, Shard(0) on one dimension of a mesh. Bias, B and the reference's head
    are laid out likewise (the reference's may also be whole on every rank); hidden, x and targets are the same on every
    rank, plain or Replicate(). Every rank makes the logits of its shard, and gets all statistics, the same to the bit,
    the gradients of hidden and x summed over ranks, and those of its shard. What needs whole rows (the eager backend,
    topk, torch.compile, torch.func, lowered under a softcap) gathers the head first. FSDP shards to save memory, for
    ranks with rows of their own: give it the weight that FSDP has gathered.

    Returns:
        TokenStats, as `token_stats`; `.declined` also says why logits were not kept, or a sharded head was gathered.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; the message names the argument.
        RuntimeError: a second backward within the budget of a fused backend (the logits became their gradient;
            budget_bytes=0 allows it).

    >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8, requires_grad=True)
    >>> linear_token_stats(hidden, weight, torch.tensor([0, 4, -100])).logp.exp()
    tensor([0.2000, 0.2000, 1.0000], grad_fn=<ExpBackward0>)
    """
    index = NO_INDEX if ignore_index is None else ignore_index
    options = make_options(outputs, temperature, softcap, index, k, reference is not None)
    check_call(hidden, weight, targets, bias, options, reference, budget_bytes, adapter)
    less = check_lowered(lowered, targets, options, reference is not None)
    chosen = choose(backend, hidden.device)
    compiling = torch.compiler.is_compiling() or in_functions("linear_token_stats", chosen)
    declined = why_eager(hidden.device) if backend is None and chosen == "eager" else {}

    capped = less is not None and softcap is not None
    here = Columns.of(weight, whole=compiling or chosen == "eager" or "topk" in options.outputs or capped)
    if here.layout and here.group is None:
        declined = {**declined, "vocabulary parallel": decline("vocabulary parallel", NEEDS_WHOLE_ROWS)}
    targets = here.replica("targets", targets)
    less = less if less is None else here.replica("lowered", less).flatten()
    head = projection_here(here, hidden, weight, bias, adapter)
    frozen = None if reference is None else reference_here(here, reference)
    if all(name in NO_GRADIENT for name in options.outputs):
        head = head.detach()

    mask = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    flat = targets.flatten()
    if compiling:  # no data-dependent shapes: GEMMs and one op are seen
        logits, ref_logits = both_logits(head, frozen, slice(None), options)
        stacked = stacked_stats(logits, flat, ref_logits, options, chosen, lowered=less)
        why = f"{owner('linear_token_stats', chosen)} owns the memory: all logits are made"
        declined = {**declined, "budget": decline("budget", why)}
        return unpack(stacked.view(len(stacked), *targets.shape), options.outputs, mask, declined)
    if flat.device.type == "cpu":
        check_range(flat, weight.size(0), ignore_index)
    rows = None if ignore_index is None else mask.flatten().nonzero().squeeze(-1)
    if rows is None or rows.numel() == flat.numel():
        stacked, sliced = stats_in_budget(head, flat, frozen, options, budget_bytes, chosen, here, less)
    else:
        frozen, less = frozen and frozen.rows(rows), less if less is None else less[rows]
        rest = (frozen, options, budget_bytes, chosen, here, less)
        stacked, sliced = stats_in_budget(head.rows(rows), flat[rows], *rest)
        stacked = stacked.new_zeros(len(stacked), flat.numel()).index_copy(1, rows, stacked)
    return unpack(stacked.view(len(stacked), *targets.shape), options.outputs, mask, declined | sliced)


def projection_here(
    here: Columns, hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None
) -> Projection:
    """The head and its inputs on this rank."""
    x = matrix(here.replica("hidden", hidden))
    w = operand("weight", here.rows("weight", weight), x, "hidden")
    b = None if bias is None else operand("bias", here.rows("bias", bias), x, "hidden")
    if adapter is None:
        return Projection((x,), (w,), b)
    low = operand("adapter[0]", matrix(here.replica("adapter[0]", adapter[0])), x, "hidden")
    up = operand("adapter[1]", here.rows("adapter[1]", adapter[1]), x, "hidden")
    return Projection((x, low), (w, up), b)


def reference_here(here: Columns, reference: Reference) -> Projection:
    """The frozen head and its inputs on this rank."""
    x = matrix(here.replica("reference[0]", reference[0]))
    head = []
    for i, tensor in enumerate(reference[1:], 1):
        name = f"reference[{i}]"
        head.append(operand(name, here.frozen_rows(name, tensor), x, "reference[0]"))
    return Projection((x,), (head[0],), *head[1:]).detach()


def matrix(rows: Tensor) -> Tensor:
    """(..., H) -> (N, H), in the dtype its GEMM takes."""
    return autocast(rows.flatten(0, -2) if rows.dim() > 1 else rows.unsqueeze(0))


def operand(name: str, tensor: Tensor, like: Tensor, owner: str) -> Tensor:
    """The other side of a GEMM with `like`. Raises TypeError."""
    tensor = autocast(tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: needs the dtype of {owner}, {like.dtype}, got {tensor.dtype}")
    return tensor


def autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    wanted = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if wanted else tensor


def check_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: Options,
    reference: Reference | None,
    budget_bytes: int | None,
    adapter: tuple[Tensor, Tensor] | None,
) -> None:
    if budget_bytes is not None:
        check_number("budget_bytes", budget_bytes, "None or a number of bytes >= 0")
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes={budget_bytes!r}: needs None or a number of bytes >= 0")
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    check_head(hidden, weight, bias, "hidden", "weight", "bias")
    check_targets(targets, hidden.shape[:-1], "hidden", hidden)
    if adapter is not None:
        check_adapter(adapter, hidden, weight)
    if reference is not None:
        check_reference(reference, hidden, weight)
    if "topk" in options.outputs and options.k > weight.size(0):
        raise ValueError(f"k={options.k}: needs at most V={weight.size(0)}")


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


def check_adapter(adapter: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(adapter, tuple) or len(adapter) != 2:
        raise TypeError(f"adapter: needs a tuple (x, B), got {what_came(adapter)}")
    check_tensors(**{f"adapter[{i}]": tensor for i, tensor in enumerate(adapter)})
    x, b = adapter
    check_head(x, b, None, "adapter[0]", "adapter[1]", "")
    check_same_device("adapter[0]", x, "hidden", hidden)
    if x.shape[:-1] != hidden.shape[:-1] or b.size(0) != weight.size(0):
        raise ValueError(
            f"adapter: needs x for the rows of hidden {tuple(hidden.shape[:-1])} and B for V={weight.size(0)}, "
            f"got {tuple(x.shape)} and {tuple(b.shape)}"
        )


def what_came(given: Any) -> str:
    return f"a {type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__


def check_reference(reference: Reference, hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(reference, tuple) or len(reference) not in (2, 3):
        raise TypeError(
            f"reference: needs a tuple (ref_hidden, ref_weight) or with a ref_bias, got {what_came(reference)}"
        )
    check_tensors(**{f"reference[{i}]": tensor for i, tensor in enumerate(reference)})
    ref_hidden, ref_weight = reference[:2]
    ref_bias = reference[2] if len(reference) == 3 else None
    check_head(ref_hidden, ref_weight, ref_bias, "reference[0]", "reference[1]", "reference[2]")
    check_same_device("reference[0]", ref_hidden, "hidden", hidden)
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_weight.size(0) != weight.size(0):
        raise ValueError(
            f"reference: needs hidden states for the rows of hidden {tuple(hidden.shape[:-1])} and a head of "
            f"V={weight.size(0)}, got {tuple(ref_hidden.shape)} and {tuple(ref_weight.shape)}"
        )
