"""Bootstrap intervals against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from pyunlearn.metrics import difference_interval, mean_interval

DRAW = np.random.default_rng(3)
NORMAL = DRAW.normal(2.0, 1.5, 400).tolist()


@pytest.mark.parametrize("method", ["BCa", "percentile"])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_of_many_samples_it_is_the_normal_one(method, level):
    told = mean_interval(NORMAL, method=method, level=level)
    width = norm.ppf((1 + level) / 2) * np.std(NORMAL) / math.sqrt(len(NORMAL))
    mean = np.mean(NORMAL)
    assert told.mean == pytest.approx(mean)
    assert (told.low, told.high) == pytest.approx((mean - width, mean + width), abs=0.05 * width)
    assert (told.num_samples, told.reason) == (400, None)


def test_of_two_values_the_percentiles_are_exact():
    """Means of draws of 0 and 1 are 0, .5, 1 with 1/4, 1/2, 1/4: at a level of .4 the bounds are in the middle half."""
    told = mean_interval([0.0, 1.0], method="percentile", level=0.4)
    assert (told.low, told.high) == (0.5, 0.5)
    told = mean_interval([0.0, 1.0], method="percentile", level=0.6)
    assert (told.low, told.high) == (0.0, 1.0)


def test_bca_leans_with_the_skew():
    skewed = [0.0] * 30 + [1.0] * 3
    percentile, bca = (mean_interval(skewed, method=method) for method in ("percentile", "BCa"))
    assert bca.low >= percentile.low
    assert bca.high > percentile.high


def test_a_seed_gives_one_interval():
    assert mean_interval(NORMAL[:20], seed=4) == mean_interval(NORMAL[:20], seed=4)
    assert mean_interval(NORMAL[:20], seed=4) != mean_interval(NORMAL[:20], seed=5)


def test_where_there_is_none_the_reason_is_told():
    one = mean_interval([None, 0.25, None])
    assert (one.mean, one.low, one.high, one.num_samples) == (0.25, None, None, 1)
    assert one.reason == "1 samples have a value, an interval needs 2"
    none = mean_interval([])
    assert math.isnan(none.mean)
    assert none.reason == "0 samples have a value, an interval needs 2"
    same = mean_interval([0.5, 0.5, None, 0.5])
    assert (same.low, same.high, same.num_samples) == (0.5, 0.5, 3)
    assert same.reason == "all 3 values are the same"
    rounded = mean_interval([1.0, 1 - 2**-53, 1.0])  # as entropies of texts without a repeat
    assert (rounded.low, rounded.high, rounded.reason) == (rounded.mean, rounded.mean, same.reason)


def test_where_bca_is_not_defined_nothing_is_warned_of(recwarn):
    told = mean_interval([0.0] * 30 + [1.0], num_resamples=2, seed=11)  # neither resample has the 1
    assert (told.low, told.high) == (None, None)
    assert told.reason == "BCa is not defined for these values, percentile may be"
    assert not recwarn.list


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_values_that_are_not_finite_have_a_mean_and_no_interval(method):
    told = mean_interval([1.0, math.inf, None, 2.0], method=method)
    assert (told.mean, told.low, told.high, told.num_samples) == (math.inf, None, None, 3)
    assert told.reason == "1 of 3 values are not finite"
    assert math.isnan(mean_interval([1.0, math.nan], method=method).mean)
    assert difference_interval([1.0, math.inf], [2.0, math.inf]).reason == "1 of 2 values are not finite"
    large, small = (mean_interval([x * unit for x in (1.0, 2.0, 4.0, 0.5)], method=method) for unit in (2.0**1020, 1.0))
    assert (large.low, large.high) == pytest.approx((small.low * 2.0**1020, small.high * 2.0**1020))


def test_a_paired_difference_is_narrower_than_the_samples_differ():
    before = DRAW.normal(0, 10, 60)
    after = before + 0.5 + DRAW.normal(0, 0.1, 60)
    told = difference_interval(before.tolist(), after.tolist())
    assert 0.4 < told.low < told.mean < told.high < 0.6
    assert told.mean == pytest.approx(float(np.mean(after - before)))
    assert mean_interval(before.tolist()).high - mean_interval(before.tolist()).low > 2
    same = difference_interval([1.0, None, 2.0, 3.0], [1.5, 9.0, None, 3.5])
    assert (same.mean, same.num_samples) == (0.5, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0, 2.0], level=95), "level=95: needs a number between 0 and 1"),
        (lambda: mean_interval([1.0, 2.0], method="bca"), "method='bca': did you mean BCa"),
        (lambda: mean_interval([1.0, 2.0], num_resamples=1), "num_resamples=1"),
        (lambda: difference_interval([1.0], [1.0, 2.0]), "after: has 2 values, before has 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
