"""A run's outcome: every metric of every model that was evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import ANCHORS

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
