"""The pages of `pyunlearn calibrate`: what was measured on the way, what was chosen, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup

from ..calibration import Search
from .figures import COLOURS, DASHES, MARKERS, STYLE, in_words, new_figure, render, to_panels

Points = Sequence[Mapping[str, Any]]
Score = tuple[float, float]  # utility, forgetting
CHOSEN: Any = {"color": "#0f172a", "linewidth": 1.0, "linestyle": (0, (4, 2))}


def look(name: str) -> dict[str, Any]:
    return {"color": COLOURS[name], "linestyle": DASHES[name], "marker": MARKERS[name], "markersize": 4}


def uwc_figure(result: Search, kept: str, curve: Points) -> Markup:
    """Extraction strength of both sets by a, and the same as forgetting against keeping."""
    figure = new_figure(1, 2, height=2.8)
    by_a, trade = figure.axes
    values = {name: [point[name]["extraction_strength"] for point in curve] for name in (kept, "forget")}
    for name, own in values.items():
        by_a.plot([point["a"] for point in curve], own, label=name, **look(name))
    by_a.axhline(result.limit, color=COLOURS[kept], linewidth=0.8, alpha=0.6)
    by_a.axvline(result.a, **CHOSEN)
    by_a.set(xlabel="a: part of the unlearned model", ylabel="extraction strength", ylim=(-0.04, 1.04))
    by_a.set_title("by a")
    by_a.legend(frameon=False, fontsize=8)
    trade.plot([1 - value for value in values["forget"]], values[kept], color="#334155", marker="o", markersize=4)
    at = [point["a"] for point in curve].index(result.a)
    trade.plot(1 - values["forget"][at], values[kept][at], "D", color=COLOURS["forget"], markersize=8)
    trade.set(xlabel="1 - extraction strength of forget rows", ylabel=f"extraction strength of {kept} rows")
    trade.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    trade.set_title("forgotten against kept")
    rows = [{"a": point["a"], **{name: own[i] for name, own in values.items()}} for i, point in enumerate(curve)]
    return to_panels(figure, "Extraction strength of mixtures", rows)


def render_uwc(
    name: str,
    result: Search,
    target: float,
    kept: str,
    curve: Points,
    rows: Points,
    warnings: Sequence[str],
    made: Mapping[str, str],
    verdict: Mapping[str, Any] | None = None,
) -> str:
    """curve: {"a", set: {metric: mean}}; rows: of the table, as text; made: see `runs.provenance.describe`; verdict: on
    the mixture, see `runs.verdict.Verdict`."""
    with matplotlib.rc_context(STYLE):
        svg = uwc_figure(result, kept, curve)
    return render(
        "uwc.html",
        name=name, result=result, target=target, kept=kept, svg=svg, rows=rows, warnings=warnings, made=made,
        verdict=verdict,
    )  # fmt: skip


def cru_figure(
    component: str, order: Sequence[tuple[str, float]], influence: Mapping[str, Score], curve: Sequence[Score], k: int
) -> Markup:
    """Utility and forgetting by depth, each component alone in the original; and of the hybrids, by k."""
    figure = new_figure(2, 2, height=2.6)
    sums, labels = dict(order), [name.removeprefix(f"{component} ") for name in influence]
    for i, (what, name) in enumerate((("utility", "retain"), ("forgetting", "forget"))):
        by_depth, by_count = figure.axes[i], figure.axes[2 + i]
        by_depth.plot(range(len(labels)), [pair[i] for pair in influence.values()], **look(name))
        by_count.plot(range(len(curve)), [pair[i] for pair in curve], **look(name))
        for value, dash, end in ((curve[0][i], "-", "original"), (curve[-1][i], "--", "unlearned")):
            by_depth.axhline(value, color="#64748b", linewidth=0.8, linestyle=dash, label=end)
        by_count.axvline(k, **CHOSEN)
        few = [at for at in range(len(labels)) if not labels[at].isdigit() or at % max(1, len(labels) // 8) == 0]
        by_depth.set_xticks(few, [labels[at] for at in few])
        by_depth.set(xlabel=component, ylabel=what)
        by_depth.set_title(f"{what}, one {component} patched")
        by_depth.legend(frameon=False, fontsize=8)
        by_count.set(xlabel="k: how many come from the unlearned model", ylabel=what)
        by_count.set_title(f"{what} of the hybrids")
    rows: list[dict[str, Any]] = [
        {"component": name, "utility": pair[0], "forgetting": pair[1], "rank sum": sums[name]}
        for name, pair in influence.items()
    ]
    rows += [{"k": i, "utility": pair[0], "forgetting": pair[1]} for i, pair in enumerate(curve)]
    return to_panels(figure, f"Modular influence by {component}", rows)


def render_cru(
    name: str,
    component: str,
    order: Sequence[tuple[str, float]],
    influence: Mapping[str, Score],
    curve: Sequence[Score],
    k: int,
    limit: float,
    measures: tuple[str, str],
    counts: Mapping[str, int],
    rows: Points,
    warnings: Sequence[str],
    made: Mapping[str, str],
    verdict: Mapping[str, Any] | None = None,
) -> str:
    """Arguments as `runs.cru.CRUResult` has them; measures: what utility and forgetting are, in words; verdict: as
    `render_uwc`."""
    with matplotlib.rc_context(STYLE):
        svg = cru_figure(component, order, influence, curve, k)
    return render(
        "cru.html",
        name=name, component=component, order=order, influence=influence, curve=curve, k=k, limit=limit,
        measures=measures, counts=counts, svg=svg, rows=rows, warnings=warnings, made=made, verdict=verdict,
    )  # fmt: skip


def reliability_figure(correlations: Points, points: Points) -> Markup:
    """A panel an attack and metric: each model's mean before, to the right, and after, up; both sets."""
    kinds = list(dict.fromkeys((row["attack"], row["metric"]) for row in correlations))
    metrics = list(dict.fromkeys(metric for _, metric in kinds))
    attacks = list(dict.fromkeys(attack for attack, _ in kinds))
    figure = new_figure(len(attacks), len(metrics), height=2.8)
    r_of = {(row["attack"], row["metric"], row["set"]): row["r"] for row in correlations}
    for axes, (attack, metric) in zip(figure.axes, ((a, m) for a in attacks for m in metrics), strict=True):
        axes.axline((0, 0), slope=1, color="#94a3b8", linewidth=0.8)
        for name in ("forget", "retain"):
            own = [
                (row["before"], row["after"])
                for row in points
                if (row["attack"], row["metric"], row["set"]) == (attack, metric, name)
                and None not in (row["before"], row["after"])
            ]
            if own:
                r = r_of[attack, metric, name]
                label = f"{name}, r = {'–' if r is None else format(r, '.2f')}"
                axes.plot(*zip(*own, strict=True), label=label, **{**look(name), "linestyle": "none"})
        axes.set(xlabel="before", ylabel="after")
        axes.set_title(f"{in_words(metric)}, {attack}")
        axes.legend(frameon=False, fontsize=8)
    return to_panels(figure, "Metrics before and after attacks", points)


def render_reliability(
    correlations: Points,
    points: Points,
    attacks: Mapping[str, str],
    count: int,
    warnings: Sequence[str],
    made: Mapping[str, str],
) -> str:
    """correlations: {"attack", "metric", "set", "r", "low", "high", "count", "reason"}; points: {"model", "attack",
    "metric", "set", "before", "after"}; attacks: what each is; count: of models."""
    with matplotlib.rc_context(STYLE):
        svg = reliability_figure(correlations, points)
    return render(
        "reliability.html",
        correlations=correlations, attacks=attacks, count=count, svg=svg, warnings=warnings, made=made,
    )  # fmt: skip
