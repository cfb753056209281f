"""From samples to the numbers that tables have: means of truth ratios, model utility, forget quality and the like."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

MOST_EXACT = 10_000  # samples for which scipy's `ks_2samp` is exact
FEW = 10  # samples, below which a mean says little, and the test of forget quality hardly tells anything apart
SHARE_TOLERANCE = 1e-12  # of a harmonic mean's terms below 0, by rounding


def utility_set(rows: Mapping[str, int]) -> str | None:
    """The set whose answers have to stay, of those that there are; None where neither `holdout` nor `retain` is.

    rows: how many each set has.

    Rows held out, since those that the unlearning rehearses flatter it; but the retain rows where fewer than FEW are
    held out and FEW or more retained, as chance in a few answers is the greater error then. Where both are few the size
    decides nothing, and rows held out are the ones that do not flatter.

    >>> utility_set({"forget": 6, "holdout": 6, "retain": 54}), utility_set({"forget": 6, "holdout": 3, "retain": 8})
    ('retain', 'holdout')
    """
    if rows.get("holdout", FEW) < FEW <= rows.get("retain", 0):
        return "retain"
    return next((name for name in ("holdout", "retain") if name in rows), None)


def exp(x: float) -> float:
    """e^x, infinity where that is beyond float64 (x > 709.78), as of a loss after collapse."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def mean(values: Iterable[float]) -> float:
    """NaN where there is none. Infinite where a value is; finite values have a finite one, whatever their sum."""
    values = list(values)
    if not values:
        return math.nan
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)
    except ValueError:  # infinity less infinity
        return math.nan


def complement(values: Iterable[float]) -> float:
    """1 - mean."""
    return 1 - mean(values)


def percent(values: Iterable[float]) -> float:
    """100 times the mean."""
    return 100 * mean(values)


def above_half(values: Iterable[float]) -> float:
    """Share of the values above 0.5."""
    return mean(float(value > 0.5) for value in values)


def closer_to_1_better(ratios: Iterable[float]) -> float:
    """mean of min(r, 1/r): of truth ratios on what is to be forgotten (Maini et al., 2024, TOFU)."""
    return mean(min(r, 1 / r) if r else 0.0 for r in ratios)


def closer_to_1_worse(ratios: Iterable[float]) -> float:
    """1 - mean of min(r, 1/r): the same, lower where more is forgotten (Yuan et al., 2025, A Closer Look)."""
    return 1 - closer_to_1_better(ratios)


def true_better(ratios: Iterable[float]) -> float:
    """mean of max(0, 1 - r): of truth ratios on what is to stay (Maini et al., 2024, TOFU)."""
    return mean(max(0.0, 1 - r) for r in ratios)


REDUCTIONS: dict[str, Callable[[Iterable[float]], float]] = {
    function.__name__: function
    for function in (mean, complement, percent, above_half, closer_to_1_better, closer_to_1_worse, true_better)
}


def harmonic_mean(values: Iterable[float]) -> float:
    """n / sum of 1/v; 0 if one is 0. Raises ValueError for none, or one below 0; NaN stays NaN."""
    values = list(values)
    if not values or min(values) < -SHARE_TOLERANCE:
        raise ValueError(f"values={values}: a harmonic mean needs one or more numbers >= 0")
    if any(map(math.isnan, values)):
        return math.nan
    return len(values) / math.fsum(1 / value for value in values) if min(values) > 0 else 0.0


def model_utility(values: Mapping[str, float]) -> float:
    """Harmonic mean of 9: probability, ROUGE-L recall and truth ratio (`true_better`) of retain set, real authors and
    world facts; 0 if one is 0.

    Maini et al. (2024), TOFU. values: by name. Raises ValueError for other than 9, NaN or values below 0.
    """
    bad = [name for name, value in values.items() if not value >= 0]
    if len(values) != 9 or bad:
        raise ValueError(f"values: needs 9 numbers >= 0, got {len(values)}" + (f", {bad[0]!r} is none" if bad else ""))
    return harmonic_mean(values.values())


def memorization(es: float, em: float, paraphrase_probability: float, truth_ratio: float) -> float:
    """Mem: harmonic mean of 1 - each; higher is less memorised.

    Dorna et al. (2025), OpenUnlearning. Extraction strength, exact memorization, the paraphrase's probability and the
    truth ratio's mean s ("prob_mean"), all of the forget set.
    """
    return harmonic_mean(1 - value for value in (es, em, paraphrase_probability, truth_ratio))


def forget_efficacy(rouge: float, probability: float, truth_ratio: float, cosine: float, entailment: float) -> float:
    """FE: 1 - mean of the five on the forget set, the truth ratio as `closer_to_1_worse` (Yuan et al., 2025)."""
    return 1 - mean((rouge, probability, truth_ratio, cosine, entailment))


@dataclass(frozen=True)
class ForgetQuality:
    """Of `forget_quality`. p_value in [0, 1]; statistic: KS distance D; num_forget, num_retain: ratios of the model and
    of the retained one; warnings: why it may say little.

    ln_p, log10_p: -inf where p is below the smallest float64.
    """

    p_value: float
    statistic: float
    num_forget: int
    num_retain: int
    warnings: tuple[str, ...] = ()

    @property
    def ln_p(self) -> float:
        """What papers' tables hold."""
        return math.log(self.p_value) if self.p_value else -math.inf

    @property
    def log10_p(self) -> float:
        return math.log10(self.p_value) if self.p_value else -math.inf


def forget_quality(ratios: Sequence[float], retained: Sequence[float]) -> ForgetQuality:
    """Whether the truth ratios on the forget set could be those of a model that never saw it: two-sided KS test.

    Maini et al. (2024), TOFU. ratios: of the unlearned model, retained: of the retained one, r or 1/r alike. p is exact
    up to 10,000 samples as scipy's `ks_2samp` has it; where it leaves that for its limit, a warning says so.
    Raises ValueError for none, or one that is NaN.
    """
    from scipy.stats import ks_2samp

    for name, values in (("ratios", ratios), ("retained", retained)):
        if not len(values) or any(map(math.isnan, values)):
            raise ValueError(f"{name}: needs one or more numbers, got {len(values)}" + " with NaN" * bool(len(values)))
    notes = [
        f"only {len(values)} {what} samples, fewer than {FEW}: p can hardly be small"
        for what, values in (("forget", ratios), ("retained", retained))
        if len(values) < FEW
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ks_2samp(ratios, retained)
    notes += [str(warning.message) for warning in caught]
    if max(len(ratios), len(retained)) > MOST_EXACT:
        notes.append(f"more than {MOST_EXACT} samples: p is the limit for many, not exact")
    if result.pvalue < sys.float_info.min:
        notes.append("p is below what a float64 holds")
    return ForgetQuality(float(result.pvalue), float(result.statistic), len(ratios), len(retained), tuple(notes))
