"""The cases: what is computed, on which inputs, the bytes that have to move, the float64 answer, and the reset.

NV is one read or write of N*V logits. A case's `bytes` is the least traffic any implementation can do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyunlearn.ops import backends

Loss = Callable[[dict, dict[str, Tensor]], Tensor]  # (tensors of a run, statistics) -> what is differentiated
Results = list[Tensor] | list[Tensor | None]  # None: a result of the case that an implementation does not compute
Run = Callable[[Any, dict], Results]
POOL_BYTES = 256 << 20  # data that runs on a GPU rotate through: several times an L2 cache
MEMORY_BOUND = ("token_stats", "perturbed", "segment_dot")  # ops held against a copy; the others against a product


class Impl(NamedTuple):
    """`run` gives the case's results, those of `loss` instead of the case's own where it computes another one."""

    run: Run
    loss: Loss | None = None
    exact: bool = True  # False: its results are not the case's, there is no error to tell


class Base:
    """What most cases have alike."""

    def sample(self, results: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of an implementation's results those that are compared with float64."""
        return list(results)

    def done(self) -> None:
        """Gives back what runs hold in between."""


@dataclass
class Shapes(Base):
    """A case of N numbers in V tensors of these shapes."""

    h = 0
    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    device: str = "cpu"

    @property
    def n(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def v(self) -> int:
        return len(self.shapes)


def fused(device: str) -> list[str]:
    """Our backends for tensors on `device`, eager left out."""
    order = backends.ORDER.get(torch.device(device).type, ())
    return [name for name in order if name != "eager" and not backends.unavailable(name)]


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
    """Statistics of given logits, weighted per token and summed; d(logits) where `kind.backward`."""

    op = "token_stats"
    h = 0
    name: str
    dtype: torch.dtype
    n: int
    v: int
    device: str = "cpu"

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
        like: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        logits = torch.empty(self.windows, self.n, self.v, **like).normal_(0, 3, generator=g)
        reference = torch.empty_like(logits).normal_(generator=g).add_(logits) if self.kind.reference else None
        return {
            "logits": logits,
            "reference": reference,
            "targets": torch.randint(0, self.v, (self.windows, self.n), generator=g, device=self.device),
            "weights": torch.rand(self.windows, self.n, generator=g, device=self.device),
        }

    @cached_property
    def scratch(self) -> Tensor:
        return torch.empty_like(self.tensors["logits"])

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
    BEYOND: LinearKind(weighted=False, budget=1 / 12),
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


def backward(outputs: list[Tensor], leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Gradients of the sum over `outputs` (N,), each token weighted."""
    return list(torch.autograd.grad(outputs, leaves, [weights.to(x.dtype) for x in outputs]))


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    """What is floating point in float64."""
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


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


Case = Any  # of a class above, in noise.py or gradients.py


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
