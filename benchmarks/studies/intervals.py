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


def told(found: dict[str, float]) -> str:
    if math.isnan(found["rho"]):
        return "none: all alike"
    if math.isnan(found["low"]):
        return f"{found['rho']:+.2f}"
    return f"{found['rho']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
