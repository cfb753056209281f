"""Statistics of given logits. NV is one read or write of N*V logits: the least traffic any implementation can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .base import Base, Loss, backward, doubled, straight

POOL_BYTES = 256 << 20  # data that runs on a GPU rotate through: several times an L2 cache


@dataclass(frozen=True)
class Kind:
    outputs: tuple[str, ...]
    passes: int  # NV
    backward: bool = True
    reference: bool = False
    at_once: bool = False  # weights known beforehand: statistics and d(logits) in one call


NLL = "weighted NLL, forward + backward"
ENTROPY = "logp + entropy, forward + backward"
STATISTICS = "logp + entropy, no gradient"
KL = "logp + KL to a reference, forward + backward"
AT_ONCE = "weighted NLL, value and gradient at once"
KINDS = {
    NLL: Kind(("logp",), 3),
    ENTROPY: Kind(("logp", "entropy"), 3),
    STATISTICS: Kind(("logp", "entropy"), 1, backward=False),
    KL: Kind(("logp", "kl_pq"), 5, reference=True),
    AT_ONCE: Kind(("logp",), 2, at_once=True),
}


@dataclass
class Logits(Base):
    """Statistics of given logits, weighted per token and summed; d(logits) where `kind.backward`.

    first: the column of a wider matrix at which the rows begin; other than 0, they lie at odd addresses.
    """

    op = "token_stats"
    h = 0
    name: str
    dtype: torch.dtype
    n: int
    v: int
    device: str = "cpu"
    first: int = 0

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def bytes(self) -> int:
        return self.kind.passes * self.n * self.v * self.dtype.itemsize

    @cached_property
    def windows(self) -> int:
        """On a GPU the runs rotate through so many sets of rows."""
        size = self.n * self.v * self.dtype.itemsize
        return 1 if self.device == "cpu" else max(1, min(64, POOL_BYTES // size))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        g = torch.Generator(self.device).manual_seed(0)
        logits = self.room().normal_(0, 3, generator=g)
        reference = self.room().normal_(generator=g).add_(logits) if self.kind.reference else None
        return {
            "logits": logits,
            "reference": reference,
            "targets": torch.randint(0, self.v, (self.windows, self.n), generator=g, device=self.device),
            "weights": torch.rand(self.windows, self.n, generator=g, device=self.device),
        }

    def room(self) -> Tensor:
        whole = torch.empty(self.windows, self.n, self.first + self.v, device=self.device, dtype=self.dtype)
        return whole[..., self.first :]

    @cached_property
    def scratch(self) -> Tensor:
        return self.room()

    def window(self, i: int) -> dict[str, Any]:
        return {name: None if x is None else x[i % self.windows] for name, x in self.tensors.items()}

    def fresh(self, i: int = 0) -> dict[str, Any]:
        """The inputs of run i; the logits are a new leaf on memory that was reset, so a run may overwrite them."""
        t, logits = self.window(i), self.scratch[i % self.windows]
        logits.copy_(t["logits"])
        return {**t, "logits": logits.detach().requires_grad_(self.kind.backward)}

    def gradients(self, t: dict, stats: dict[str, Tensor]) -> list[Tensor]:
        """d(logits) of `loss`; its gradient with respect to the statistics is there, so nothing else is timed."""
        return backward([stats[name] for name in self.kind.outputs], [t["logits"]], t["weights"])

    def loss(self, t: dict, stats: dict[str, Tensor]) -> Tensor:
        return sum((stats[name] * t["weights"]).sum() for name in self.kind.outputs)

    @cached_property
    def rows(self) -> Tensor:
        """The rows of run 0 that are compared with float64: the first and the last are among them."""
        count = min(self.n, max(64, (1 << 25) // self.v))
        return torch.linspace(0, self.n - 1, count, dtype=torch.float64).long().to(self.device)

    def sample(self, results: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if x is None else x[self.rows] for x in results]

    @cached_property
    def answer(self) -> list[Tensor]:
        return self.answer_of(self.loss)

    def answer_of(self, loss: Loss) -> list[Tensor]:
        """d(logits) of `loss` and, at once, the logp; the statistics themselves without backward. Of `self.rows`."""
        blocks = []
        for rows in self.rows.split(64):
            t = doubled({name: None if x is None else x[rows] for name, x in self.window(0).items()})
            logits = t["logits"] = t["logits"].requires_grad_(self.kind.backward)
            stats = straight(logits, t["targets"], t["reference"], self.kind.outputs)
            if not self.kind.backward:
                blocks.append([stats[name] for name in self.kind.outputs])
                continue
            gradient = torch.autograd.grad(loss(t, stats), logits)[0]
            blocks.append([gradient, stats["logp"].detach()] if self.kind.at_once else [gradient])
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]
