"""The compiled backends, "cpu" (csrc/cpu) and "cuda" (csrc/cuda): the same calls, told apart by where the tensors are.

On the CPU, AVX-512, AVX2 or portable code is picked at run time and threads follow torch's setting; on a GPU, work goes
to torch's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..contract import SAVED, Options, statistics_dtype

unavailable = ""  # why nothing compiled can run; the package also works from eager PyTorch alone
try:
    from ... import _C
except ImportError as error:
    unavailable = f"the native module did not load ({error}); build it with: pip install -e ."


def capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else torch._C._to_dlpack(tensor.detach())


def _call(like: Tensor, options: Options, first_column: int, vocabulary: int) -> tuple[int | float, ...]:
    """The arguments every native call ends with."""
    how = (options.bits, options.temperature, options.softcap or 0.0, options.ignore_index)
    return (*how, first_column, vocabulary, torch.get_num_threads(), _stream(like))


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """(n, ...) -> (n, rows) without a copy; `rows` may be 0."""
    return tensor.view(tensor.size(0), rows)


def _like(reference: Tensor | None, logits: Tensor) -> Tensor | None:
    """The kernels read a reference in the dtype of the logits."""
    return None if reference is None else reference.to(logits.dtype)


def new_state(like: Tensor, rows: int, columns: int) -> Tensor:
    """Streaming state, (rows, parts, fields); parts of a row are accumulated side by side and merged in order."""
    parts = _C.parts(like.get_device(), rows, columns)
    return like.new_empty(rows, parts, _C.state_fields, dtype=statistics_dtype(like))


def accumulate(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    state: Tensor,
    options: Options,
    first: int,
    vocabulary: int,
    fresh: bool,
) -> None:
    """Merges columns [first, first + logits.size(-1)) of every row into `state`, or starts it afresh."""
    reference = _like(reference, logits)
    call = _call(logits, options, first, vocabulary)
    _C.accumulate(capsule(logits), capsule(targets), capsule(reference), capsule(state), fresh, *call)


def finish(
    state: Tensor, targets: Tensor, has_reference: bool, options: Options, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Merges the parts of every state in order -> (stats (outputs, *targets.shape), saved (SAVED, *targets.shape))."""
    stats = state.new_zeros(len(options.outputs), *targets.shape)
    saved = state.new_empty(SAVED, *targets.shape)
    n = targets.numel()
    call = _call(state, options, 0, vocabulary)
    _C.finish(
        capsule(state),
        capsule(targets),
        has_reference,
        capsule(_rows(stats, n)),
        capsule(_rows(saved, n)),
        *call,
    )
    return stats, saved


def topk(logits: Tensor, targets: Tensor, stats: Tensor, saved: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Fills the topk line of `stats`; returns the lanes and their renormalised beliefs, (rows, k) or (rows, 0)."""
    k, n = options.k if "topk" in options.outputs else 0, targets.numel()
    index, belief = targets.new_empty(n, k, dtype=torch.int32), stats.new_empty(n, k)
    if k:
        tensors = (logits, targets, _rows(stats, n), _rows(saved, n), index, belief)
        _C.topk(*map(capsule, tensors), *_call(logits, options, 0, logits.size(-1)))
    return index, belief


def backward(
    grad_stats: Tensor,
    stats: Tensor,
    saved: Tensor,
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    index: Tensor | None,
    belief: Tensor | None,
    options: Options,
    grad_logits: Tensor,
    first: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Writes d(logits) into `grad_logits`, which may be `logits` itself, and returns it."""
    n = targets.numel()
    reference = _like(reference, logits)
    views = [_rows(t.to(saved.dtype).contiguous(), n) for t in (grad_stats, stats, saved)]
    if index is not None and index.size(-1) == 0:
        index = belief = None
    tensors = (*views, logits, targets, reference, index, belief, grad_logits)
    _C.backward(*map(capsule, tensors), *_call(logits, options, first, vocabulary or logits.size(-1)))
    return grad_logits


def value_and_grad(
    rule: tuple[float, float, float],
    weights: Tensor,
    floor: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    options: Options,
    grad_logits: Tensor,
) -> Tensor | None:
    """The statistics, and d(logits) in `grad_logits`; None, and nothing done, where two passes serve."""
    n = targets.numel()
    stats = weights.new_empty(weights.shape)
    tensors = (_rows(weights, n), floor, logits, targets, _rows(stats, n), grad_logits)
    call = _call(logits, options, 0, logits.size(-1))
    if n and not _C.value_and_grad(rule, *map(capsule, tensors), *call):
        return None
    return stats


def perturb(
    table: Tensor,
    source: torch.dtype | None,
    target: torch.dtype,
    seed: int,
    remove: tuple[int, float] | None,
    add: tuple[int, float] | None,
) -> None:
    """One pass over a table of chunks (csrc/cpu/perturb.h) in memory of these dtypes; noises are (draw, scale)."""
    from_like = None if source is None else capsule(torch.empty(0, dtype=source))
    to_like = capsule(torch.empty(0, dtype=target))
    _C.perturb(capsule(table), from_like, to_like, seed, remove, add, torch.get_num_threads(), _stream(table))


def segment_dot(
    pairs: Sequence[tuple[Tensor, Tensor]], table: Tensor, chunk: int, partials: Tensor, sums: Tensor
) -> None:
    """Fills `sums` (3, segments) from the addresses in `table` (csrc/cpu/segment_dot.h)."""
    _C.segment_dot(capsule(table), chunk, capsule(partials), capsule(sums), torch.get_num_threads(), _stream(table))
