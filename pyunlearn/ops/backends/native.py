"""The compiled backends, "cpu" (csrc/cpu) and "cuda" (csrc/cuda): the same calls, told apart by where the tensors are.

On the CPU, AVX-512, AVX2 or portable code is picked at run time and threads follow torch's setting; on a GPU, work goes
to torch's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..contract import OUTPUTS, SAVED, Options, TokenRule, statistics_dtype
from ..outer_sum import OuterSum
from ..pieces import Noise, Piece
from . import blocks, tables

unavailable = ""  # why nothing compiled can run; the package also works from eager PyTorch alone
try:
    from ... import _C
except ImportError as error:
    unavailable = f"the native module did not load ({error}); build it with: pip install -e ."
else:
    if getattr(_C, "outputs", 0) != len(OUTPUTS):  # the bits of a call would ask for other ones
        unavailable = "the native module was built from other sources; build it again with: pip install -e ."


def capsule(tensor: Tensor | None) -> Any:
    return None if tensor is None else torch._C._to_dlpack(tensor.detach())


def _call(like: Tensor, options: Options, vocabulary: int, first_column: int = 0) -> _C.Call:
    return _make_call(_C, options, vocabulary, first_column, torch.get_num_threads(), _stream(like))


@lru_cache(maxsize=256)  # a microsecond to make, and a training step asks for the same ones
def _make_call(
    module: ModuleType, options: Options, vocabulary: int, first_column: int, threads: int, stream: int
) -> _C.Call:
    return module.Call(
        outputs=options.bits,
        temperature=options.temperature,
        softcap=options.softcap or 0.0,
        ignore_index=options.ignore_index,
        first_column=first_column,
        vocabulary=vocabulary,
        threads=threads,
        stream=stream,
    )


def _stream(like: Tensor) -> int:
    return torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0


def _rows(tensor: Tensor, rows: int) -> Tensor:
    """(n, ...) -> (n, rows) without a copy; `rows` may be 0."""
    return tensor.view(tensor.size(0), rows)


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
    _C.accumulate(
        _call(logits, options, vocabulary, first),
        logits=capsule(logits),
        targets=capsule(targets),
        reference=capsule(reference),
        state=capsule(state),
        fresh=fresh,
    )


def finish(
    state: Tensor, targets: Tensor, has_reference: bool, options: Options, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Merges the parts of every state in order -> (stats (outputs, *targets.shape), saved (SAVED, *targets.shape))."""
    stats = state.new_zeros(len(options.outputs), *targets.shape)
    saved = state.new_empty(SAVED, *targets.shape)
    n = targets.numel()
    _C.finish(
        _call(state, options, vocabulary),
        state=capsule(state),
        targets=capsule(targets),
        has_reference=has_reference,
        stats=capsule(_rows(stats, n)),
        saved=capsule(_rows(saved, n)),
    )
    return stats, saved


def topk(logits: Tensor, targets: Tensor, stats: Tensor, saved: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Fills the topk line of `stats`; returns the lanes and their renormalised beliefs, (rows, k) or (rows, 0)."""
    k, n = options.k if "topk" in options.outputs else 0, targets.numel()
    index, belief = targets.new_empty(n, k, dtype=torch.int32), stats.new_empty(n, k)
    if k:
        _C.topk(
            _call(logits, options, logits.size(-1)),
            logits=capsule(logits),
            targets=capsule(targets),
            stats=capsule(_rows(stats, n)),
            saved=capsule(_rows(saved, n)),
            index=capsule(index),
            belief=capsule(belief),
        )
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
    grad_stats, stats, saved = (
        _rows(t.to(saved.dtype).contiguous(), targets.numel()) for t in (grad_stats, stats, saved)
    )
    if index is not None and index.size(-1) == 0:
        index = belief = None
    _C.backward(
        _call(logits, options, vocabulary or logits.size(-1), first),
        grad_stats=capsule(grad_stats),
        stats=capsule(stats),
        saved=capsule(saved),
        logits=capsule(logits),
        targets=capsule(targets),
        reference=capsule(reference),
        index=capsule(index),
        belief=capsule(belief),
        grad_logits=capsule(grad_logits),
    )
    return grad_logits


def value_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    rule: TokenRule,
    floor: Tensor | None,
    options: Options,
    stats: Tensor,
    grad_logits: Tensor,
) -> str:
    """Fills the statistics and d(logits); or "why two passes serve better", and nothing is done."""
    n = targets.numel()
    if n == 0:
        return ""
    reason = _C.value_and_grad(
        _call(logits, options, logits.size(-1)),
        logits=capsule(logits),
        targets=capsule(targets),
        weights=capsule(_rows(weights, n)),
        alpha=rule.alpha,
        gamma=rule.gamma,
        beta=rule.beta,
        floor=capsule(floor),
        stats=capsule(_rows(stats, n)),
        grad_logits=capsule(grad_logits),
    )
    return reason or ""


def perturb(pieces: Sequence[Piece], table: Tensor, seed: int, add: Noise | None, remove: Noise | None) -> None:
    """One pass over the table of chunks (tables.py) of pieces that are of one kind."""
    _, source, target = pieces[0].kind
    _C.perturb(
        table=capsule(table),
        source=None if source is None else capsule(torch.empty(0, dtype=source)),
        target=capsule(torch.empty(0, dtype=target)),
        seed=seed,
        remove=remove,
        add=add,
        threads=torch.get_num_threads(),
        stream=_stream(table),
    )


def segment_dot(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(3, pairs) float64 of flat pairs: <a, b>, <a, a>, <b, b>."""
    table, partials, sums = tables.segment_table(pairs)
    _C.segment_dot(
        table=capsule(table),
        chunk=tables.SEGMENT_CHUNK,
        partials=capsule(partials),
        sums=capsule(sums),
        threads=torch.get_num_threads(),
        stream=_stream(table),
    )
    return sums


def ghost_dot(u: OuterSum, v: OuterSum | None) -> Tensor:
    """(B,) float64 of OuterSums of one dtype; v None: of u with itself. Integers alone are u's."""
    return blocks.ghost_dot(u, v, segment_dot)
