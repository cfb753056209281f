"""Goals and the one verdict on a run, from means as evaluations leave them."""

from __future__ import annotations

import pytest

from pyunlearn.runs.evaluate_config import GoalConfig
from pyunlearn.runs.verdict import (
    ADVICE,
    CLEAN,
    COLLAPSED,
    KNOWS,
    LOST,
    NOTHING,
    REWORDS,
    UNSURE,
    check_goals,
    reach_verdict,
)

BEFORE = {
    "forget": {"probability": 0.9, "rouge_l": 0.95, "fluency": 1.0},
    "retain": {"probability": 0.8, "rouge_l": 0.9, "fluency": 1.0},
}

ROWS = {"forget": 20, "retain": 20}
HELD = {**ROWS, "holdout": 20}


def after(forget=0.05, recall=0.1, fluency=1.0, retain=0.79, **sets):
    return {
        "forget": {"probability": forget, "rouge_l": recall, "fluency": fluency},
        "retain": {"probability": retain, "rouge_l": retain, "fluency": 1.0},
        **sets,
    }


def verdict(means, before=BEFORE, rows=ROWS):
    return reach_verdict(before, GoalConfig(), check_goals(before, means, GoalConfig(), rows))


@pytest.mark.parametrize(
    ("means", "name", "numbers"),
    [
        (after(), CLEAN, "100.0% -> 100.0%"),
        (after(forget=0.3), KNOWS, "0.900 -> 0.300"),
        (after(recall=0.6), REWORDS, "95.0% -> 60.0%"),
        (after(retain=0.6), LOST, "75.0% of before"),
        (after(fluency=0.5), COLLAPSED, "100.0% -> 50.0%"),
        (after(fluency=0.0, retain=0.0), COLLAPSED, "0.0% of before"),  # it is what became of the rest, too
        (after(forget=0.3, retain=0.0, fluency=0.0), KNOWS, "0.300"),
    ],
)
def test_the_gravest_wrong_decides(means, name, numbers):
    reached = verdict(means)
    assert (reached.name, reached.clean) == (name, name == CLEAN)
    assert numbers in reached.reason
    assert reached.advice == ADVICE[name]


def test_nothing_to_forget_is_not_forgetting():
    before = {**BEFORE, "forget": {**BEFORE["forget"], "probability": 0.05}}
    assert verdict(after(), before).name == NOTHING
    assert not check_goals(before, after(), GoalConfig(), ROWS)[0]["met"]


def test_what_was_not_measured_is_not_claimed():
    before = {name: {"probability": means["probability"]} for name, means in BEFORE.items()}
    then = {name: {"probability": means["probability"]} for name, means in after().items()}
    reached = verdict(then, before)
    assert (reached.name, reached.clean) == (UNSURE, False)
    assert reached.reason.startswith("rouge_l is not among the metrics, ")
    assert "; fluency is not among the metrics, " in reached.reason
    assert [goal["name"] for goal in check_goals(before, then, GoalConfig(), ROWS)] == ["forget", "retain"]


def test_goals_have_their_numbers():
    forget, retain, words, fluency = check_goals(BEFORE, after(retain=0.7, fluency=0.75), GoalConfig(), ROWS)
    assert forget["text"] == "forget probability 0.900 -> 0.050, wanted below 0.1"
    assert [goal["met"] for goal in (forget, retain, words, fluency)] == [True, False, True, False]
    assert retain["value"] == pytest.approx(0.875)
    assert "87.5% of before, wanted at least 90%" in retain["text"]
    goals = check_goals(
        BEFORE, after(retain=0.7, fluency=0.75), GoalConfig(retain_probability_kept=0.8, fluent_share=0.7), ROWS
    )
    assert all(goal["met"] for goal in goals)


def test_few_rows_are_told():
    forget, retain, *_ = check_goals(BEFORE, after(), GoalConfig(), {"forget": 9, "retain": 10})
    assert forget["text"].endswith("wanted below 0.1; of 9 rows only, too few to tell much")
    assert "rows only" not in retain["text"]


def test_held_out_rows_decide_where_there_are_any():
    before = {**BEFORE, "holdout": {"probability": 0.6, "rouge_l": 0.9, "fluency": 1.0}}
    then = after(retain=0.1, holdout={"probability": 0.57, "rouge_l": 0.9, "fluency": 1.0})
    retain = check_goals(before, then, GoalConfig(), HELD)[1]
    assert retain["met"]
    assert retain["text"].startswith("retain probability of held-out rows 0.600 -> 0.570, 95.0% of before, wanted")
    assert verdict(then, before, HELD).clean


def test_rows_that_may_be_rehearsed_say_so():
    def text(**sets):
        return check_goals({**BEFORE, **sets}, after(**sets), GoalConfig(), HELD)[1]["text"]

    assert text().startswith("retain probability, of rows that the unlearning itself may rehearse, 0.800 -> 0.790")
    assert text(holdout=BEFORE["retain"]).startswith("retain probability of held-out rows 0.800 -> 0.800")


def test_too_few_rows_held_out_decide_nothing():
    def text(**rows):
        sets = {"holdout": {"probability": 0.1}}
        return check_goals({**BEFORE, "holdout": BEFORE["retain"]}, after(**sets), GoalConfig(), rows)[1]["text"]

    assert "held-out rows 0.800 -> 0.100" in text(retain=100, holdout=10, forget=20)
    assert "may rehearse, 0.800 -> 0.790" in text(retain=10, holdout=1, forget=20)
    assert "held-out rows" in text(retain=9, holdout=1, forget=20)
    assert text(retain=9, holdout=1, forget=20).endswith("of 1 row only, too few to tell much")
