"""A run's outcome: every metric of every model that was evaluated, and how sure its change is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics import Interval, difference_interval, mean_interval
from ..metrics.utility import FEW
from .evaluate_config import ANCHORS

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # set name -> one record a sample
Row = Mapping[str, Any]
COLUMNS = ("before", "after", "change", *ANCHORS)
WIDE = 1e7  # from which a number is told by its power of ten
RESAMPLES = 1999  # of the samples, for an interval


def make_table(moments: Mapping[str, Summaries], records: Mapping[str, Records]) -> list[dict[str, Any]]:
    """One row per set and metric: {"set", "metric", "before", "after", "change", "interval", "intervals", "samples"},
    and what an anchor has there.

    moments, records: what was evaluated: before, after, and any of the anchors. intervals: 95 %, of every model's mean
    over such samples, by the model's column; interval: that of the change, paired by sample. All are bootstrap ones,
    with one seed; None where there is none; the training's own chance is not in them. samples: how many the change is
    the mean of.
    """
    rows = []
    for name, first in moments["before"].items():
        for metric in first:
            values = {moment: means[name][metric] for moment, means in moments.items() if metric in means.get(name, {})}
            if "after" not in values:
                continue
            samples = {moment: [record.get(metric) for record in records[moment][name]] for moment in values}
            change = difference_interval(samples["before"], samples["after"], num_resamples=RESAMPLES)
            intervals = {moment: bounds(mean_interval(own, num_resamples=RESAMPLES)) for moment, own in samples.items()}
            values["change"] = values["after"] - values["before"]
            ordered = {column: values[column] for column in COLUMNS if column in values}
            told = {"interval": bounds(change), "intervals": intervals, "samples": change.num_samples}
            rows.append({"set": name, "metric": metric, **ordered, **told})
    return rows


def rows_of_sets(table: Sequence[Row]) -> dict[str, int]:
    """How many rows each set has: the samples of the metric that has the most, since some are of the first few alone.

    Enough of them where a table does not tell.
    """
    rows: dict[str, int] = {}
    for row in table:
        samples = row.get("samples")
        rows[row["set"]] = max(rows.get(row["set"], 0), samples if isinstance(samples, int) else FEW)
    return rows


def bounds(interval: Interval) -> list[float] | None:
    return None if interval.low is None or interval.high is None else [interval.low, interval.high]


def columns(table: Sequence[Row]) -> list[str]:
    """The columns of values that the table has."""
    return [column for column in COLUMNS if any(column in row for row in table)]


def cell(row: Row, column: str, digits: int = 4) -> str:
    if column not in row:
        return ""
    return as_number(row[column], digits, "+" if column == "change" else "")


def as_number(value: float, digits: int = 4, sign: str = "") -> str:
    """digits: after the point, or where that would be a row of digits in front of it (perplexities), in all."""
    return f"{value:{sign}.{digits}{'f' if abs(value) < WIDE else 'g'}}"


def with_interval(row: Row, column: str, digits: int = 4) -> str:
    """`0.9750 [0.960, 0.990]`. digits: of the value."""
    own, sign = (row["interval"], "+") if column == "change" else (row["intervals"].get(column), "")
    told = "" if own is None else f" [{as_number(own[0], 3, sign)}, {as_number(own[1], 3, sign)}]"
    return cell(row, column, digits) + told


def table_markdown(table: Sequence[Row]) -> str:
    names = columns(table)
    lines = [f"| set | metric | {' | '.join(names)} | samples |", f"|---|---|{'---:|' * len(names)}---:|"]
    for row in table:
        cells = [row["set"], row["metric"], *(with_interval(row, name) for name in names), str(row["samples"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
