"""Statistics from hidden states and a head, and the product that is their ceiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Base, Loss, backward, doubled, straight


@dataclass(frozen=True)
class LinearKind:
    outputs: tuple[str, ...] = ("logp",)
    weighted: bool = True  # each token by its own weight; else the mean
    frozen: bool = False  # no d(weight)
    reference: bool = False
    budget: float | None = None  # of the logits' bytes


MEAN = "NLL from hidden states, within the budget"
BEYOND = "NLL from hidden states, beyond the budget"
TOKENS = "weighted NLL from hidden states"
TOKENS_ENTROPY = "weighted NLL + entropy from hidden states"
FROZEN = "NLL from hidden states, frozen head"
LINEAR_KL = "logp + KL to a reference from hidden states"
LINEAR_KINDS = {
    MEAN: LinearKind(weighted=False),
    BEYOND: LinearKind(weighted=False, budget=1 / 16),  # and d(hidden) in float32: within a tenth
    TOKENS: LinearKind(),
    TOKENS_ENTROPY: LinearKind(("logp", "entropy")),
    FROZEN: LinearKind(weighted=False, frozen=True),
    LINEAR_KL: LinearKind(("logp", "kl_pq"), reference=True),
}


@dataclass
class Linear(Base):
    """Statistics from hidden states and a head; d(hidden) and, unless frozen, d(weight). GEMM-bound."""

    op = "linear_token_stats"
    name: str
    dtype: torch.dtype
    n: int
    v: int
    h: int
    device: str = "cpu"

    @property
    def kind(self) -> LinearKind:
        return LINEAR_KINDS[self.name]

    @property
    def bytes(self) -> int:
        """Head and hidden states read once for forward, once for backward; gradients written once."""
        touched = 2 + (not self.kind.frozen) + self.kind.reference
        return (touched * self.v * self.h + (3 + self.kind.reference) * self.n * self.h) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the products no implementation can avoid: logits, d(hidden), d(weight), the reference's logits."""
        return 2 * self.n * self.v * self.h * (3 - self.kind.frozen + self.kind.reference)

    @property
    def budget_bytes(self) -> int | None:
        return None if self.kind.budget is None else int(self.kind.budget * self.n * self.v * self.dtype.itemsize)

    @cached_property
    def tensors(self) -> dict[str, Any]:
        g = torch.Generator(self.device).manual_seed(0)

        def normal(rows: int, std: float) -> Tensor:
            return torch.empty(rows, self.h, device=self.device, dtype=self.dtype).normal_(0, std, generator=g)

        hidden, weight = normal(self.n, 1.0), normal(self.v, 1.2 * self.h**-0.5)
        return {
            "hidden": hidden,
            "weight": weight,
            "targets": torch.randint(0, self.v, (self.n,), generator=g, device=self.device),
            "weights": torch.rand(self.n, generator=g, device=self.device),
            "ref_hidden": normal(self.n, 0.5).add_(hidden) if self.kind.reference else None,
            "ref_weight": weight.clone() if self.kind.reference else None,
        }

    def fresh(self, i: int = 0) -> dict[str, Any]:
        t = dict(self.tensors)
        t["hidden"] = t["hidden"].detach().requires_grad_()
        t["weight"] = t["weight"].detach().requires_grad_(not self.kind.frozen)
        return t

    def leaves(self, t: dict) -> list[Tensor]:
        return [t["hidden"]] if self.kind.frozen else [t["hidden"], t["weight"]]

    def gradients(self, t: dict, stats: dict[str, Tensor]) -> list[Tensor]:
        if not self.kind.weighted:
            return list(torch.autograd.grad(self.loss(t, stats), self.leaves(t)))
        return backward([stats[name] for name in self.kind.outputs], self.leaves(t), t["weights"])

    def loss(self, t: dict, stats: dict[str, Tensor]) -> Tensor:
        if not self.kind.weighted:
            return -stats["logp"].sum() / self.n
        return sum((stats[name] * t["weights"]).sum() for name in self.kind.outputs)

    @cached_property
    def answer(self) -> list[Tensor]:
        return self.answer_of(self.loss)

    def answer_of(self, loss: Loss) -> list[Tensor]:
        """d(hidden) and d(weight) of `loss`, a block of rows at a time."""
        weight = self.tensors["weight"].double().requires_grad_(not self.kind.frozen)
        d_weight, d_hidden = torch.zeros_like(weight), []
        for i in range(0, self.n, 512):
            t = doubled({name: None if x is None else x[i : i + 512] for name, x in self.tensors.items()})
            hidden = t["hidden"] = t["hidden"].requires_grad_()
            ref = F.linear(t["ref_hidden"], self.tensors["ref_weight"].double()) if self.kind.reference else None
            stats = straight(F.linear(hidden, weight), t["targets"], ref, self.kind.outputs)
            grads = torch.autograd.grad(loss(t, stats), [hidden, weight][: 2 - self.kind.frozen])
            d_hidden.append(grads[0])
            if not self.kind.frozen:
                d_weight += grads[1]
        return [torch.cat(d_hidden)] + ([] if self.kind.frozen else [d_weight])


@dataclass
class Product(Base):
    """One large matrix product: the ceiling of what is GEMM-bound."""

    op = "gemm"
    name = "product of random matrices"
    dtype: torch.dtype
    n: int
    device: str = "cpu"

    @property
    def v(self) -> int:
        return self.n

    h = v

    @property
    def bytes(self) -> int:
        return 3 * self.n**2 * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.n**3

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        g = torch.Generator(self.device).manual_seed(0)
        empty = torch.empty(2, self.n, self.n, device=self.device, dtype=self.dtype)
        return dict(zip("ab", empty.normal_(generator=g), strict=True))

    def fresh(self, i: int = 0) -> dict[str, Tensor]:
        return self.tensors

    @cached_property
    def answer(self) -> list[Tensor]:
        return [self.tensors["a"].double() @ self.tensors["b"].double()]
