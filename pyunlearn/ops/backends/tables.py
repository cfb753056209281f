"""The tables of addresses that native and Triton kernels read: rows of csrc/tensor/call.h's Chunk and Segment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import Piece

# Elements a block (GPU) or a piece of a thread's work (CPU) takes of what is perturbed, and of a pair.
PERTURB_CHUNK, SEGMENT_CHUNK = 32768, 65536
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/tensor/view.h's DType


def address(tensor: Tensor) -> int:
    """Of its memory. Raises ValueError where it has none: a fake, functional or zero tensor."""
    place = tensor.data_ptr()
    if place == 0 and tensor.numel() > 0:
        raise ValueError("a tensor has no memory (a fake, functional or zero tensor)")
    return place


def chunk_table(pieces: Sequence[Piece]) -> Tensor:
    """A row of Chunk for every chunk of the pieces: (chunks, 5) int64 on their device."""
    tables = []
    for piece in pieces:
        at, place, first, count = piece.chunks(PERTURB_CHUNK)
        rows = torch.empty(len(at), 5, dtype=torch.int64)
        rows[:, 0] = 0 if piece.source is None else address(piece.source) + at * piece.source.element_size()
        rows[:, 1] = address(piece.target) + place * piece.target.element_size()
        rows[:, 2], rows[:, 3], rows[:, 4] = first, count, piece.parameter
        tables.append(rows)
    return torch.cat(tables).to(pieces[0].target.device)


def flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n,), contiguous, in one order of elements: that of a's memory, so that a shared dense layout costs no
    copy. What else there is (strided, expanded, lazily negated) is copied: kernels get an address and a count."""
    order = sorted(range(a.dim()), key=a.stride().__getitem__, reverse=True)
    return tuple(t.detach().permute(order).reshape(-1).contiguous().resolve_neg() for t in (a, b))  # type: ignore[return-value]


def segment_table(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Of flat pairs: a row of Segment for each, (pairs, 6) int64; room for (chunks, 3) sums, and for (3, pairs)."""
    rows, chunks = [], 0
    for a, b in pairs:
        rows.append((address(a), address(b), a.numel(), chunks, TYPES[a.dtype], TYPES[b.dtype]))
        chunks += math.ceil(a.numel() / SEGMENT_CHUNK)
    device = pairs[0][0].device
    table = torch.tensor(
        rows, dtype=torch.int64, pin_memory=device.type == "cuda"
    )  # pinned: nothing waits for its copy
    table = table.to(device, non_blocking=True)
    partials = table.new_empty(chunks, 3, dtype=torch.float64)
    return table, partials, table.new_empty(3, len(pairs), dtype=torch.float64)
