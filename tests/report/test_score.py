"""Whether scores follow the samples' lengths."""

from __future__ import annotations

import pytest

from pyunlearn.report.score import all_checks

from .pages import score_page

DIAGNOSTICS = {
    "estimator": "algorithm1", "sigma_ratio": None, "noise_share": None, "by_heart_share": None, "normalize": None,
    "num_draws": 20,
    "made": {"command": "pyunlearn score --out 'my scores.jsonl'"},
}  # fmt: skip


def records(lengths):
    return [{"mrd": float(i), "standard_error": None, "num_tokens": length} for i, length in enumerate(lengths)]


def test_scores_that_follow_length_come_with_the_command_for_others():
    (check,) = all_checks(records([9, 7, 8, 3, 2]), DIAGNOSTICS)
    assert not check["met"]
    assert "MRD follows the number of scored tokens: ρ = -0.90" in check["text"]
    assert check["command"] == "pyunlearn score --out 'my scores.jsonl' --per-token"
    page = score_page()
    assert "<code>pyunlearn score --num-draws 5 --per-token</code>" in page


@pytest.mark.parametrize(("lengths", "met"), [([3, 9, 2, 8, 5], True), ([1, 2, 3, 4, 5], False)])
def test_scores_a_token_need_no_other(lengths, met):
    (check,) = all_checks(records(lengths), {**DIAGNOSTICS, "normalize": "tokens"})
    assert check["met"] == met
    assert "command" not in check
    assert check["text"].startswith("MRD a token ")


def test_lengths_that_do_not_vary_say_nothing():
    assert all_checks(records([4, 4, 4]), DIAGNOSTICS) == []


@pytest.mark.parametrize(
    ("error", "share", "draws"),
    [(0.5, "10.0%", None), (1.0, "40.0%", 80), (3.0, "100.0%", 200), (None, None, None), (0, None, None)],
)
def test_scores_that_noise_orders_come_with_the_command_for_more_draws(error, share, draws):
    """Of five scores 0 .. 4, whose variance is 2.5; of none whose errors are not known, or that has none."""
    scored = [{**record, "standard_error": error} for record in records([4, 4, 4, 4, 4])]
    made = {"command": "pyunlearn score --num-draws 20 --out s.jsonl"}
    checks = all_checks(scored, {**DIAGNOSTICS, "made": made})
    if share is None:
        assert checks == []
        return
    (check,) = checks
    assert check["met"] == (draws is None)
    assert f"noise is up to {share} of how the scores differ" in check["text"]
    assert check.get("command") == (None if draws is None else f"pyunlearn score --out s.jsonl --num-draws {draws}")
