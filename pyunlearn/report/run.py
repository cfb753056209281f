"""The self-contained HTML report of a run (inline SVG and script, no outside resource)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from .figures import COLOURS, DASHES, MARKERS, OTHER, STYLE, as_label, in_words, new_figure, render, to_panels
from .samples import STATES, Records, list_samples

OTHER_LINES = (("-.", "D"), ((0, (5, 1)), "v"), ((0, (1, 3)), "x"))  # of sets of other names
MARKS = {"retrained": "D", "random": "x"}
# what each goal asks, in a word, and the picture for it
CARDS = {
    "forget": {"question": "Forgot?", "icon": "◌"},
    "retain": {"question": "What did it cost?", "icon": "⚖"},
    "words": {"question": "In other words?", "icon": "❝"},
    "fluency": {"question": "Still fluent?", "icon": "✎"},
}
Means = Mapping[str, Mapping[str, float]]  # set name -> metric -> mean
KNOWN_FROM = 0.1  # probability of an answer that counts as known, where there is no goal


def panels(names: Sequence[str], height: float = 2.3) -> Figure:
    """A figure with axes for each of them, three a row at most."""
    columns = min(len(names), 3)
    figure = new_figure(math.ceil(len(names) / columns), columns, height)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return figure


def loss_figure(rows: Sequence[Mapping[str, Any]], stage: str) -> Markup:
    """Loss of each term over the optimiser steps of one stage."""
    rows = [row for row in rows if row["stage"] == stage]
    terms = sorted({key for row in rows for key in row if key.endswith("/loss")})
    figure = panels(terms)
    for axes, key in zip(figure.axes, terms, strict=True):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        name = key.removesuffix("/loss")
        role = name.split(".")[0]
        axes.plot(*zip(*points, strict=True), DASHES[role], color=COLOURS[role], linewidth=1.4)
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.set_title(name)
    return to_panels(figure, f"loss of {stage}", [{key: row.get(key) for key in ("step", *terms)} for row in rows])


def metrics_figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Every metric before (open mark) and after (filled), a line each, and of other models by MARKS; a panel a set."""
    metrics, sets = (list(dict.fromkeys(row[key] for row in table)) for key in ("metric", "set"))
    figure = panels(sets, height=0.34 * len(metrics) + 1.1)
    scales = {metric: scale_of(metric, table) for metric in metrics}
    for axes, name in zip(figure.axes, sets, strict=True):
        colour = COLOURS.get(name, OTHER)
        for y, metric in enumerate(reversed(metrics)):
            for row in table:
                if (row["set"], row["metric"]) == (name, metric):
                    before, after = (row[moment] / scales[metric] for moment in ("before", "after"))
                    axes.plot([before, after], [y, y], color=colour, linewidth=2, alpha=0.35)
                    mark = MARKERS.get(name, "D")
                    axes.plot(before, y, mark, mfc="white", mec=colour, markersize=6)
                    axes.plot(after, y, mark, color=colour, markersize=6)
                    for model, other in MARKS.items():
                        if model in row:
                            place = row[model] / scales[metric], y + 0.2
                            axes.plot(*place, other, mfc="white", color="#334155", markersize=5)
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.6, len(metrics) - 0.4))
        axes.set_title(name)
        names = [in_words(each) + (f" / {scales[each]:.3g}" if scales[each] > 1 else "") for each in reversed(metrics)]
        axes.set_yticks(range(len(metrics)), names)
    return figure


def scale_of(metric: str, table: Sequence[Mapping[str, Any]]) -> float:
    """What its values are divided by to be drawn from 0 to 1: 1 for shares."""
    values = [row[moment] for row in table if row["metric"] == metric for moment in ("before", "after", *MARKS)
              if moment in row]  # fmt: skip
    return max(1.0, *(abs(value) for value in values))


def curves_figure(curves: Mapping[int, Means]) -> Markup:
    """Each metric over the optimiser steps, a line a set, told apart by dash and marker as well as by colour."""
    first = next(iter(curves.values()))
    metrics = list(dict.fromkeys(metric for means in first.values() for metric in means))
    figure = panels(metrics)
    for axes, metric in zip(figure.axes, metrics, strict=True):
        others = cycle(OTHER_LINES)
        drawn: list[float] = []
        for name, means in first.items():
            dash, marker = (DASHES[name], MARKERS[name]) if name in DASHES else next(others)
            if metric in means:
                values = [at[name].get(metric, math.nan) for at in curves.values()]
                look: dict[str, Any] = {"color": COLOURS.get(name, OTHER), "linestyle": dash, "marker": marker}
                axes.plot(list(curves), values, label=as_label(name), markersize=4, **look)
                drawn += values
        axes.set(xlabel="optimiser step")
        if all(0 <= value <= 1 for value in drawn if not math.isnan(value)):
            axes.set(ylim=(-0.04, 1.04))
        axes.set_title(in_words(metric))
        axes.legend(frameon=False, fontsize=8)
    data = [{"step": step, "set": name, **values} for step, means in curves.items() for name, values in means.items()]
    return to_panels(figure, "metrics on the way", data)


def probability_figure(before: Records, after: Records) -> Markup:
    """Histograms of the samples' answer probabilities: before as an outline, after filled; one panel a set."""
    figure = panels(list(before))
    for axes, name in zip(figure.axes, before, strict=True):
        bins = [i / 20 for i in range(21)]
        then, now = ([row["probability"] for row in records[name]] for records in (before, after))
        axes.hist(now, bins=bins, color=COLOURS.get(name, OTHER), alpha=0.6)
        axes.hist(then, bins=bins, histtype="step", color="#334155", linewidth=1.2)
        axes.set(xlim=(-0.02, 1.02), xlabel="probability of the answer", ylabel="samples")
        axes.set_title(f"{name}, {len(after[name])} samples")
    data = [
        {"set": name, "index": i, "before": then["probability"], "after": now["probability"]}
        for name in before
        for i, (then, now) in enumerate(zip(before[name], after[name], strict=True))
    ]
    return to_panels(figure, "answer probabilities before and after", data)


def render_report(
    *,
    config: Mapping[str, Any],
    config_text: str,
    table: Sequence[Mapping[str, Any]],
    goals: Sequence[Mapping[str, Any]],
    verdict: Mapping[str, Any] | None,
    made: Mapping[str, str],
    metrics: Sequence[Mapping[str, Any]],
    curves: Mapping[int, Means],
    records: Mapping[str, Records],
    unlearning: Mapping[str, Any] | None = None,
    geffect: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page.

    verdict: `runs.verdict.Verdict` as a dict, None where nothing was asked. made: how, see `runs.provenance.describe`.
    curves: means by optimiser step, or none. records: of "before" and "after", and of "retrained" where there is such a
    model. unlearning: what unlearning.json holds, and its figure or None as "svg". geffect: `report.geffect.section` of
    the metrics' probes.
    """
    stages = list(dict.fromkeys(row["stage"] for row in metrics))
    before, after, goal = records["before"], records["after"], config["evaluate"].get("goal")
    known_from = KNOWN_FROM if goal is None else goal["forget_probability_below"]
    with matplotlib.rc_context(STYLE):
        figures = {
            "losses": {stage: loss_figure(metrics, stage) for stage in stages},
            "metrics_svg": to_panels(metrics_figure(table), "metrics before and after", table),
            "curves_svg": curves_figure(curves) if curves else None,
            "probability_svg": probability_figure(before, after),
        }
    return render(
        "run.html",
        config=config,
        config_text=config_text,
        table=table,
        columns=[key for key in table[0] if key not in ("set", "metric", "interval", "intervals", "samples")],
        goals=[{**goal, **CARDS[goal["name"]]} for goal in goals],
        verdict=verdict,
        made=made,
        counts={name: len(own) for name, own in before.items()},
        samples=list_samples(records, known_from),
        states=STATES,
        known_from=known_from,
        unlearning=unlearning,
        geffect=geffect,
        **figures,
    )
