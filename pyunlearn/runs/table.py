"""A run's outcome: every metric of every model that was evaluated, and how sure its change is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics import difference_interval
from .sections import ANCHORS

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # set name -> one record a sample
Row = Mapping[str, Any]
COLUMNS = ("before", "after", "change", *ANCHORS)
RESAMPLES = 1999  # of the samples, for an interval


def make_table(moments: Mapping[str, Summaries], before: Records, after: Records) -> list[dict[str, Any]]:
    """One row per set and metric: {"set", "metric", "before", "after", "change", "interval", "samples"}, and what an
    anchor has there.

    moments: what was evaluated: before, after, and any of the anchors. before, after: their records. interval: 95 %, of
    the change over such samples (bootstrap, paired by sample; the training's own chance is not in it), None where it
    has none. samples: how many the value is the mean of.
    """
    rows = []
    for name, first in moments["before"].items():
        for metric in first:
            values = {moment: means[name][metric] for moment, means in moments.items() if metric in means.get(name, {})}
            if "after" not in values:
                continue
            values["change"] = values["after"] - values["before"]
            ordered = {column: values[column] for column in COLUMNS if column in values}
            then, now = ([record.get(metric) for record in records[name]] for records in (before, after))
            change = difference_interval(then, now, num_resamples=RESAMPLES)
            interval = None if change.low is None else [change.low, change.high]
            rows.append({"set": name, "metric": metric, **ordered, "interval": interval, "samples": change.num_samples})
    return rows


def columns(table: Sequence[Row]) -> list[str]:
    """The columns of values that the table has."""
    return [column for column in COLUMNS if any(column in row for row in table)]


def cell(row: Row, column: str) -> str:
    if column not in row:
        return ""
    return f"{row[column]:{'+' if column == 'change' else ''}.4f}"


def with_interval(row: Row, column: str) -> str:
    bounds = row["interval"] if column == "change" else None
    return cell(row, column) + ("" if bounds is None else f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]")


def table_markdown(table: Sequence[Row]) -> str:
    names = columns(table)
    lines = [f"| set | metric | {' | '.join(names)} | samples |", f"|---|---|{'---:|' * len(names)}---:|"]
    for row in table:
        cells = [row["set"], row["metric"], *(with_interval(row, name) for name in names), str(row["samples"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
