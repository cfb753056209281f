"""The figures, each from the records of its runs. Red is the unlearning G-effect, blue the retaining one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .runs import ALPHAS, BETAS, DEPTHS, PAIRS, RATES, SCALES, SCATTER_STEPS, TOKEN_BETAS, Record

Records = dict[str, Record]
COLOURS = {"unlearn": "Reds", "retain": "Blues"}
STYLES = {"embed": "-.", "shallow": "--", "middle": "--", "deep": "--", "lm_head": "-."}
RANGES = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 2.0))


class Drawn(NamedTuple):
    """A figure of the paper: what it shows, the runs it needs, and how it is drawn."""

    caption: str
    runs: tuple[str, ...]
    draw: Callable[[Records], Figure]


FIGURES: dict[str, Drawn] = {}


def figure(name: str, caption: str, runs: Sequence[str]) -> Callable[[Callable[[Records], Figure]], Any]:
    def add(draw: Callable[[Records], Figure]) -> Callable[[Records], Figure]:
        FIGURES[name] = Drawn(caption, tuple(runs), draw)
        return draw

    return add


def write(name: str, records: Records, out: Path) -> Path:
    path = out / f"{name}.svg"
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 8}):
        FIGURES[name].draw(records).savefig(path, metadata={"Date": None})
    return path


def panels(rows: int, columns: int, width: float = 3.4, height: float = 2.5) -> tuple[Figure, list[list[Axes]]]:
    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return drawn, [list(row) for row in drawn.subplots(rows, columns, squeeze=False)]


def finite(record: Record) -> list[Record]:
    return [row for row in record["rows"] if "not_finite" not in row]


def series(record: Record, *keys: str) -> tuple[list[int], list[float]]:
    """Steps and values, `keys` deep in every row."""
    steps, values = [], []
    for row in finite(record):
        value: Any = row
        for key in keys:
            value = value[key]
        steps.append(row["step"])
        values.append(value)
    return steps, values


def effects(axes: Axes, record: Record, title: str, zoom: float = 1.0, legend: bool = False) -> None:
    """The paper's Figure 2: totals solid, stacks of layers dashed, input and output layers dash-dotted.

    zoom: the share of the totals' range that is shown, from 0 downwards and as much of what is above 0.
    """
    lowest, highest = 0.0, 0.0
    for metric, colours in COLOURS.items():
        shades = matplotlib.colormaps[colours]
        steps, total = series(record, "total", metric)
        axes.plot(steps, total, color=shades(0.95), linewidth=1.6, label=metric)
        lowest, highest = min(lowest, *total), max(highest, *total)
        groups = finite(record)[0]["groups"][metric]
        for i, group in enumerate(groups):
            axes.plot(*series(record, "groups", metric, group), STYLES.get(group, ":"), linewidth=1,
                      color=shades(0.35 + 0.1 * i), label=f"{metric} {group}")  # fmt: skip
    if zoom < 1:
        margin = (highest - lowest) * zoom * 0.05
        axes.set_ylim(lowest * zoom - margin, highest * zoom + margin)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(title=title, xlabel="step")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if legend:
        axes.legend(fontsize=6, ncols=2, frameon=False)


def curve(axes: Axes, records: dict[str, Record], keys: tuple[str, ...], title: str) -> None:
    for label, record in records.items():
        axes.plot(*series(record, *keys), marker=".", markersize=3, linewidth=1, label=label)
    axes.set(title=title, xlabel="step")
    if len(records) > 1:
        axes.legend(fontsize=6, frameon=False)


def weights(axes: Axes, records: dict[str, Record], label: str, title: str) -> None:
    curve(axes, records, ("weights", f"forget.{label}"), title)
    axes.set_ylim(0, None)


def grid(records: Sequence[tuple[str, Record]], columns: int = 0) -> Figure:
    """G-effects side by side, each on its own scale."""
    columns = columns or len(records)
    drawn, axes = panels(-(-len(records) // columns), columns)
    every = [each for row in axes for each in row]
    for i, (title, record) in enumerate(records):
        effects(every[i], record, title, legend=i == 0)
    for unused in every[len(records) :]:
        unused.set_axis_off()
    return drawn


def scatter(axes: Axes, record: Record, steps: Sequence[int], title: str) -> None:
    """PG-effects of GA by sample, in the colour of its weight's range: the darker, the larger."""
    points = [
        point
        for step in steps
        for at_step in (record["points"][str(step)],)
        for point in zip(at_step["unlearn"], at_step["retain"], at_step["weight"], strict=True)
    ]
    for i, (low, high) in enumerate(RANGES):
        chosen = [(x, y) for x, y, weight in points if low <= weight < high]
        if chosen:
            label = f"{low:g} to {high:g}" if high < 1 else f"{low:g} and more"
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=8, alpha=0.8, color=matplotlib.colormaps["Purples"](0.3 + 0.17 * i), label=label)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(title=title, xlabel="unlearning PG-effect", ylabel="retaining PG-effect")
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.legend(fontsize=6, frameon=False, title="weight", title_fontsize=6)


@figure("fig03", "GA, its small values, and WGA", ("ga", "wga-1"))
def fig03(records: Records) -> Figure:
    drawn, axes = panels(1, 3)
    effects(axes[0][0], records["ga"], "(a) GA", legend=True)
    effects(axes[0][1], records["ga"], "(b) GA, a tenth of the range", zoom=0.1)
    effects(axes[0][2], records["wga-1"], "(c) WGA, alpha = 1")
    return drawn


@figure("fig04", "NPO by beta", [f"npo-{beta}" for beta in BETAS])
def fig04(records: Records) -> Figure:
    return grid([(f"NPO, beta = {beta}", records[f"npo-{beta}"]) for beta in BETAS])


@figure("fig05", "NPO's weights against step, PG-effects by weight, and TNPO", [*(f"npo-{b}" for b in BETAS), "tnpo-1"])
def fig05(records: Records) -> Figure:
    drawn, axes = panels(1, 3)
    weights(axes[0][0], {f"beta = {beta}": records[f"npo-{beta}"] for beta in BETAS}, "npo", "(a) mean NPO weight")
    steps = ", ".join(map(str, SCATTER_STEPS))
    scatter(axes[0][1], records["npo-1"], SCATTER_STEPS, f"(b) PG-effects, beta = 1, steps {steps}")
    effects(axes[0][2], records["tnpo-1"], "(c) TNPO, beta = 1", legend=True)
    return drawn


@figure("fig06", "PO", ("po",))
def fig06(records: Records) -> Figure:
    drawn, axes = panels(1, 2)
    effects(axes[0][0], records["po"], "PO", legend=True)
    curve(axes[0][1], {"forget": records["po"]}, ("nll", "unlearn"), "risk on the forget samples")
    return drawn


@figure("fig07", "RMU at three depths, c = 5", [f"rmu-{depth}-5" for depth in DEPTHS])
def fig07(records: Records) -> Figure:
    return grid([(f"RMU, {depth} layer, c = 5", records[f"rmu-{depth}-5"]) for depth in DEPTHS])


@figure("fig08", "NPO with GD, KL and RR, and RMU with RR", ("npo+gd", "npo+kl", "npo+rr", "rmu+rr"))
def fig08(records: Records) -> Figure:
    drawn, axes = panels(2, 4)
    for i, (name, term) in enumerate((("npo+gd", "gd"), ("npo+kl", "kl"), ("npo+rr", "rr"), ("rmu+rr", "rr"))):
        effects(axes[0][i], records[name], name.upper().replace("+", " + "), legend=i == 0)
        for metric, colours in COLOURS.items():
            values = series(records[name], "terms", f"retain.{term}", metric)
            axes[1][i].plot(*values, color=matplotlib.colormaps[colours](0.9), label=metric)
        axes[1][i].axhline(0, color="black", linewidth=0.5)
        axes[1][i].set(title=f"the effect of {term.upper()} alone", xlabel="step")
        axes[1][i].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return drawn


@figure("fig09", "The dynamics of GA: G-effect, risk, inverse confidence", ("ga", "wga-1", "npo-0.5"))
def fig09(records: Records) -> Figure:
    drawn, axes = panels(1, 3)
    effects(axes[0][0], records["ga"], "(a) GA", legend=True)
    for metric, colours in COLOURS.items():
        axes[0][1].plot(*series(records["ga"], "nll", metric), color=matplotlib.colormaps[colours](0.9), label=metric)
    axes[0][1].set(title="(b) risk (mean NLL)", xlabel="step")
    axes[0][1].legend(fontsize=6, frameon=False)
    several = {"GA": records["ga"], "WGA, alpha = 1": records["wga-1"], "NPO, beta = 0.5": records["npo-0.5"]}
    curve(axes[0][2], several, ("log10_inverse_confidence",), "(c) log10 of the mean of 1 / p")
    return drawn


@figure("fig10", "GA at three scales", ("ga",))
def fig10(records: Records) -> Figure:
    drawn, axes = panels(1, 3)
    for i, (part, zoom) in enumerate((("", 1.0), (", a tenth of the range", 0.1), (", a hundredth", 0.01))):
        effects(axes[0][i], records["ga"], f"({'abc'[i]}) GA{part}", zoom, legend=i == 0)
    return drawn


@figure("fig11", "The dynamics of NPO by beta: G-effect, risk, weight", [f"npo-{beta}" for beta in BETAS])
def fig11(records: Records) -> Figure:
    drawn, axes = panels(len(BETAS), 3)
    for row, beta in zip(axes, BETAS, strict=True):
        record = records[f"npo-{beta}"]
        effects(row[0], record, f"NPO, beta = {beta}", legend=beta == BETAS[0])
        for metric, colours in COLOURS.items():
            row[1].plot(*series(record, "nll", metric), color=matplotlib.colormaps[colours](0.9), label=metric)
        row[1].set(title="risk (mean NLL)", xlabel="step")
        weights(row[2], {"": record}, "npo", "mean weight")
    return drawn


@figure("fig12", "RMU by depth and c", [f"rmu-{depth}-{c}" for depth in DEPTHS for c in SCALES])
def fig12(records: Records) -> Figure:
    return grid(
        [(f"RMU, {d}, c = {c}", records[f"rmu-{d}-{c}"]) for d in reversed(DEPTHS) for c in SCALES], len(SCALES)
    )


@figure("fig13", "WGA by alpha", [f"wga-{alpha}" for alpha in ALPHAS])
def fig13(records: Records) -> Figure:
    return grid([(f"WGA, alpha = {alpha}", records[f"wga-{alpha}"]) for alpha in ALPHAS])


@figure("fig14", "TNPO by beta", [f"tnpo-{beta}" for beta in TOKEN_BETAS])
def fig14(records: Records) -> Figure:
    return grid([(f"TNPO, beta = {beta}", records[f"tnpo-{beta}"]) for beta in TOKEN_BETAS])


@figure("fig15", "WTNPO by beta and alpha", [f"wtnpo-{beta}-{alpha}" for beta, alpha in PAIRS])
def fig15(records: Records) -> Figure:
    return grid([(f"WTNPO, beta = {b}, alpha = {a}", records[f"wtnpo-{b}-{a}"]) for b, a in PAIRS])


@figure("fig16", "PG-effects by NPO weight and beta, all steps", [f"npo-{beta}" for beta in BETAS])
def fig16(records: Records) -> Figure:
    drawn, axes = panels(1, len(BETAS))
    for i, beta in enumerate(BETAS):
        scatter(axes[0][i], records[f"npo-{beta}"], SCATTER_STEPS, f"beta = {beta}")
    return drawn


@figure("fig17", "PG-effects by NPO weight, beta and step", [f"npo-{beta}" for beta in BETAS])
def fig17(records: Records) -> Figure:
    drawn, axes = panels(len(BETAS), len(SCATTER_STEPS))
    for row, beta in zip(axes, BETAS, strict=True):
        for each, step in zip(row, SCATTER_STEPS, strict=True):
            scatter(each, records[f"npo-{beta}"], (step,), f"beta = {beta}, step {step}")
    return drawn


@figure("rates", "GA by learning rate", ("ga", *(f"ga-rate-{rate}" for rate in RATES)))
def rates(records: Records) -> Figure:
    names = {1.0: "ga", **{rate: f"ga-rate-{rate}" for rate in RATES}}
    values = {rate: records[name]["settings"]["unlearn"]["learning_rate"] for rate, name in names.items()}
    return grid([(f"GA, learning rate {values[rate]:g}", records[names[rate]]) for rate in sorted(names)])


@figure("heat", "Token weights of TNPO and WTNPO along the run", ("tnpo-4", "wtnpo-5-1.5"))
def heat(records: Records) -> Figure:
    """One line of text a probe; the background says the weight, from white (0) to dark (the largest drawn)."""
    blocks = [(name, drawn) for name, record in records.items() for drawn in record["heat"]]
    lines = sum(len(drawn["weights"]) + 2 for _, drawn in blocks)
    longest = max(sum(map(len, drawn["tokens"])) + len(drawn["tokens"]) for _, drawn in blocks)
    canvas = Figure(figsize=(0.075 * (longest + 10), 0.2 * lines))
    axes = canvas.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, longest + 10), ylim=(lines, 0))
    axes.set_axis_off()
    y = 0.5
    for name, drawn in blocks:
        axes.text(0, y, f"{name.split('-')[0].upper()}: {drawn['question']}", weight="bold", va="center")
        top = max(max(row) for row in drawn["weights"]) or 1.0
        for step, row in zip(drawn["steps"], drawn["weights"], strict=True):
            y += 1
            axes.text(0, y, f"step {step}", va="center", fontsize=7)
            x = 8.0
            for token, weight in zip(drawn["tokens"], row, strict=True):
                share = weight / top
                box = {"facecolor": matplotlib.colormaps["Greens"](share), "edgecolor": "none", "pad": 1}
                axes.text(x, y, token.strip() or "·", va="center", family="monospace", fontsize=7, bbox=box,
                          color="white" if share > 0.6 else "black")  # fmt: skip
                x += len(token) + 0.6
        y += 2
    return canvas
