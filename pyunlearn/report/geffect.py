"""The figures of the G-effect paper from a run's probes, for the run's report and for a page of their own."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import COLOURS, DASHES, STYLE, new_figure, render, to_panels

Rows = Sequence[Mapping[str, Any]]  # {"step", "geffect": what `Probe.measure` gives, "probe_seconds", "step_seconds"}
TITLES = {"unlearn": "unlearning G-effect", "retain": "retaining G-effect"}
METRIC_COLOURS = {"unlearn": COLOURS["forget"], "retain": COLOURS["retain"]}
DASH_OF = {COLOURS[name]: dash for name, dash in DASHES.items()}
# the paper's groups, or any others in their order
PALETTE = ("#64748b", "#1d4ed8", "#0ea5e9", "#7c3aed", "#ca8a04", "#be185d", "#15803d")
SCALES = (1.0, 10.0, 100.0)
RANGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of weights, as the paper's Figure 16
SHADES = ("#fed7aa", "#fb923c", "#ea580c", "#9a3412", "#431407")
PANELS = 3  # steps of the scatter plots
LINES = 5  # steps of the texts


def render_geffect(name: str, rows: Rows, command: str) -> str:
    """The page of `pyunlearn geffect`."""
    return render("geffect.html", name=name, geffect=section(rows), num_models=len(rows), command=command)


def section(rows: Rows) -> dict[str, Any] | None:
    """What a page shows of the probes: {"cost", "samples", "not_finite", "figures", "heat"}; None without any probe."""
    if not rows:
        return None
    finite = [row for row in rows if "not_finite" not in row["geffect"]]
    lost = [row for row in rows if "not_finite" in row["geffect"]]
    return {
        "cost": cost(rows),
        "samples": finite[0]["geffect"]["samples"] if finite else None,
        "not_finite": f"step {lost[0]['step']}: {lost[0]['geffect']['not_finite']}" if lost else None,
        "figures": [{**each, "svg": to_panels(each["figure"], each["caption"])} for each in figures(finite)],
        "heat": heat(finite),
    }


def cost(rows: Rows) -> str | None:
    """Medians: seconds of a probe, and how many training steps that is, where both were measured."""
    timed = [row for row in rows if row.get("step_seconds")]
    if not timed:
        return None
    probe = statistics.median(row["probe_seconds"] for row in timed)
    ratio = statistics.median(row["probe_seconds"] / row["step_seconds"] for row in timed)
    return f"A probe takes {probe:.3g} s, {ratio:.1f} training steps (medians of {len(timed)})."


def figures(rows: Rows) -> list[dict[str, Any]]:
    """{"name", "figure", "caption"} of every figure that these rows, all finite, have numbers for."""
    if not rows:
        return []
    with matplotlib.rc_context(STYLE):
        return [{"name": name, "figure": figure, "caption": caption} for name, figure, caption in draw(rows)]


def draw(rows: Rows) -> list[tuple[str, Figure, str]]:
    """(name, figure, caption)."""
    drawn = [
        ("total", total_figure(rows), "the whole objective's G-effects at three scales"),
        ("groups", groups_figure(rows), "by group of layers at three scales; dark: total"),
    ]
    if len(rows[0]["geffect"]["terms"]) > 1:
        drawn.append(("terms", terms_figure(rows), "each term's own G-effect, before its coefficient"))
    drawn.append(("dynamics", dynamics_figure(rows), "on the probe's samples"))
    drawn += [
        (f"scatter-{label}", figure, f"each forget sample's own effect under gradient ascent, by its weight in {label}")
        for label, figure in scatter_figures(rows)
    ]
    return drawn


def values(rows: Rows, *keys: str) -> list[float]:
    """One number a row, at the end of `keys`."""
    column = []
    for row in rows:
        at = row["geffect"]
        for key in keys:
            at = at[key]
        column.append(at)
    return column


def total_figure(rows: Rows) -> Figure:
    curves = {TITLES[m]: (values(rows, "total", m), METRIC_COLOURS[m], 1.6) for m in TITLES}
    figure = new_figure(1, len(SCALES))
    zoomed(figure.axes, steps_of(rows), curves)
    return figure


def groups_figure(rows: Rows) -> Figure:
    figure = new_figure(2, len(SCALES))
    groups = list(rows[0]["geffect"]["groups"]["unlearn"])
    for i, metric in enumerate(TITLES):
        curves = {"total": (values(rows, "total", metric), "#0f172a", 1.6)}
        for k, group in enumerate(groups):
            curves[group] = (values(rows, "groups", metric, group), PALETTE[k % len(PALETTE)], 1.1)
        panels = figure.axes[i * len(SCALES) : (i + 1) * len(SCALES)]
        zoomed(panels, steps_of(rows), curves)
        panels[0].set_ylabel(TITLES[metric])
    return figure


def terms_figure(rows: Rows) -> Figure:
    figure = new_figure(1, 2)
    for axes, metric in zip(figure.axes, TITLES, strict=True):
        for k, label in enumerate(rows[0]["geffect"]["terms"]):
            line(axes, rows, values(rows, "terms", label, "total", metric), PALETTE[1 + k % (len(PALETTE) - 1)], label)
        axes.set_title(TITLES[metric])
        finish(axes)
    return figure


def dynamics_figure(rows: Rows) -> Figure:
    """Risk, inverse confidence, and the mean weight of each objective that has one."""
    weights = list(rows[0]["geffect"]["weights"])
    figure = new_figure(1, 3 if weights else 2)
    for metric, colour in METRIC_COLOURS.items():
        line(figure.axes[0], rows, values(rows, "nll", metric), colour, "forget" if metric == "unlearn" else metric)
    figure.axes[0].set_title("negative log-likelihood")
    line(figure.axes[1], rows, values(rows, "log10_inverse_confidence"), COLOURS["forget"], "forget")
    figure.axes[1].set_title("inverse confidence, log10")
    for k, label in enumerate(weights):
        colour = PALETTE[1 + k % (len(PALETTE) - 1)]
        line(figure.axes[2], rows, values(rows, "weights", label), colour, label)
    if weights:
        figure.axes[2].set_title("mean weight (1: gradient ascent)")
        figure.axes[2].set_ylim(bottom=0)
    for axes in figure.axes:
        finish(axes)
    return figure


def scatter_figures(rows: Rows) -> Iterable[tuple[str, Figure]]:
    """(label, figure): unlearning against retaining effect of the samples, a few steps, darker where they weigh more.

    Step 0 is left out: every weight against the reference is 1 there.
    """
    rows = [row for row in rows if "pointwise" in row["geffect"] and row["step"] > 0]
    if not rows:
        return
    shown = [rows[i] for i in evenly(len(rows), PANELS)]
    for label in shown[0]["geffect"]["pointwise"]["weights"]:
        figure = new_figure(1, len(shown))
        for axes, row in zip(figure.axes, shown, strict=True):
            points = row["geffect"]["pointwise"]
            for k, (low, high) in enumerate(pairwise(RANGES)):
                inside = [
                    (u, r)
                    for u, r, w in zip(points["unlearn"], points["retain"], points["weights"][label], strict=True)
                    if low <= w < high or (w >= high == RANGES[-1])
                ]
                if inside:
                    name = f"{low:g} to {high:g}"
                    axes.plot(*zip(*inside, strict=True), "o", markersize=4, color=SHADES[k], label=name)
            axes.set_title(f"step {row['step']}")
            axes.set(xlabel="unlearning", ylabel="retaining")
            axes.legend(frameon=False, fontsize=8, title="weight", title_fontsize=8)
            short_numbers(axes, "both")
        yield label, figure


def heat(rows: Rows) -> list[dict[str, Any]]:
    """{"label", "question", "lines": [{"step", "tokens": [(text, weight, its share of the largest)]}]}, a few steps.

    For terms that weigh the tokens of an answer differently, such as WGA, TNPO and WTNPO (the paper's Appendix D).
    """
    rows = [row for row in rows if row["geffect"].get("heat")]
    if not rows:
        return []
    shown = [rows[i] for i in evenly(len(rows), LINES)]
    texts = []
    for label in shown[0]["geffect"]["heat"][0]["weights"]:
        for k, text in enumerate(shown[0]["geffect"]["heat"]):
            weights = [row["geffect"]["heat"][k]["weights"][label] for row in shown]
            top = max(map(max, weights))
            if top <= 0 or all(max(each) - min(each) <= 1e-6 * top for each in weights):
                continue
            lines = [
                {
                    "step": row["step"],
                    "tokens": [(t, w, max(w, 0.0) / top) for t, w in zip(text["tokens"], each, strict=True)],
                }
                for row, each in zip(shown, weights, strict=True)
            ]
            texts.append({"label": label, "question": text["question"], "lines": lines})
    return texts


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the indices below `count`, the first and the last among them."""
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def steps_of(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def zoomed(panels: Sequence[Axes], steps: list[int], curves: Mapping[str, tuple[list[float], str, float]]) -> None:
    """The same curves in every panel, the vertical range SCALES times smaller."""
    reach = [value for of_curve, _, _ in curves.values() for value in of_curve]
    low, high = min(0.0, *reach), max(0.0, *reach)
    margin = 0.05 * (high - low) or 1.0
    for axes, scale in zip(panels, SCALES, strict=True):
        for name, (of_curve, colour, width) in curves.items():
            dash = DASH_OF.get(colour, "-")
            axes.plot(steps, of_curve, dash, color=colour, linewidth=width, marker="o", markersize=2, label=name)
        axes.set_ylim((low - margin) / scale, (high + margin) / scale)
        axes.set_title("" if scale == 1 else f"{scale:g} times closer")
        finish(axes, legend=scale == 1)


def line(axes: Axes, rows: Rows, of_curve: list[float], colour: str, name: str) -> None:
    dash = DASH_OF.get(colour, "-")
    axes.plot(steps_of(rows), of_curve, dash, color=colour, linewidth=1.4, marker="o", markersize=2, label=name)


def finish(axes: Axes, legend: bool = True) -> None:
    axes.set_xlabel("optimiser step")
    short_numbers(axes, "y")
    if legend:
        axes.legend(frameon=False, fontsize=8)


def short_numbers(axes: Axes, which: Any) -> None:
    axes.ticklabel_format(axis=which, scilimits=(-2, 3))
