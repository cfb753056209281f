"""What is done to gradients: <a, b>, <a, a>, <b, b> of many pairs, and squared norms of every sample's, unformed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import pyunlearn as pu
from pyunlearn.ops import OuterSum

from .base import Base, Impl, Results, Shapes, fused

ONE_PAIR, MANY_PAIRS = "three dots of one pair", "three dots of many pairs"
LAYERS = ((3, 50), (8, 256), (2, 1024), (16, 256), (4, 1024))  # samples, positions of each
NORMS = {f"squared norms of {b} gradients, T={t}": (b, t) for b, t in LAYERS}


@dataclass
class Pairs(Shapes):
    """Tensors of these shapes, N(0, 1), one after another in memory."""

    op = "segment_dot"

    @property
    def bytes(self) -> int:
        return 2 * self.n * self.dtype.itemsize

    @cached_property
    def tensors(self) -> dict[str, Any]:
        g = torch.Generator(self.device).manual_seed(0)
        whole = [torch.empty(self.n, device=self.device, dtype=self.dtype).normal_(generator=g) for _ in "ab"]
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        a, b = ([t.view(s) for t, s in zip(x.split(sizes), self.shapes, strict=True)] for x in whole)
        return {"whole": whole, "a": a, "b": b}

    def fresh(self, i: int = 0) -> dict[str, Any]:
        return self.tensors

    @cached_property
    def answer(self) -> list[Tensor]:
        return dots(self, self.tensors, "eager")

    def implementations(self) -> dict[str, Impl]:
        impls = {name: Impl(lambda case, t, name=name: dots(case, t, name)) for name in fused(self.device)}  # type: ignore[misc]
        impls |= {
            "eager": Impl(lambda case, t: dots(case, t, "eager")),
            "torch.dot": Impl(torch_dot),
            "torch.dot in float64": Impl(torch_dot_in_float64),
            "torch._foreach_mul + sum": Impl(foreach),
        }
        if self.device != "cpu":
            impls["reading alone"] = Impl(lambda case, t: [x.sum() for x in t["whole"]], exact=False)
        return impls


def dots(case: Pairs, t: dict, backend: str) -> list[Tensor]:
    return list(pu.segment_dot([*zip(t["a"], t["b"], strict=True)], backend=backend))


def torch_dot(case: Pairs, t: dict) -> Results:
    return [torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in zip(t["a"], t["b"], strict=True)]), None, None]


def torch_dot_in_float64(case: Pairs, t: dict) -> Results:
    pairs = ((a.view(-1).double(), b.view(-1).double()) for a, b in zip(t["a"], t["b"], strict=True))
    return [torch.stack([torch.dot(a, b) for a, b in pairs]), None, None]


def foreach(case: Pairs, t: dict) -> Results:
    return [torch.stack([product.sum() for product in torch._foreach_mul(t["a"], t["b"])]), None, None]


@dataclass
class Norms(Base):
    """A linear layer's: inputs (B, T, h) and output gradients (B, T, v), N(0, 1). N = B T."""

    op = "ghost_dot"
    name: str
    dtype: torch.dtype
    v: int
    h: int
    device: str = "cpu"

    @property
    def n(self) -> int:
        samples, length = NORMS[self.name]
        return samples * length

    @property
    def bytes(self) -> int:
        return self.n * (self.v + self.h) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of each inner product of two positions of a sample once."""
        return self.n * (NORMS[self.name][1] + 1) * (self.v + self.h)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        g = torch.Generator(self.device).manual_seed(0)

        def normal(width: int) -> Tensor:
            return torch.empty(*NORMS[self.name], width, device=self.device, dtype=self.dtype).normal_(generator=g)

        return {"a": normal(self.h), "b": normal(self.v)}

    def fresh(self, i: int = 0) -> dict[str, Tensor]:
        return self.tensors

    @cached_property
    def answer(self) -> list[Tensor]:
        pairs = zip(self.tensors["a"], self.tensors["b"], strict=True)
        return [torch.stack([(b.double().t() @ a.double()).square().sum() for a, b in pairs])]

    def implementations(self) -> dict[str, Impl]:
        names = [*fused(self.device), "eager"]
        impls = {name: Impl(lambda case, t, name=name: norms(case, t, name)) for name in names}  # type: ignore[misc]
        return impls | {"(B, T, T) matrices": Impl(matrices), "per-sample gradients": Impl(per_sample)}


def norms(case: Norms, t: dict, backend: str) -> list[Tensor]:
    return [pu.ghost_dot(OuterSum(t["b"], t["a"]), backend=backend)]


def matrices(case: Norms, t: dict) -> list[Tensor]:
    a, b = t["a"], t["b"]
    return [((a @ a.mT) * (b @ b.mT)).sum((1, 2))]


def per_sample(case: Norms, t: dict) -> list[Tensor]:
    return [(t["b"].mT @ t["a"]).square().sum((1, 2))]
