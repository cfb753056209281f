"""The cases: what is computed, on which inputs, the bytes that have to move, and the float64 answer.

NV is one read or write of N*V logits. A case's `bytes` is the least traffic any implementation can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Logits:
    """Statistics of given logits, weighted per token and summed; d(logits) where `backward`."""

    op = "token_stats"
    name: str
    outputs: tuple[str, ...]
    dtype: torch.dtype
    n: int
    v: int
    backward: bool = True
    reference: bool = False
    h: int = 0

    @property
    def bytes(self) -> int:
        passes = (3 if self.backward else 1) + (2 if self.backward else 1) * self.reference
        return passes * self.n * self.v * self.dtype.itemsize

    @cached_property
    def tensors(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        logits = torch.randn(self.n, self.v, generator=g) * 3
        ref = logits + torch.randn(self.n, self.v, generator=g) if self.reference else None
        return {
            "logits": logits.to(self.dtype),
            "targets": torch.randint(0, self.v, (self.n,), generator=g),
            "weights": torch.rand(self.n, generator=g),
            "reference": None if ref is None else ref.to(self.dtype),
        }

    def fresh(self) -> dict[str, Any]:
        """The inputs of one run: the logits as a new leaf in the same memory each time (reset for in-place runs)."""
        t = dict(self.tensors)
        self.scratch.copy_(t["logits"])
        t["logits"] = self.scratch.detach().requires_grad_(self.backward)
        return t

    @cached_property
    def scratch(self) -> Tensor:
        return torch.empty_like(self.tensors["logits"])

    def leaves(self, t: dict) -> list[Tensor]:
        return [t["logits"]] if self.backward else []

    def loss(self, t: dict, stats: dict[str, Tensor]) -> Tensor:
        return sum((stats[name] * t["weights"]).sum() for name in self.outputs)

    @cached_property
    def answer(self) -> list[Tensor]:
        """d(logits), or the statistics themselves without backward, in float64, a block of rows at a time."""
        blocks = []
        for i in range(0, self.n, 64):
            t: dict[str, Any] = {name: None if x is None else x[i : i + 64] for name, x in self.tensors.items()}
            t = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in t.items()}
            t["logits"] = t["logits"].requires_grad_(self.backward)
            stats = straight(t["logits"], t["targets"], t["reference"], self.outputs)
            if self.backward:
                blocks.append([torch.autograd.grad(self.loss(t, stats), t["logits"])[0]])
            else:
                blocks.append([stats[name] for name in self.outputs])
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


@dataclass
class Linear:
    """Mean NLL from hidden states and a head; d(hidden) and d(weight). GEMM-bound: `flops` is 3 GEMMs."""

    op = "linear_token_stats"
    name: str
    n: int
    v: int
    h: int
    dtype: torch.dtype = torch.float32
    budget_bytes: int | None = None
    backward: bool = True
    outputs: tuple[str, ...] = ("logp",)

    @property
    def bytes(self) -> int:
        return (3 * self.v * self.h + 3 * self.n * self.h) * self.dtype.itemsize

    @cached_property
    def tensors(self) -> dict[str, Any]:
        g = torch.Generator().manual_seed(0)
        return {
            "hidden": torch.randn(self.n, self.h, generator=g).to(self.dtype),
            "weight": (torch.randn(self.v, self.h, generator=g) * 0.05).to(self.dtype),
            "targets": torch.randint(0, self.v, (self.n,), generator=g),
        }

    def fresh(self) -> dict[str, Tensor]:
        t = self.tensors
        return {**t, "hidden": t["hidden"].detach().requires_grad_(), "weight": t["weight"].detach().requires_grad_()}

    def leaves(self, t: dict) -> list[Tensor]:
        return [t["hidden"], t["weight"]]

    @cached_property
    def answer(self) -> list[Tensor]:
        hidden = self.tensors["hidden"].double().requires_grad_()
        weight = self.tensors["weight"].double().requires_grad_()
        F.cross_entropy(F.linear(hidden, weight), self.tensors["targets"]).backward()
        return [hidden.grad, weight.grad]


Case = Logits | Linear


def straight(logits: Tensor, targets: Tensor, reference: Tensor | None, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """The way it is written without kernels: log_softmax in float32 (float64) and sums over the vocabulary."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    stats = {"logp": log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)}
    if "entropy" in outputs:
        stats["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if "kl_pq" in outputs and reference is not None:
        log_q = torch.log_softmax(reference if reference.dtype == torch.float64 else reference.float(), -1)
        stats["kl_pq"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return stats


def cpu_cases(small: bool = False) -> list[Case]:
    """The foundation's shapes (512 x 49152 logits; SmolLM2's head); `small` for a smoke test."""
    n, v, h, rows = (16, 999, 32, 64) if small else (512, 49152, 576, 1024)
    cases: list[Case] = []
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(Logits("weighted NLL, forward + backward", ("logp",), dtype, n, v))
        cases.append(Logits("logp + entropy, forward + backward", ("logp", "entropy"), dtype, n, v))
        cases.append(Logits("logp + entropy, no gradient", ("logp", "entropy"), dtype, n, v, backward=False))
        cases.append(
            Logits("logp + KL to a reference, forward + backward", ("logp", "kl_pq"), dtype, n, v, reference=True)
        )
    cases.append(Linear("NLL from hidden states, within the budget", rows, v, h))
    cases.append(
        Linear("NLL from hidden states, beyond the budget", 2 * rows, v, h, budget_bytes=2 * rows * v * 4 // 12)
    )
    return cases
