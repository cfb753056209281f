"""The page that shows several runs side by side: forgetting against utility, and what the runs differ in."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from scipy.stats import t as student

from ..metrics.utility import FEW, utility_set
from .figures import STYLE, as_label, new_figure, render, to_panels

# told apart by shape and dash first, by hue second
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":", "-.")
HUES = ("#c2410c", "#1d4ed8", "#0f766e", "#7c3aed", "#a16207", "#be185d")
TOLD_APART = math.lcm(len(MARKERS), len(HUES))  # until both begin anew together
METRIC = "probability"
MANY, LEGEND = 8, 3  # groups that have a column each, and room beside the points; columns of the legend of more

LEVEL = 0.95  # of intervals over seeds
NO_OTHER_SAMPLES = {"data.refusals", "data.max_length", "data.num_unknown"}  # settings that leave sets as they are
Column = tuple[str, str]  # set, metric


@dataclass(frozen=True)
class Group:
    """Runs that differ in name and seed alone.

    values: (set, metric) -> {"before": one number a run, "after": ...}; intervals: the same, of each number that
    interval over samples that its run has, or None; settings: flat, by dotted key. steps: per run,
    {step: {set: {metric: mean}}} of the evaluations on its way. verdicts: of those runs that have one.
    """

    name: str
    folders: list[Path]
    seeds: list[int]
    settings: dict[str, Any]
    values: dict[Column, dict[str, list[float]]]
    steps: list[dict[int, dict[str, dict[str, float]]]]
    intervals: dict[Column, dict[str, list[list[float] | None]]] = field(default_factory=dict)
    verdicts: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`forgot cleanly`, `forgot cleanly (2), lost utility (1)`, or a dash."""
        counts = Counter(self.verdicts)
        alone = len(counts) == 1
        return ", ".join(name if alone else f"{name} ({n})" for name, n in counts.most_common()) or "–"

    def mean(self, column: Column, moment: str = "after") -> float | None:
        """Over the runs; None where they have no such value."""
        values = self.values.get(column, {}).get(moment)
        return statistics.fmean(values) if values else None

    def half_width(self, column: Column, moment: str = "after") -> float | None:
        """Of the 95 % interval of that mean over seeds (Student's t); None for a single run."""
        values = self.values.get(column, {}).get(moment, [])
        if len(values) < 2:
            return None
        spread = statistics.stdev(values) / math.sqrt(len(values))
        return float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread

    def interval(self, column: Column, moment: str = "after") -> list[float] | None:
        """Of a single run's value: 95 %, over its samples (bootstrap); None for several runs."""
        own = self.intervals.get(column, {}).get(moment, [])
        return own[0] if len(own) == 1 else None

    def text(self, column: Column, moment: str = "after") -> str:
        """`0.123 [0.110, 0.140]` of a single run, `0.123 ± 0.004` of several, `0.123`, or a dash."""
        mean, half = self.mean(column, moment), self.half_width(column, moment)
        own = self.interval(column, moment)
        if mean is None:
            return "–"
        if own is not None:
            return f"{mean:.3f} [{own[0]:.3f}, {own[1]:.3f}]"
        return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


@dataclass(frozen=True)
class Comparison:
    """groups, in the order the runs were named; columns: (set, metric) that any run has; differences: key -> the
    value of each group, of settings that differ; rows: how many each set has, in the run that has the fewest, by which
    `utility` is chosen; note: what the aggregates among the columns are made of."""

    groups: list[Group]
    columns: list[Column]
    differences: dict[str, list[Any]]
    rows: dict[str, int]
    note: str = ""

    @property
    def utility(self) -> str:
        """The set that is told and drawn as what had to stay; `retain` where the runs have none."""
        return utility_set(self.rows) or "retain"

    def before(self, column: Column) -> str:
        """As the first group has it that has it at all; where others began otherwise, `text` has each one's own."""
        if self.differ_before(column):
            return "differs"
        having = (group for group in self.groups if group.mean(column, "before") is not None)
        return next(having, self.groups[0]).text(column, "before")

    def text(self, group: Group, column: Column, intervals: bool = True) -> str:
        """After unlearning; where the groups began otherwise, `0.500 → 0.100`. intervals: over samples, too."""
        moments = ("before", "after") if self.differ_before(column) else ("after",)
        told = [group.text(column, moment) for moment in moments]
        return " → ".join(told if intervals else (each.partition(" [")[0] for each in told))

    def differ_before(self, column: Column) -> bool:
        """Whether the groups' values before unlearning are not the same up to their third digit."""
        values = [group.mean(column, "before") for group in self.groups]
        there = [value for value in values if value is not None]
        return bool(there) and max(there) - min(there) > 5e-4

    @property
    def notes(self) -> list[str]:
        """What has to be known to read table and figure."""
        return [*self.warnings, *self.remarks]

    @property
    def warnings(self) -> list[str]:
        """Those without which the numbers mislead: they go before the table."""
        keys = [key for key in self.differences if key.startswith("data.") and key not in NO_OTHER_SAMPLES]
        drawn = {name: self.rows.get(name, 0) for name in ("forget", self.utility)}
        few = ", ".join(f"{name} {count}" for name, count in drawn.items() if 0 < count < FEW)
        held = self.rows.get("holdout", 0) if self.utility == "retain" else 0
        seen = f"what was kept is told of retain rows, which the unlearning itself may rehearse: {held} were held out"
        alike = not any(self.differ_before(column) for column in self.columns)
        begun = "the runs did not begin alike: where “before” differs, each has its own, before → after"
        return [
            *([f"{seen}, too few to tell much"] if held else []),
            *([f"few rows ({few}): their means tell little, with any number of seeds"] if few else []),
            *([] if alike else [begun]),
            *([f"not the same samples: the runs differ in {', '.join(keys)}"] if keys else []),
        ]

    @property
    def remarks(self) -> list[str]:
        undrawn = [
            f"{group.name} (no {METRIC} of {' and '.join(without)})"
            for group in self.groups
            if (without := [name for name in ("forget", self.utility) if group.mean((name, METRIC)) is None])
        ]
        return [
            *([self.note] if self.note else []),
            *([f"not drawn in the figure: {', '.join(undrawn)}"] if undrawn else []),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "groups": [
                {
                    "name": group.name,
                    "runs": [str(folder) for folder in group.folders],
                    "seeds": group.seeds,
                    "verdicts": group.verdicts,
                    "values": [
                        {"set": name, "metric": metric, "moment": moment, "values": values,
                         "mean": group.mean((name, metric), moment),
                         "half_width_95": group.half_width((name, metric), moment),
                         "interval_95": group.interval((name, metric), moment)}
                        for (name, metric), moments in group.values.items()
                        for moment, values in moments.items()
                    ],
                }
                for group in self.groups
            ],
            "differences": self.differences,
        }  # fmt: skip


def as_text(value: Any) -> str:
    """Of a setting, in words, without what is none or empty in it; a dash for nothing.

    >>> as_text([{"name": "npo", "weight": 0.5, "preset": None, "options": {"beta": 0.1}}, {"name": "gd"}])
    'npo (weight 0.5, beta 0.1), gd'
    """
    if isinstance(value, Mapping):
        flat = {**value, **(value.get("options") or {}), "options": None}
        parts = [f"{k} {as_text(v)}" for k, v in flat.items() if k != "name" and v is not None and v != {}]
        told = f" ({', '.join(parts)})" if "name" in value and parts else ", ".join(parts)
        return f"{value.get('name', '')}{told}" or "–"
    if isinstance(value, list):
        return ", ".join(f"[{as_text(own)}]" if isinstance(own, list) else as_text(own) for own in value) or "none"
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value)


def way_of(steps: Mapping[int, Mapping[str, Mapping[str, float]]], utility: str) -> dict[int, tuple[float, float]]:
    """By step, the probabilities of forget and utility answers on a run's way."""
    return {
        step: (means["forget"][METRIC], means[utility][METRIC])
        for step, means in steps.items()
        if {"forget", utility} <= means.keys()
    }


def trade_figure(groups: Sequence[Group], utility: str) -> Markup:
    """Forgetting to the right, utility to the top, as probabilities of right answers; lines go along the steps."""
    many = len(groups) > MANY
    figure = new_figure(1, 1, height=3.4 + (0.16 * (len(groups) // LEGEND + 2) if many else 0))
    figure.set_figwidth(5.4)
    axes, data = figure.axes[0], []
    for i, group in enumerate(groups):
        style: dict[str, Any] = {"color": HUES[(i + i // TOLD_APART) % len(HUES)], "label": as_label(group.name)}
        for seed, steps in zip(group.seeds, group.steps, strict=True):
            way = way_of(steps, utility)
            axes.plot(
                [1 - forget for forget, _ in way.values()],
                [kept for _, kept in way.values()],
                linestyle=DASHES[i % len(DASHES)],
                linewidth=1.2,
                color=style["color"],
                alpha=0.7,
            )
            of_run = {"name": group.name, "seed": seed}
            data += [{**of_run, "step": step, "forget": forget, utility: kept} for step, (forget, kept) in way.items()]
        forget, kept = group.mean(("forget", METRIC)), group.mean((utility, METRIC))
        if forget is not None and kept is not None:
            data.append({"name": group.name, "seed": "mean", "step": "after", "forget": forget, utility: kept})
            axes.errorbar(
                1 - forget,
                kept,
                xerr=group.half_width(("forget", METRIC)),
                yerr=group.half_width((utility, METRIC)),
                marker=MARKERS[i % len(MARKERS)],
                markersize=7,
                linestyle="none",
                capsize=2,
                **style,
            )
    begun: list[tuple[float, float]] = []  # what is drawn already: runs mostly begin alike
    for group in groups:
        forget, kept = group.mean(("forget", METRIC), "before"), group.mean((utility, METRIC), "before")
        if forget is None or kept is None or any(math.dist((forget, kept), other) <= 5e-4 for other in begun):
            continue
        data.append({"name": group.name, "seed": "mean", "step": "before", "forget": forget, utility: kept})
        label = None if begun else "before"
        axes.plot(1 - forget, kept, "o", mfc="white", mec="#334155", markersize=7, label=label)
        begun.append((forget, kept))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set(xlabel="forgotten: 1 - probability of forget answers", ylabel=f"kept: probability of {utility} answers")
    if many:
        axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.16), ncols=LEGEND)
    else:
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    return to_panels(figure, "Forgetting against utility of every run", data)


def render_comparison(comparison: Comparison, links: Mapping[str, str]) -> str:
    """The page. links: from the page to each run's report, by the run's folder."""
    utility = comparison.utility
    drawn = any(group.mean((utility, METRIC)) is not None for group in comparison.groups)
    with matplotlib.rc_context(STYLE):
        svg = trade_figure(comparison.groups, utility) if drawn else None
    rows = [
        {
            "set": name,
            "metric": metric,
            "before": comparison.before((name, metric)),
            "after": [comparison.text(group, (name, metric)) for group in comparison.groups],
        }
        for name, metric in comparison.columns
    ]
    heads = [
        {
            "name": group.name,
            "verdict": group.verdict,
            "runs": [(seed, links[str(f)]) for seed, f in zip(group.seeds, group.folders, strict=True)],
        }
        for group in comparison.groups
    ]
    differences = {key: [as_text(value) for value in values] for key, values in comparison.differences.items()}
    seeds = any(len(group.folders) > 1 for group in comparison.groups)
    return render(
        "compare.html",
        heads=heads,
        rows=rows,
        svg=svg,
        utility=utility,
        differences=differences,
        seeds=seeds,
        samples=any(group.interval(column) for group in comparison.groups for column in comparison.columns),
        many=len(heads) > MANY,
        lines=any(len(way_of(steps, utility)) > 1 for group in comparison.groups for steps in group.steps),
        warnings=comparison.warnings,
        notes=comparison.remarks,
    )
