"""The before/after table and the self-contained HTML report of a run (inline SVG, no script, no outside resource)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..runs.config import GoalConfig

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
Records = Mapping[str, Sequence[Mapping[str, Any]]]  # set name -> one record per sample
COLOURS = {"forget": "#c2410c", "retain": "#0f766e"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.6,
}


def make_table(before: Summaries, after: Summaries) -> list[dict[str, Any]]:
    """One row per set and metric: {"set", "metric", "before", "after", "change"}."""
    return [
        {"set": name, "metric": metric, "before": value, "after": after[name][metric],
         "change": after[name][metric] - value}
        for name, values in before.items()
        for metric, value in values.items()
        if metric in after.get(name, {})
    ]  # fmt: skip


def table_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| set | metric | before | after | change |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row['set']} | {row['metric']} | {row['before']:.4f} | {row['after']:.4f} | {row['change']:+.4f} |"
        for row in table
    ]
    return "\n".join(lines) + "\n"


def check_goal(before: Summaries, after: Summaries, goal: GoalConfig) -> list[dict[str, Any]]:
    """What the run had to reach: {"text", "value", "met"} for the forget and the retain probability."""
    (forget_before, forget), (retain_before, retain) = (
        (before[name]["probability"], after[name]["probability"]) for name in ("forget", "retain")
    )
    kept, limit = retain / max(retain_before, 1e-12), goal.forget_probability_below
    nothing = "; there was nothing to forget" if forget_before < limit else ""
    return [
        {
            "text": f"forget probability {forget_before:.3f} -> {forget:.3f}, wanted below {limit:g}{nothing}",
            "value": forget,
            "met": forget < limit <= forget_before,
        },
        {
            "text": f"retain probability {retain_before:.3f} -> {retain:.3f}, {kept:.1%} of before, wanted at least "
            f"{goal.retain_probability_kept:.0%}",
            "value": kept,
            "met": kept >= goal.retain_probability_kept,
        },
    ]


def loss_figure(rows: Sequence[Mapping[str, Any]], stage: str) -> Markup:
    """Loss of each term over the optimiser steps of one stage."""
    rows = [row for row in rows if row["stage"] == stage]
    terms = sorted({key for row in rows for key in row if key.endswith("/loss")})
    columns = min(len(terms), 3)
    figure = new_figure(math.ceil(len(terms) / columns), columns)
    for axes in figure.axes[len(terms) :]:
        axes.remove()
    for axes, key in zip(figure.axes, terms, strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        name = key.removesuffix("/loss")
        axes.plot(*zip(*points, strict=True), color=COLOURS.get(name.split(".")[0], "#1d4ed8"), linewidth=1.4)
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.set_title(name)
    return to_svg(figure, f"loss-{stage}")


def metrics_figure(table: Sequence[Mapping[str, Any]]) -> Markup:
    """Every metric before (open circle) and after (dot), one line each."""
    metrics = list(dict.fromkeys(row["metric"] for row in table))
    figure = new_figure(1, 2, height=0.34 * len(metrics) + 1.1)
    for axes, name in zip(figure.axes, COLOURS, strict=True):
        colour = COLOURS[name]
        for y, metric in enumerate(reversed(metrics)):
            for row in table:
                if (row["set"], row["metric"]) == (name, metric):
                    axes.plot([row["before"], row["after"]], [y, y], color=colour, linewidth=2, alpha=0.35)
                    axes.plot(row["before"], y, "o", mfc="white", mec=colour, markersize=6)
                    axes.plot(row["after"], y, "o", color=colour, markersize=6)
        axes.set(xlim=(-0.04, 1.04), ylim=(-0.6, len(metrics) - 0.4))
        axes.set_title(name)
        axes.set_yticks(range(len(metrics)), [metric.replace("_", " ") for metric in reversed(metrics)])
    return to_svg(figure, "metrics")


def probability_figure(before: Records, after: Records) -> Markup:
    """Histograms of the samples' answer probabilities: before as an outline, after filled."""
    figure = new_figure(1, 2)
    for axes, name in zip(figure.axes, COLOURS, strict=True):
        bins = [i / 20 for i in range(21)]
        then, now = ([row["probability"] for row in records[name]] for records in (before, after))
        axes.hist(now, bins=bins, color=COLOURS[name], alpha=0.6)
        axes.hist(then, bins=bins, histtype="step", color="#334155", linewidth=1.2)
        axes.set(xlim=(-0.02, 1.02), xlabel="probability of the answer", ylabel="samples")
        axes.set_title(f"{name}, {len(after[name])} samples")
    return to_svg(figure, "probability")


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder; what comes from data or a model is escaped."""
    environment = Environment(
        loader=PackageLoader("pyunlearn.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def new_figure(rows: int, columns: int, height: float = 2.3) -> Figure:
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    axes: Axes
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axisbelow(True)
    return figure


def to_svg(figure: Figure, name: str) -> Markup:
    """The figure as an <svg> element that takes the width of its box. Element ids are unique to `name`."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    head, rest = svg.split(">", 1)
    kept = [part for part in head.split() if not part.startswith(("width=", "height="))]
    width = round(105 * figure.get_figwidth())
    return Markup(" ".join(kept) + f' role="img" aria-label="{name}" style="max-width: {width}px">' + rest)


def pair_generations(before: Records, after: Records, limit: int = 6) -> dict[str, list[dict[str, Any]]]:
    """For each set, the first samples that were generated in both evaluations: question, answer, before, after."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for name in before:
        both = [
            {**old, "before": old["generated"], "after": new["generated"], "p_before": old["probability"],
             "p_after": new["probability"]}
            for old, new in zip(before[name], after[name], strict=True)
            if "generated" in old and "generated" in new
        ]  # fmt: skip
        pairs[name] = both[:limit]
    return pairs


def render_report(
    *,
    config: Mapping[str, Any],
    config_text: str,
    table: Sequence[Mapping[str, Any]],
    goals: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
    before: Records,
    after: Records,
    unlearning: Mapping[str, Any] | None = None,
    g_effect: Mapping[str, Any] | None = None,
) -> str:
    """The report as one HTML page. unlearning: what unlearning.json holds, and its figure or None as "svg"; g_effect:
    `geffect_report.section` of the metrics' probes."""
    stages = list(dict.fromkeys(row["stage"] for row in metrics))
    with matplotlib.rc_context(STYLE):
        figures = {
            "losses": {stage: loss_figure(metrics, stage) for stage in stages},
            "metrics_svg": metrics_figure(table),
            "probability_svg": probability_figure(before, after),
        }
    return render(
        "run.html",
        config=config,
        config_text=config_text,
        table=table,
        goals=goals,
        generations=pair_generations(before, after),
        unlearning=unlearning,
        g_effect=g_effect,
        **figures,
    )
