"""How far a mean over samples may be trusted: bootstrap intervals, of one model and of the difference of two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from .._hints import check_known
from .utility import mean as mean_of

Method = Literal["BCa", "percentile"]
SAME = 1e-12  # of the largest value: what is nearer than this differs by rounding
LARGE = 1e90  # BCa has third powers


@dataclass(frozen=True)
class Interval:
    """A mean over `num_samples`, and the bounds of its confidence interval: None where it has none, and the reason."""

    mean: float
    low: float | None
    high: float | None
    num_samples: int
    reason: str | None = None


def mean_interval(
    values: Sequence[float | None],
    *,
    level: float = 0.95,
    method: Method = "BCa",
    num_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """The bootstrap confidence interval of the mean of values, one a sample; those that are None are left out.

    method: "BCa", bias-corrected and accelerated (Efron, 1987), or "percentile". level: of confidence, in (0, 1).
    num_resamples: drawn with `seed`. Values that are all the same, up to rounding, have an interval of no width. It
    tells of the draw of samples alone, not of training anew. Values that are not all finite have no interval.

    Raises ValueError for a level, method or num_resamples out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: needs a number between 0 and 1, e.g. 0.95")
    if num_resamples < 2:
        raise ValueError(f"num_resamples={num_resamples}: needs 2 at least")
    check_known("method", method, get_args(Method))
    there = np.asarray([value for value in values if value is not None], dtype=np.float64)
    mean = mean_of(there.tolist())
    if beyond := int((~np.isfinite(there)).sum()):
        return Interval(mean, None, None, len(there), f"{beyond} of {len(there)} values are not finite")
    if len(there) < 2:
        return Interval(mean, None, None, len(there), f"{len(there)} samples have a value, an interval needs 2")
    scale = np.abs(there).max()
    if np.ptp(there) <= SAME * scale:
        return Interval(mean, mean, mean, len(there), f"all {len(there)} values are the same")
    unit = scale if scale > LARGE else 1.0  # whose squares are beyond float64
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where BCa is not defined, the reason tells it
        drawn = bootstrap(
            (there / unit,), np.mean, confidence_level=level, method=method, n_resamples=num_resamples, batch=1000,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = (float(bound * unit) for bound in drawn.confidence_interval)
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(mean, None, None, len(there), f"{method} is not defined for these values, percentile may be")
    return Interval(mean, low, high, len(there))


def difference_interval(
    before: Sequence[float | None],
    after: Sequence[float | None],
    *,
    level: float = 0.95,
    method: Method = "BCa",
    num_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """`mean_interval` of after - before, sample by sample: paired, so that what makes samples differ cancels out.

    before, after: values of the same samples in one order; a pair with a None is left out. An interval without 0 says
    that the two models differ on such samples.

    Raises ValueError for other numbers of samples, and as `mean_interval`.
    """
    if len(before) != len(after):
        raise ValueError(f"after: has {len(after)} values, before has {len(before)}; needs those of the same samples")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    differences = [b - a for a, b in pairs]
    return mean_interval(differences, level=level, method=method, num_resamples=num_resamples, seed=seed)
