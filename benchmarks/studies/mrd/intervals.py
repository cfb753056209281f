"""Means and rank correlations with their 95 % intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from scipy.stats import t as student


class Interval(NamedTuple):
    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and half-width of its 95 % interval."""
    x = torch.tensor(values, dtype=torch.float64)
    n = len(x)
    half = float(student.ppf(0.975, n - 1)) * float(x.std()) / math.sqrt(n) if n > 1 else math.nan
    return Interval(float(x.mean()), half)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Spearman's rho with its 95 % interval."""
    rho, n = float(spearmanr(x, y).statistic), len(x)
    if n < 4 or not math.isfinite(rho):
        return {"rho": rho, "low": math.nan, "high": math.nan, "samples": n}
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    return {"rho": rho, "low": math.tanh(z - half), "high": math.tanh(z + half), "samples": n}


def in_words(correlation: dict[str, float]) -> str:
    """A cell of a table: rho and its interval."""
    rho, low, high = (correlation[name] for name in ("rho", "low", "high"))
    if math.isnan(rho):
        return "none: all alike"
    return f"{rho:+.2f}" if math.isnan(low) else f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
