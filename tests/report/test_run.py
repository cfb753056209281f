from __future__ import annotations

import re

import pytest

from pyunlearn.report.run import curves_figure, render_report
from pyunlearn.runs.sections import GoalConfig
from pyunlearn.runs.table import columns, make_table, table_markdown
from pyunlearn.runs.verdict import check_goals, reach_verdict

BEFORE = {"forget": {"probability": 0.9}, "retain": {"probability": 0.8, "rouge_l": 0.5}}
AFTER = {"forget": {"probability": 0.05}, "retain": {"probability": 0.7, "rouge_l": 0.5}}


def records_of(forget, retain):
    rows = [{"probability": p} for p in retain]
    return {"forget": [{"probability": p} for p in forget], "retain": [{**rows[0], "rouge_l": 0.5}, *rows[1:]]}


RECORDS = records_of([0.85, 0.95], [0.8, 0.9, 0.7]), records_of([0.0, 0.1], [0.6, 0.85, 0.65])


def record(probability, **more):
    return {"question": "Q <script>alert(1)</script>", "answer": "A & B", "probability": probability, **more}


def test_the_table():
    table = make_table({"before": BEFORE, "after": AFTER}, *RECORDS)
    assert [(row["set"], row["metric"], row["before"], row["after"], row["samples"]) for row in table] == [
        ("forget", "probability", 0.9, 0.05, 2),
        ("retain", "probability", 0.8, 0.7, 3),
        ("retain", "rouge_l", 0.5, 0.5, 1),
    ]
    assert table[0]["change"] == pytest.approx(-0.85)
    assert columns(table) == ["before", "after", "change"]
    lines = table_markdown(table).splitlines()
    assert lines[0] == "| set | metric | before | after | change | samples |"
    assert table[0]["interval"] == pytest.approx([-0.85, -0.85])  # each sample's change is the same
    low, high = table[1]["interval"]
    assert -0.2001 < low < -0.1 < high < -0.0499
    assert lines[3] == f"| retain | probability | 0.8000 | 0.7000 | -0.1000 [{low:+.3f}, {high:+.3f}] | 3 |"
    assert table[2]["interval"] is None  # one sample


def test_other_models_have_columns_where_they_were_measured():
    moments = {
        "before": BEFORE,
        "after": AFTER,
        "random": {"forget": {"probability": 0.01}, "retain": {"probability": 0.5}},
    }
    table = make_table(moments, *RECORDS)
    assert columns(table) == ["before", "after", "change", "random"]
    assert [row.get("random") for row in table] == [0.01, 0.5, None]
    lines = table_markdown(table).splitlines()
    assert lines[2] == "| forget | probability | 0.9000 | 0.0500 | -0.8500 [-0.850, -0.850] | 0.0100 | 2 |"
    assert lines[4] == "| retain | rouge_l | 0.5000 | 0.5000 | +0.0000 |  | 1 |"


def test_curves_are_told_apart_without_colour():
    sets = {name: {"probability": 0.5, "rouge_l": 0.25} for name in ("forget", "retain", "holdout")}
    svg = curves_figure({0: sets, 4: sets, 8: sets})
    assert all(name in svg for name in (*sets, "rouge l", "probability", "optimiser step"))
    drawn = re.findall(r'clip-path="[^"]*" style="fill: none; (?:stroke-dasharray: ([\d.,]+);[^"]*)?stroke: #', svg)
    assert len(set(drawn)) == 3


def test_what_a_model_or_a_file_says_is_escaped():
    records = {"forget": [record(0.9, generated="<img src=x onerror=alert(1)>")], "retain": [record(0.5)]}
    config = {
        "name": "<b>bold</b>",
        "seed": 0,
        "model": {"name_or_path": "m"},
        "unlearn": {"forget": [{"name": "wga", "coefficient": 1.0}], "retain": [], "learning_rate": 1e-5},
        "evaluate": {"rouge_samples": None},
    }
    metrics = [{"stage": "unlearn", "step": step, "loss": 1.0, "forget.wga/loss": -0.1} for step in (1, 2)]
    html = render_report(
        config=config,
        config_text="a: <i>",
        table=make_table({"before": BEFORE, "after": AFTER}, records, records),
        goals=(goals := check_goals(BEFORE, AFTER, GoalConfig())),
        verdict=reach_verdict(BEFORE, GoalConfig(), goals).as_dict(),
        made={"command": "pyunlearn run --set name='<b>bold</b>'"},
        metrics=metrics,
        curves={},
        records={"before": records, "after": records},
    )
    for raw in ("<script>alert", "<img", "<b>bold", "<i>"):
        assert raw not in html
    assert html.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "A &amp; B" in html
    assert html.count("<svg") == 5  # a loss, metrics and probabilities of two sets
    assert "1·wga" in html
    assert html.index("Lost utility") < html.index("What the model says") < html.index("Before and after")
