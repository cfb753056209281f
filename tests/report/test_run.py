from __future__ import annotations

import re

import numpy as np
import pytest

from pyunlearn.metrics import mean_interval
from pyunlearn.report.figures import as_label
from pyunlearn.report.run import curves_figure, metrics_figure, render_report
from pyunlearn.runs.evaluate_config import GoalConfig
from pyunlearn.runs.table import RESAMPLES, columns, make_table, table_markdown
from pyunlearn.runs.verdict import check_goals, reach_verdict

BEFORE = {"forget": {"probability": 0.9}, "retain": {"probability": 0.8, "rouge_l": 0.5}}
AFTER = {"forget": {"probability": 0.05}, "retain": {"probability": 0.7, "rouge_l": 0.5}}


def records_of(forget, retain):
    rows = [{"probability": p} for p in retain]
    return {"forget": [{"probability": p} for p in forget], "retain": [{**rows[0], "rouge_l": 0.5}, *rows[1:]]}


RECORDS = {
    "before": records_of([0.85, 0.95], [0.8, 0.9, 0.7]),
    "after": records_of([0.0, 0.1], [0.6, 0.85, 0.65]),
    "random": records_of([0.01, 0.01], [0.4, 0.5, 0.6]),
}


def record(probability, **more):
    return {"question": "Q <script>alert(1)</script>", "answer": "A & B", "probability": probability, **more}


def test_the_table():
    table = make_table({"before": BEFORE, "after": AFTER}, RECORDS)
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
    cells = lines[3].strip("| ").split(" | ")
    assert cells[4:] == [f"-0.1000 [{low:+.3f}, {high:+.3f}]", "3"]
    for place, (moment, mean) in enumerate({"before": 0.8, "after": 0.7}.items(), start=2):
        own = mean_interval([record["probability"] for record in RECORDS[moment]["retain"]], num_resamples=RESAMPLES)
        assert table[1]["intervals"][moment] == [own.low, own.high]
        assert cells[place] == f"{mean:.4f} [{own.low:.3f}, {own.high:.3f}]"
    assert table[2]["interval"] is None  # one sample
    assert table[2]["intervals"] == {"before": None, "after": None}
    assert lines[4] == "| retain | rouge_l | 0.5000 | 0.5000 | +0.0000 | 1 |"


def test_intervals_of_a_table_hold_the_means_that_samples_are_drawn_from():
    """Of 120 tables, 95 % should; 6 are expected not to, and 15 or more, or none, have a chance below 1 %."""
    draw, misses = np.random.default_rng(0), {"before": 0, "after": 0, "interval": 0}
    parameters = {"before": (8, 2), "after": (1, 3)}  # of beta distributions, whose means are 0.8 and 0.25
    for _ in range(120):
        drawn = {moment: draw.beta(*own, 40) for moment, own in parameters.items()}
        records = {moment: {"forget": [{"probability": p} for p in own.tolist()]} for moment, own in drawn.items()}
        means = {moment: {"forget": {"probability": float(own.mean())}} for moment, own in drawn.items()}
        (row,) = make_table(means, records)
        bounds = {**row["intervals"], "interval": row["interval"]}
        for key, truth in {"before": 0.8, "after": 0.25, "interval": -0.55}.items():
            misses[key] += not bounds[key][0] <= truth <= bounds[key][1]
    assert all(1 <= count <= 14 for count in misses.values())


def test_other_models_have_columns_where_they_were_measured():
    moments = {
        "before": BEFORE,
        "after": AFTER,
        "random": {"forget": {"probability": 0.01}, "retain": {"probability": 0.5}},
    }
    table = make_table(moments, RECORDS)
    assert columns(table) == ["before", "after", "change", "random"]
    assert [row.get("random") for row in table] == [0.01, 0.5, None]
    lines = table_markdown(table).splitlines()
    cells = lines[2].strip("| ").split(" | ")
    assert cells[:2] + cells[4:] == ["forget", "probability", "-0.8500 [-0.850, -0.850]", "0.0100 [0.010, 0.010]", "2"]
    assert lines[4] == "| retain | rouge_l | 0.5000 | 0.5000 | +0.0000 |  | 1 |"


def test_curves_are_told_apart_without_colour():
    sets = {name: {"probability": 0.5, "rouge_l": 0.25} for name in ("forget", "retain", "holdout")}
    svg = curves_figure({0: sets, 4: sets, 8: sets})
    assert all(name in svg for name in (*sets, "rouge l", "probability", "optimiser step"))
    drawn = re.findall(r'clip-path="[^"]*" style="fill: none; (?:stroke-dasharray: ([\d.,]+);[^"]*)?stroke: #', svg)
    assert len(set(drawn)) == 3


def test_a_mean_that_one_evaluation_lacks_is_a_gap_and_any_name_is_in_the_legend():
    svg = curves_figure({0: {"_own": {"probability": 0.5, "naturalness": 3.0}}, 4: {"_own": {"probability": 0.5}}})
    assert svg.count(" _own") == 2
    assert as_label("cost$\\frac$") == "cost\\$\\frac\\$"


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
        table=make_table({"before": BEFORE, "after": AFTER}, {"before": records, "after": records}),
        goals=(goals := check_goals(BEFORE, AFTER, GoalConfig(), {"forget": 1, "retain": 1})),
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


def test_what_is_no_share_is_drawn_to_scale():
    table = [
        {"set": "forget", "metric": metric, "before": before, "after": after, "random": 0.0}
        for metric, before, after in (("naturalness", 4.0, 1.0), ("perplexity", 20.0, 80.0), ("rouge_l", 0.5, 1.0))
    ]
    (axes,) = metrics_figure(table).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["rouge l", "perplexity / 80", "naturalness / 4"]
    for line in axes.lines:
        assert all(0 <= x <= 1 for x in line.get_xdata())
