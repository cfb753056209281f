"""Numbers of tables against their definitions, by hand, and the exact levels of the test behind forget quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hmean

from pyunlearn.metrics import Entry, get_suite
from pyunlearn.metrics.suites.tofu import UTILITY
from pyunlearn.metrics.utility import (
    FEW,
    REDUCTIONS,
    closer_to_1_better,
    closer_to_1_worse,
    exp,
    forget_efficacy,
    forget_quality,
    harmonic_mean,
    mean,
    memorization,
    model_utility,
    true_better,
)

NINE = {f"{prefix}_{name}": 0.1 * (i + 1) for i, (prefix, name) in enumerate((p, n) for p in "abc" for n in "xyz")}


def test_reductions_by_hand():
    ratios = [0.0, 0.5, 2.0, 1.0, math.inf]
    assert closer_to_1_better(ratios) == pytest.approx((0 + 0.5 + 0.5 + 1 + 0) / 5)
    assert closer_to_1_worse(ratios) == pytest.approx(1 - 2 / 5)
    assert true_better(ratios) == pytest.approx((1 + 0.5 + 0 + 0 + 0) / 5)
    assert REDUCTIONS["complement"]([0.25, 0.75]) == 0.5
    assert REDUCTIONS["percent"]([0.25, 0.75]) == 50
    assert REDUCTIONS["above_half"]([0.25, 0.5, 0.75, 1.0]) == 0.5
    assert math.isnan(mean([]))


def test_what_float64_has_no_room_for():
    assert exp(709.0) == math.exp(709)
    assert exp(710.0) == exp(math.inf) == math.inf
    assert exp(-1e4) == 0
    assert mean([1e308, 1.5e308]) == pytest.approx(1.25e308)  # the sum of perplexities after collapse
    assert mean([1e308, 1e308, math.inf]) == math.inf
    assert math.isnan(mean([math.inf, -math.inf]))


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_harmonic_mean_is_scipys(values):
    assert harmonic_mean(values) == pytest.approx(hmean(values), rel=1e-12)


def test_harmonic_mean_at_its_borders():
    assert harmonic_mean([0.5, 0.0, 1.0]) == 0
    assert math.isnan(harmonic_mean([0.5, math.nan]))
    for bad in ([], [0.5, -0.1]):
        with pytest.raises(ValueError, match="needs one or more numbers >= 0"):
            harmonic_mean(bad)


def test_model_utility_is_of_nine():
    assert model_utility(NINE) == pytest.approx(hmean(list(NINE.values())))
    assert model_utility({**NINE, "a_x": 0.0}) == 0
    with pytest.raises(ValueError, match="needs 9 numbers >= 0, got 8"):
        model_utility({name: value for name, value in NINE.items() if name != "a_x"})
    with pytest.raises(ValueError, match="'a_x' is none"):
        model_utility({**NINE, "a_x": math.nan})


def test_forgetting_in_one_number():
    assert memorization(0.5, 0.5, 0.5, 0.5) == 0.5
    assert memorization(0.2, 0.4, 0.1, 0.7) == pytest.approx(hmean([0.8, 0.6, 0.9, 0.3]))
    assert memorization(1.0, 0.4, 0.1, 0.7) == 0
    assert forget_efficacy(0.1, 0.2, 0.3, 0.4, 0.5) == pytest.approx(0.7)


# D -> p of n against n samples, two-sided: the levels that stand in published tables.
LEVELS = {
    40: {0.2: 0.40459, 0.275: 0.09707, 0.4: 3.0182e-3, 0.425: 1.2708e-3, 0.475: 1.8791e-4},
    200: {0.125: 0.08784, 0.255: 4.0248e-6, 0.325: 9.5942e-10, 0.39: 5.8673e-14, 0.97: 1.0643e-106, 1: 1.9426e-119},
    400: {0.0625: 0.41579, 0.2675: 5.4186e-13, 0.29: 3.1509e-15, 0.34: 6.9169e-21, 0.345: 1.6623e-21,
          0.3725: 4.3462e-25, 0.99: 1.8016e-229},
}  # fmt: skip


@pytest.mark.parametrize(("n", "d"), [(n, d) for n, levels in LEVELS.items() for d in levels])
def test_levels_are_exact(n, d):
    """One sample is the other moved on by n D places."""
    ratios = np.arange(n, dtype=float)
    found = forget_quality(ratios, ratios + round(n * d) - 0.5)
    assert found.statistic == pytest.approx(d, abs=1e-12)
    assert found.p_value == pytest.approx(LEVELS[n][d], rel=6e-5, abs=0)
    assert found.ln_p == pytest.approx(math.log(found.p_value))
    assert found.log10_p == pytest.approx(math.log10(found.p_value))
    assert (found.num_forget, found.num_retain, found.warnings) == (n, n, ())


def test_forget_quality_knows_ranks_only():
    rng = np.random.default_rng(0)
    ratios, retained = rng.lognormal(size=60), rng.lognormal(0.4, size=80)
    found = forget_quality(ratios, retained)
    assert forget_quality(1 / ratios, 1 / retained) == found
    assert forget_quality(retained, ratios).p_value == pytest.approx(found.p_value, rel=1e-9)
    assert forget_quality(ratios, ratios).p_value == 1


def test_forget_quality_says_when_it_says_little():
    few = forget_quality([1.0, 2.0], np.arange(FEW) + 0.5)
    assert [note.split(",")[0] for note in few.warnings] == ["only 2 forget samples"]
    many = np.arange(10_001.0)
    assert forget_quality(many, many).warnings == ("more than 10000 samples: p is the limit for many, not exact",)
    apart = forget_quality(np.arange(800.0), np.arange(800.0) + 1000)
    assert (apart.p_value, apart.ln_p, apart.log10_p) == (0.0, -math.inf, -math.inf)
    assert apart.warnings == ("p is below what a float64 holds",)


@pytest.mark.parametrize(("ratios", "retained", "name"), [([], [1.0], "ratios"), ([1.0], [math.nan], "retained")])
def test_forget_quality_needs_numbers(ratios, retained, name):
    with pytest.raises(ValueError, match=f"{name}: needs one or more numbers"):
        forget_quality(ratios, retained)


def test_what_brings_a_harmonic_mean_to_zero_is_named():
    tofu = {each.name: each for each in get_suite("open_unlearning").aggregates}
    values = dict.fromkeys(UTILITY, 0.5) | {"ra_Q_A_ROUGE": 0.0, "wf_Truth_Ratio": 0.0}
    log = {name: Entry(value) for name, value in values.items()} | {"forget_fluency": Entry(0.5)}
    utility = tofu["model_utility"].combine(log, {})
    assert (utility.value, utility.note) == (0, "0, as ra_Q_A_ROUGE, wf_Truth_Ratio are")
    both = tofu["utility"].combine({**log, "model_utility": Entry(0.0)}, {})
    assert (both.value, both.note) == (0, "0, as model_utility is")
    assert tofu["utility"].combine({**log, "model_utility": Entry(0.5)}, {}).note == ""
