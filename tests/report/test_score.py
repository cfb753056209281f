"""Whether scores follow the samples' lengths."""

from __future__ import annotations

import pytest

from pyunlearn.report.score import all_checks, ordered, self_checks

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
    [(0.5, "10.0%", None), (1.0, "40.0%", 80), (3.0, "360.0%", 720), (None, None, None), (0, None, None)],
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


def test_scores_within_their_errors_have_no_order():
    scored = [{**record, "standard_error": error} for record in records([4, 4, 4, 4, 4]) for error in (3.0,)]
    assert not ordered(scored)
    (check,) = all_checks(scored, DIAGNOSTICS)
    assert "samples are not told apart" in check["text"]
    assert ordered(records([4, 4, 4, 4, 4]))  # of errors nothing is known


@pytest.mark.parametrize(
    ("ratio", "noise", "sigmas"), [(1.642, 0.01, ["1e-06"]), (1.642, 0.4, [None, "0.0001"]), (2.05, 0.01, [])]
)
def test_a_sigma_that_does_not_do_comes_with_the_command_for_another(ratio, noise, sigmas):
    measured = {"sigma": 1e-5, "sigma_ratio": ratio, "expected_ratio": 2.0, "noise_share": noise}
    missed = [check for check in self_checks({**DIAGNOSTICS, **measured}) if not check["met"]]
    command = "pyunlearn score --out 'my scores.jsonl' --sigma "
    assert [check.get("command") for check in missed] == [sigma and f"{command}{sigma}" for sigma in sigmas]


def test_a_model_that_knows_nothing_is_told():
    for nll, met in ((6.5, False), (0.4, True)):
        checks = self_checks({**DIAGNOSTICS, "nll_a_token": nll, "uniform_nll": 6.9})
        assert all(check["met"] for check in checks) == met
        assert (
            met
            or "knows next to nothing of these rows: 6.50 nats a token, a uniform guess has 6.90" in checks[0]["text"]
        )
