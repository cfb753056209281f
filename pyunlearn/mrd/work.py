"""What every estimator works with: the job, its units of work shared out over processes and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..distributed import Processes
from ..model.causal_lm import CausalLM
from ..ops.parameters import Weight
from ..store import Store
from .samples import Samples

FORMAT = "pyunlearn-mrd-3"
T = TypeVar("T")
Factor = Callable[[Tensor], Tensor]  # log L_t -> f_t, what a token's relative change is multiplied with


class Estimate(NamedTuple):
    """value, error: (n,) float64, not normalised; slope: (n,), the norm of the statistic's gradient; draws: (K, n)."""

    value: Tensor
    error: Tensor
    slope: Tensor
    draws: Tensor | None = None
    diagnostics: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Job:
    lm: CausalLM
    weights: list[Weight]
    samples: Samples
    seed: int
    factor: Factor
    store: Store
    processes: Processes
    progress: bool

    def finish(self, units: Mapping[T, str], make: Callable[[T], Tensor], description: str) -> dict[T, Tensor]:
        """The values of `units` (item: name), made where the store does not have them yet."""
        return self.store.finish(units, make, description, self.processes, progress=self.progress)


def first_order(statistic: Tensor) -> tuple[Tensor, Tensor]:
    """(K, n) -> the mean of |S| and its standard error, (n,) each; NaN for one draw."""
    return mean_and_error(statistic.abs())


def second_order(statistic: Tensor) -> tuple[Tensor, Tensor]:
    """(K, n) -> |the mean| and its standard error, (n,) each."""
    mean, error = mean_and_error(statistic)
    return mean.abs(), error


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    count = len(draws)
    error = draws.std(0) / count**0.5 if count > 1 else torch.full_like(draws[0], torch.nan)
    return draws.mean(0), error


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError naming the first sample whose value (n,) is not finite."""
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"sample {int(bad.int().argmax())}: its score is not finite {what}; are the weights, is sigma small enough?"
        )
