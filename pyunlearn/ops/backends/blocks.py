"""ghost_dot by blocks of BLOCK x BLOCK positions: their inner products by BLAS, which nothing we could write beats at
matrix products, then the product and sum of two blocks by a backend's segment_dot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..outer_sum import OuterSum
from ..products import wide_product
from .tables import flat

BLOCK = 256  # positions on a side of a block
BLOCKS = 16  # blocks that are held at once, at most
SegmentDot = Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor]


def ghost_dot(u: OuterSum, v: OuterSum | None, segment_dot: SegmentDot) -> Tensor:
    """(B,) float64, <U_i, V_i> of OuterSums of one dtype; v None: of u with itself. Integers alone are u's."""
    symmetric, v = v is None, u if v is None else v
    sums = u.right.new_zeros(u.num_sequences, dtype=torch.float64)
    for at, x, y in parts(u, v):
        for i in range(0, x.right.size(1), BLOCK):
            for j in range(i if symmetric else 0, y.right.size(1), BLOCK):
                t, s = slice(i, i + BLOCK), slice(j, j + BLOCK)
                rights = wide_product(x.right[:, t], y.right[:, s].mT)
                lefts = left_products(x.left[:, t], y.left[:, s]).to(rights.dtype)
                dots = segment_dot([flat(*pair) for pair in zip(lefts, rights, strict=True)])[0]
                sums[at] += 2 * dots if symmetric and i != j else dots
    return sums


def parts(u: OuterSum, v: OuterSum) -> Iterator[tuple[slice, OuterSum, OuterSum]]:
    """(which sequences, theirs of u, theirs of v), padded: several that are alike in length, or one at a time."""
    if u.cu_seqlens is None and v.cu_seqlens is None:
        size = min(u.right.size(1), BLOCK) * min(v.right.size(1), BLOCK)
        step = max(1, BLOCKS * BLOCK * BLOCK // max(1, size))
        for i in range(0, u.num_sequences, step):
            at = slice(i, i + step)
            yield at, OuterSum(u.left[at], u.right[at]), OuterSum(v.left[at], v.right[at])
        return
    for i, (x, y) in enumerate(zip(sequences(u), sequences(v), strict=True)):
        yield slice(i, i + 1), x, y


def sequences(x: OuterSum) -> Iterator[OuterSum]:
    if x.cu_seqlens is None:
        yield from (OuterSum(left[None], right[None]) for left, right in zip(x.left, x.right, strict=True))
        return
    ends = x.cu_seqlens.tolist()
    for begin, end in pairwise(ends):
        yield OuterSum(x.left[None, begin:end], x.right[None, begin:end])


def left_products(u: Tensor, v: Tensor) -> Tensor:
    """(B, T, S): u_t . v_s; integers are one-hot rows. NaN for one that is no row of v."""
    if v.dim() == 2:
        return u[:, :, None] == v[:, None, :]
    if u.dim() == 3:
        return wide_product(u, v.mT)
    inside = ((u >= 0) & (u < v.size(-1)))[:, :, None]
    rows = torch.where(inside, u[:, :, None], 0).long()
    return torch.where(inside, v.mT.gather(1, rows.expand(-1, -1, v.size(1))), float("nan"))
