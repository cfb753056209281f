"""The figures of the G-effect paper from a run's probes, for the run's report and for a page of their own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import COLOURS, DASHES, MARKERS, STYLE, in_words, new_figure, render, to_panels

Rows = Sequence[Mapping[str, Any]]  # {"step", "geffect": what `Probe.measure` gives, "probe_seconds", "step_seconds"}
TITLES = {"unlearn": "unlearning G-effect", "retain": "retaining G-effect"}
SET_OF = {"unlearn": "forget", "retain": "retain"}
Look = dict[str, Any]
Curves = Mapping[str, tuple[list[float], Look]]
TOTAL: Look = {"color": "#0f172a", "linestyle": "-", "marker": "", "linewidth": 1.8}
# the paper's groups, or any others in their order: told apart by dash and marker as well as by hue
LOOKS: tuple[Look, ...] = tuple(
    {"color": colour, "linestyle": dash, "marker": marker}
    for colour, dash, marker in (
        ("#64748b", "--", "o"),
        ("#1d4ed8", "-", "s"),
        ("#0369a1", "-.", "^"),
        ("#7c3aed", ":", "D"),
        ("#a16207", (0, (5, 1)), "v"),
        ("#be185d", (0, (3, 1, 1, 1)), "P"),
        ("#15803d", (0, (1, 1)), "X"),
    )
)
SCALES = (1.0, 10.0, 100.0)
RANGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of weights, as the paper's Figure 16
SHADES = ("#fed7aa", "#fb923c", "#ea580c", "#9a3412", "#431407")
PANELS = 3  # steps of the scatter plots
LINES = 5  # steps of the texts


def render_geffect(name: str, rows: Rows, made: Mapping[str, str]) -> str:
    """The page of `pyunlearn geffect`. made: how, see `runs.provenance.describe`."""
    return render("geffect.html", name=name, geffect=section(rows), num_models=len(rows), made=made)


def section(rows: Rows) -> dict[str, Any] | None:
    """What a page shows of the probes: {"summary", "cost", "samples", "not_finite", "figures", "heat"}; None without
    any probe."""
    if not rows:
        return None
    finite = [row for row in rows if "not_finite" not in row["geffect"]]
    lost = [row for row in rows if "not_finite" in row["geffect"]]
    return {
        "summary": summary(finite),
        "cost": cost(rows),
        "samples": finite[0]["geffect"]["samples"] if finite else None,
        "not_finite": f"step {lost[0]['step']}: {lost[0]['geffect']['not_finite']}" if lost else None,
        "figures": [
            {**each, "svg": to_panels(each["figure"], each["caption"], each["rows"])} for each in figures(finite)
        ],
        "heat": heat(finite),
    }


def summary(rows: Rows) -> list[str]:
    """The result read: what the objective does to each set, in which group of layers, and by which of its terms.

    Of means over the rows, all finite; none without any.
    """
    if not rows:
        return []

    def means(*keys: str) -> float:
        return statistics.fmean(values(rows, *keys))

    total = {metric: means("total", metric) for metric in TITLES}
    over = f"means over {len(rows)} models" if len(rows) > 1 else "of one model"
    below = {metric: sum(value < 0 for value in values(rows, "total", metric)) for metric in TITLES}
    if below["unlearn"] in (0, len(rows)):
        unlearns = "unlearns" if below["unlearn"] else "does not unlearn, it makes the forget answers likelier"
    else:  # the mean's sign may be that of one model
        unlearns = (
            f"unlearns at {below['unlearn']} of {len(rows)} models, and makes the forget answers likelier at others"
        )
    if below["retain"] in (0, len(rows)):
        retains = "the retain set pays for it" if below["retain"] else "the retain set gains by it"
    else:
        retains = f"the retain set pays for it at {below['retain']} of {len(rows)} models"
    read = [
        f"The objective {unlearns} (unlearning G-effect {total['unlearn']:+.3g}), and {retains} (retaining G-effect "
        f"{total['retain']:+.3g}; {over})."
    ]
    for metric, title in TITLES.items():
        sizes = [abs(value) for value in values(rows, "total", metric)]
        if len(rows) > 2 and 0 < math.fsum(sizes) < 2 * max(sizes):
            largest = rows[sizes.index(max(sizes))]
            effect = largest["geffect"]["total"][metric]
            read.append(f"The mean {title} is mostly that of step {largest['step']} alone ({effect:+.3g}).")
    groups = {m: {name: means("groups", m, name) for name in rows[0]["geffect"]["groups"][m]} for m in TITLES}
    pushes, costs = ({name: g for name, g in groups[m].items() if g < 0} for m in TITLES)
    for effects, did in ((pushes, "the unlearning"), (costs, "the cost to the retain set")):
        if effects:
            most = min(effects, key=effects.__getitem__)
            share = effects[most] / math.fsum(effects.values())
            read.append(f"{share:.0%} of {did} is in one group of layers, {in_words(most)}.")
    if not costs:
        read.append(f"No group of layers costs the retain set anything{' on average' if len(rows) > 1 else ''}.")
    terms = {label: {m: means("terms", label, "total", m) for m in TITLES} for label in rows[0]["geffect"]["terms"]}
    if len(terms) > 1:
        pushing = min(terms, key=lambda label: terms[label]["unlearn"])
        holding = max(terms, key=lambda label: terms[label]["retain"])
        costing = min(terms, key=lambda label: terms[label]["retain"])
        told = [f"{pushing} unlearns most ({terms[pushing]['unlearn']:+.3g})"] if terms[pushing]["unlearn"] < 0 else []
        if terms[holding]["retain"] > 0:
            told.append(f"{holding} retains most ({terms[holding]['retain']:+.3g})")
        if terms[costing]["retain"] < 0:
            told.append(f"{costing} costs the retain set most ({terms[costing]['retain']:+.3g})")
        if told:
            read.append(f"Of its terms, before their coefficients, {', '.join(told)}.")
    return read


def cost(rows: Rows) -> str | None:
    """Medians: seconds of a probe, and how many training steps that is, where both were measured."""
    timed = [row for row in rows if row.get("step_seconds")]
    if not timed:
        return None
    probe = statistics.median(row["probe_seconds"] for row in timed)
    ratio = statistics.median(row["probe_seconds"] / row["step_seconds"] for row in timed)
    return f"A probe takes {probe:.3g} s, {ratio:.1f} training steps (medians of {len(timed)})."


def figures(rows: Rows) -> list[dict[str, Any]]:
    """{"name", "figure", "caption", "rows": its numbers} of every figure that these rows, all finite, have some for."""
    if not rows:
        return []
    with matplotlib.rc_context(STYLE):
        return [dict(zip(("name", "figure", "caption", "rows"), each, strict=True)) for each in draw(rows)]


def draw(rows: Rows) -> list[tuple[str, Figure, str, list[dict[str, Any]]]]:
    """(name, figure, caption, numbers)."""
    scales = " at three scales" if len(scales_of(rows)) > 1 else ""
    drawn = [
        ("total", total_figure(rows), f"the whole objective's G-effects{scales}", numbers(rows, "total")),
        ("groups", groups_figure(rows), f"by group of layers{scales}; solid and dark: total", numbers(rows, "groups")),
    ]
    if len(rows[0]["geffect"]["terms"]) > 1:
        drawn.append(
            ("terms", terms_figure(rows), "each term's own G-effect, before its coefficient", term_numbers(rows))
        )
    drawn.append(("dynamics", dynamics_figure(rows), "on the probe's samples", numbers(rows, *DYNAMICS)))
    drawn += [
        (
            f"scatter-{label}",
            figure,
            f"each forget sample's own effect under gradient ascent, by its weight in {label}",
            data,
        )
        for label, figure, data in scatter_figures(rows)
    ]
    return drawn


def numbers(rows: Rows, *keys: str) -> list[dict[str, Any]]:
    """A row a step: what is at those keys, each number by the way to it."""
    return [{"step": row["step"], **flatten({key: row["geffect"][key] for key in keys})} for row in rows]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key} ") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def term_numbers(rows: Rows) -> list[dict[str, Any]]:
    totals = [{label: term["total"] for label, term in row["geffect"]["terms"].items()} for row in rows]
    return [{"step": row["step"], **flatten(total)} for row, total in zip(rows, totals, strict=True)]


def values(rows: Rows, *keys: str) -> list[float]:
    """One number a row, at the end of `keys`."""
    column = []
    for row in rows:
        at = row["geffect"]
        for key in keys:
            at = at[key]
        column.append(at)
    return column


def scales_of(rows: Rows) -> tuple[float, ...]:
    """Of a line between two models, a closer look would show a stroke that leaves the panel at once."""
    return SCALES if len(rows) > 2 else SCALES[:1]


def total_figure(rows: Rows) -> Figure:
    figure = new_figure(1, len(scales_of(rows)), height=2.6)
    zoomed(figure.axes, steps_of(rows), {TITLES[m]: (values(rows, "total", m), look_of(SET_OF[m])) for m in TITLES})
    return figure


def groups_figure(rows: Rows) -> Figure:
    columns = len(scales_of(rows))
    figure = new_figure(2, columns, height=2.8)
    groups = list(rows[0]["geffect"]["groups"]["unlearn"])
    for i, metric in enumerate(TITLES):
        curves = {"total": (values(rows, "total", metric), TOTAL)}
        curves |= {in_words(group): (values(rows, "groups", metric, group), look(k)) for k, group in enumerate(groups)}
        panels = figure.axes[i * columns : (i + 1) * columns]
        zoomed(panels, steps_of(rows), curves)
        panels[0].set_ylabel(TITLES[metric])
    return figure


def terms_figure(rows: Rows) -> Figure:
    figure = new_figure(1, 2, height=2.6)
    for axes, metric in zip(figure.axes, TITLES, strict=True):
        for k, label in enumerate(rows[0]["geffect"]["terms"]):
            line(axes, rows, values(rows, "terms", label, "total", metric), look(k), label)
        axes.set_title(TITLES[metric])
        finish(axes)
    return figure


DYNAMICS = ("nll", "log10_inverse_confidence", "weights")


def dynamics_figure(rows: Rows) -> Figure:
    """Risk, inverse confidence, and the mean weight of each objective that has one."""
    weights = list(rows[0]["geffect"]["weights"])
    figure = new_figure(1, 3 if weights else 2, height=2.6)
    for metric, name in SET_OF.items():
        line(figure.axes[0], rows, values(rows, "nll", metric), look_of(name), name)
    figure.axes[0].set_title("negative log-likelihood")
    line(figure.axes[1], rows, values(rows, "log10_inverse_confidence"), look_of("forget"), "forget")
    figure.axes[1].set_title("inverse confidence, log10")
    for k, label in enumerate(weights):
        line(figure.axes[2], rows, values(rows, "weights", label), look(k), label)
    if weights:
        figure.axes[2].set_title("mean weight (1: gradient ascent)")
        figure.axes[2].set_ylim(bottom=0)
    for axes in figure.axes:
        finish(axes)
    return figure


def look(k: int) -> Look:
    """Of the k-th of several curves."""
    return LOOKS[k % len(LOOKS)]


def look_of(name: str) -> Look:
    """Of a set."""
    return {"color": COLOURS[name], "linestyle": DASHES[name], "marker": MARKERS[name]}


def scatter_figures(rows: Rows) -> Iterable[tuple[str, Figure, list[dict[str, Any]]]]:
    """(label, figure, numbers): unlearning against retaining effect of the samples, a few steps, darker where they
    weigh more.

    Step 0 is left out: every weight against the reference is 1 there.
    """
    rows = [row for row in rows if "pointwise" in row["geffect"] and row["step"] > 0]
    if not rows:
        return
    shown = [rows[i] for i in evenly(len(rows), PANELS)]
    for label in shown[0]["geffect"]["pointwise"]["weights"]:
        figure, data = new_figure(1, len(shown)), []
        for axes, row in zip(figure.axes, shown, strict=True):
            points = row["geffect"]["pointwise"]
            triples = list(zip(points["unlearn"], points["retain"], points["weights"][label], strict=True))
            data += [{"step": row["step"], "unlearn": u, "retain": r, "weight": w} for u, r, w in triples]
            for k, (low, high) in enumerate(pairwise(RANGES)):
                inside = [(u, r) for u, r, w in triples if low <= w < high or (w >= high == RANGES[-1])]
                if inside:
                    name = f"{low:g} to {high:g}"
                    axes.plot(*zip(*inside, strict=True), "o", markersize=4, color=SHADES[k], label=name)
            axes.set_title(f"step {row['step']}")
            axes.set(xlabel="unlearning", ylabel="retaining")
            axes.legend(frameon=False, fontsize=8, title="weight", title_fontsize=8)
            short_numbers(axes, "both")
        yield label, figure, data


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


def zoomed(panels: Sequence[Axes], steps: list[int], curves: Curves) -> None:
    """The same curves in every panel, the vertical range SCALES times smaller."""
    reach = [value for of_curve, _ in curves.values() for value in of_curve]
    low, high = min(0.0, *reach), max(0.0, *reach)
    margin = 0.05 * (high - low) or 1.0
    for axes, scale in zip(panels, SCALES, strict=False):
        for name, (of_curve, style) in curves.items():
            axes.plot(steps, of_curve, **{**THIN, **style}, label=name)
        axes.set_ylim((low - margin) / scale, (high + margin) / scale)
        if len(panels) > 1:
            axes.set_title("the whole range" if scale == 1 else f"{scale:g} times closer")
        finish(axes, legend=scale == 1)


THIN: Look = {"linewidth": 1.3, "markersize": 3}


def line(axes: Axes, rows: Rows, of_curve: list[float], style: Look, name: str) -> None:
    axes.plot(steps_of(rows), of_curve, **{**THIN, **style}, label=name)


def finish(axes: Axes, legend: bool = True) -> None:
    axes.set_xlabel("optimiser step")
    short_numbers(axes, "y")
    if legend:  # below: the curves may go anywhere
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)


def short_numbers(axes: Axes, which: Any) -> None:
    axes.ticklabel_format(axis=which, scilimits=(-2, 3))
