"""segment_dot: <a, b>, <a, a> and <b, b> of many pairs of tensors, each read once, summed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import is_sharded
from .backends import choose, kernels
from .backends.tables import flat
from .contract import DTYPES
from .first_order import refuse_functions, refuse_tangents


class SegmentDots(NamedTuple):
    """One entry a pair, (pairs,) float64, on the pairs' device."""

    dot: Tensor  # <a, b>
    a_squared: Tensor  # <a, a>
    b_squared: Tensor  # <b, b>

    @property
    def cosine(self) -> Tensor:
        """<a, b> / (|a| |b|), (pairs,) float64; 0 where a or b is 0."""
        norms = self.a_squared.sqrt() * self.b_squared.sqrt()
        return torch.where(norms == 0, 0.0, self.dot / norms)


def segment_dot(pairs: Sequence[tuple[Tensor, Tensor]], backend: str | None = None) -> SegmentDots:
    """Dot product and squared norms of every pair of tensors, in one launch for all of them.

    Products are exact for all dtypes but float64, and sums are float64 in a fixed order: the result is right to about
    1e-16 * sum |a b| (near-orthogonal bfloat16 gradients keep their digits), and the same bits on every run and for
    every number of threads. Nothing waits for the device.

    Args:
        pairs: (a, b) of one shape, bfloat16, float16, float32 or float64 (a's and b's may differ), all on one device. A
            pair of one dense layout is read where it lies; else what is not contiguous is copied. Empty tensors give 0.
        backend: None (the device's default), "cpu", "cuda", "triton" or "eager".

    Returns:
        SegmentDots: .dot, .a_squared, .b_squared, each (len(pairs),) float64; not differentiable.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; the message names the pair.
        RuntimeError: a backend that is not available here, tensors inside of torch.func's transforms.

    >>> dots = segment_dot([(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0]))])
    >>> dots.dot.item(), dots.a_squared.item(), dots.b_squared.item()
    (1.0, 5.0, 10.0)
    """
    for i, pair in enumerate(pairs):
        check_pair(f"pairs[{i}]", pair, pairs[0][0].device)
    if not pairs:
        return SegmentDots(*torch.zeros(3, 0, dtype=torch.float64))
    a, b = [a for a, _ in pairs], [b for _, b in pairs]
    refuse_tangents("segment_dot", *a, *b)
    refuse_functions("segment_dot", *a, *b)
    sums = torch.ops.pyunlearn.segment_dot.default if torch.compiler.is_compiling() else stacked_dots
    return SegmentDots(*sums(a, b, choose(backend, a[0].device)))


def check_pair(name: str, pair: tuple[Tensor, Tensor], device: torch.device) -> None:
    if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        raise TypeError(f"{name}: needs two tensors (a, b), got {type(pair).__name__}")
    a, b = pair
    for tensor in pair:
        if is_sharded(tensor):
            raise TypeError(
                f"{name}: needs plain tensors, got a DTensor; pass its shard and add the results up over ranks"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: needs bfloat16, float16, float32 or float64, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: needs dense tensors, got {tensor.layout}")
        if tensor.device != device:
            raise ValueError(f"{name}: needs {device} as pairs[0][0], got {tensor.device}")
    if a.shape != b.shape:
        raise ValueError(f"{name}: needs two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def stacked_dots(a: list[Tensor], b: list[Tensor], backend: str) -> Tensor:
    """(3, len(a)) float64: <a, b>, <a, a>, <b, b>; arguments were checked."""
    return kernels(backend).segment_dot([flat(*pair) for pair in zip(a, b, strict=True)])
