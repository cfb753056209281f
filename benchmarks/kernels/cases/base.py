"""What a case is: its inputs, the bytes that have to move, the float64 answer, the reset; and who computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import backends

Case = Any  # of a class in logits.py, linear.py, noise.py or gradients.py
Loss = Callable[[dict, dict[str, Tensor]], Tensor]  # (tensors of a run, statistics) -> what is differentiated
Results = list[Tensor] | list[Tensor | None]  # None: a result of the case that an implementation does not compute
Run = Callable[[Any, dict], Results]
MEMORY_BOUND = ("token_stats", "perturbed", "segment_dot")  # ops held against a copy; the others against a product


class Impl(NamedTuple):
    """`run` gives the case's results, those of `loss` instead of the case's own where it computes another one."""

    run: Run
    loss: Loss | None = None
    exact: bool = True  # False: its results are not the case's, there is no error to tell
    bytes: int | None = None  # the least traffic, where it is not the case's


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


def backward(outputs: list[Tensor], leaves: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Gradients of the sum over `outputs` (N,), each token weighted."""
    return list(torch.autograd.grad(outputs, leaves, [weights.to(x.dtype) for x in outputs]))


def doubled(tensors: dict[str, Any]) -> dict[str, Any]:
    """What is floating point in float64."""
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()}


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
