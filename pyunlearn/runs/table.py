"""A run's outcome: every metric of every model that was evaluated, and whether the goals were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import ANCHORS, GoalConfig

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # set name -> one record a sample
Row = Mapping[str, Any]
COLUMNS = ("before", "after", "change", *ANCHORS)


def make_table(moments: Mapping[str, Summaries], records: Records) -> list[dict[str, Any]]:
    """One row per set and metric: {"set", "metric", "before", "after", "change", "samples"}, and an anchor's value.

    moments: what was evaluated: before, after, and any of the anchors. records: of one of them; samples: how many of
    those the value is the mean of.
    """
    rows = []
    for name, first in moments["before"].items():
        for metric in first:
            values = {moment: means[name][metric] for moment, means in moments.items() if metric in means.get(name, {})}
            if "after" not in values:
                continue
            values["change"] = values["after"] - values["before"]
            ordered = {column: values[column] for column in COLUMNS if column in values}
            samples = sum(metric in record for record in records[name])
            rows.append({"set": name, "metric": metric, **ordered, "samples": samples})
    return rows


def columns(table: Sequence[Row]) -> list[str]:
    """The columns of values that the table has."""
    return [column for column in COLUMNS if any(column in row for row in table)]


def cell(row: Row, column: str) -> str:
    if column not in row:
        return ""
    return f"{row[column]:{'+' if column == 'change' else ''}.4f}"


def table_markdown(table: Sequence[Row]) -> str:
    names = columns(table)
    lines = [f"| set | metric | {' | '.join(names)} | samples |", f"|---|---|{'---:|' * len(names)}---:|"]
    for row in table:
        cells = [row["set"], row["metric"], *(cell(row, name) for name in names), str(row["samples"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def check_goal(before: Summaries, after: Summaries, goal: GoalConfig) -> list[dict[str, Any]]:
    """What the run had to reach: {"text", "value", "met"} for the forget and the retain probability, the latter of the
    rows held out, where there are any."""
    kept = "holdout" if "holdout" in before else "retain"
    (forget_before, forget), (retain_before, retain) = (
        (before[name]["probability"], after[name]["probability"]) for name in ("forget", kept)
    )
    share, limit = retain / max(retain_before, 1e-12), goal.forget_probability_below
    nothing = "; there was nothing to forget" if forget_before < limit else ""
    whose = "retain probability of held-out rows" if kept == "holdout" else "retain probability"
    return [
        {
            "text": f"forget probability {forget_before:.3f} -> {forget:.3f}, wanted below {limit:g}{nothing}",
            "value": forget,
            "met": forget < limit <= forget_before,
        },
        {
            "text": f"{whose} {retain_before:.3f} -> {retain:.3f}, {share:.1%} of before, wanted at least "
            f"{goal.retain_probability_kept:.0%}",
            "value": share,
            "met": share >= goal.retain_probability_kept,
        },
    ]
