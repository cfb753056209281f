"""Whose answers have to stay: the verdict, a calibration, a comparison and a sweep say the same."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from pyunlearn.metrics.utility import utility_set
from pyunlearn.report.compare import render_comparison
from pyunlearn.runs.compare import compare_runs
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.evaluate_config import GoalConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.pair import Pair
from pyunlearn.runs.sweep import Sweep, summary, tell_ended
from pyunlearn.runs.table import make_table, rows_of_sets
from pyunlearn.runs.verdict import check_goals
from pyunlearn.runs.workers import FINISHED, Outcome

BEFORE, AFTER = {"forget": 0.9, "retain": 0.8, "holdout": 0.7}, {"forget": 0.1, "retain": 0.75, "holdout": 0.6}
REHEARSED = "what was kept is told of retain rows, which the unlearning itself may rehearse: 6 were held out"


def means(values, rows):
    return {name: {"probability": values[name]} for name in rows}


def table_of(rows):
    records = {name: [{"probability": 0.5}] * count for name, count in rows.items()}
    return make_table(
        {"before": means(BEFORE, rows), "after": means(AFTER, rows)}, {"before": records, "after": records}
    )


@pytest.fixture
def finished(tmp_path):
    """Makes the folder of a finished run of so many rows."""

    def make(rows, name="run"):
        folder = RunFolder(tmp_path / name)
        folder.open(RunConfig.model_validate({"name": name}))
        (folder.path / "table.json").write_text(json.dumps({"table": table_of(rows), "goals": []}))
        return folder.path

    return make


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ({"holdout": 6, "retain": 54}, "retain"),
        ({"holdout": 3, "retain": 8}, "holdout"),
        ({"holdout": 9, "retain": 10}, "retain"),
        ({"holdout": 10, "retain": 100}, "holdout"),
        ({"holdout": 9, "retain": 9}, "holdout"),
        ({"holdout": 3}, "holdout"),
        ({"retain": 3}, "retain"),
    ],
)
def test_all_say_the_same(rows, name, finished, monkeypatch):
    rows = {"forget": 20, **rows}
    assert utility_set(rows) == name

    goals = check_goals(means(BEFORE, rows), means(AFTER, rows), GoalConfig(), rows)
    assert goals[1]["value"] == AFTER[name] / BEFORE[name]

    monkeypatch.setattr(Pair, "sets", lambda _: {each: [None] * count for each, count in rows.items()})
    assert Pair(None, None, None).kept_set(None) == name

    path = finished(rows)
    comparison = compare_runs([path])
    assert comparison.rows == rows
    assert comparison.utility == name
    assert f"kept that of {name} probability" in comparison.note
    assert f"kept: probability of {name} answers" in render_comparison(comparison, {str(path): ""})

    heads = [str(column.header).split() for column in summary(comparison).columns]
    assert [head for head in heads if head[0] in ("holdout", "retain")] == [[name, "prob."]]
    cell = SimpleNamespace(name="npo", seed=0)
    with Console(record=True, width=200) as console:
        job = Sweep(None, [], path)
        tell_ended(job, cell, Outcome(FINISHED, value=table_of(rows)), console)
    assert f"{name} probability {BEFORE[name]:.3f} -> {AFTER[name]:.3f}" in console.export_text()


def test_none_where_nothing_has_to_stay(finished):
    assert utility_set({"forget": 20, "real_authors": 100}) is None
    comparison = compare_runs([finished({"forget": 20})])
    assert (comparison.utility, comparison.note) == ("retain", "")


def test_it_is_told_that_held_out_rows_were_too_few(finished):
    told = f"{REHEARSED}, too few to tell much"
    assert told in compare_runs([finished({"forget": 20, "holdout": 6, "retain": 54})]).notes
    notes = compare_runs([finished({"forget": 20, "holdout": 3, "retain": 8}, "few")]).notes
    assert "few rows (holdout 3): their means tell little, with any number of seeds" in notes
    assert not any("rehearse" in note for note in notes)


def test_one_set_for_all_runs(finished):
    """The one by which the run with the fewest rows can be told; of those that all have."""
    many, few, none = (
        finished({"forget": 20, "retain": 60, **held}, name)
        for name, held in (("many", {"holdout": 20}), ("few", {"holdout": 6}), ("none", {}))
    )
    assert compare_runs([many]).utility == "holdout"
    assert compare_runs([many, few]).rows == {"forget": 20, "retain": 60, "holdout": 6}
    assert compare_runs([many, few]).utility == compare_runs([many, none]).utility == "retain"
    forgets = finished({"forget": 20}, "forgets")
    assert compare_runs([many, forgets]).utility == "holdout"  # of the one that has any


def test_rows_are_those_of_the_metric_that_has_the_most():
    table = [
        {"set": "retain", "metric": "probability", "samples": 12},
        {"set": "retain", "metric": "rouge_l", "samples": 4},
    ]
    assert rows_of_sets(table) == {"retain": 12}
    assert (
        utility_set(rows_of_sets([{"set": name, "metric": "probability"} for name in ("holdout", "retain")]))
        == "holdout"
    )
