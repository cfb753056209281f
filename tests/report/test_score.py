"""Whether scores follow the samples' lengths."""

from __future__ import annotations

import pytest

from pyunlearn.report.score import all_checks

from .pages import score_page

DIAGNOSTICS = {
    "estimator": "algorithm1", "sigma_ratio": None, "noise_share": None, "by_heart_share": None, "normalize": None,
    "made": {"command": "pyunlearn score --out 'my scores.jsonl'"},
}  # fmt: skip


def records(lengths):
    return [{"mrd": float(i), "num_tokens": length} for i, length in enumerate(lengths)]


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
