"""Log-log figures over the vocabulary and over the rows, one SVG a case, from the records."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...results import Record, is_ours


def write(records: list[Record], folder: Path, dtype: str = "bfloat16") -> list[Path]:
    """Time over V at the N measured for most V, and over N at the V measured for most N; with the copy's limit."""
    written = []
    for case in dict.fromkeys(r["case"] for r in records):
        rows = [r for r in records if r["case"] == case and r["dtype"] == dtype and r["time_ms"]]
        if not rows:
            continue
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, over, fixed in ((axes[0], "V", "N"), (axes[1], "N", "V")):
            value = widest(rows, over, fixed)
            draw(axis, [r for r in rows if r[fixed] == value], over)
            axis.set_title(f"{fixed} = {value}")
        axes[0].set_ylabel("ms")
        axes[1].legend(fontsize="small")
        figure.suptitle(f"{case}, {dtype}, {rows[0]['device']}")
        path = folder / f"{slug(case)}.svg"
        with matplotlib.rc_context({"svg.hashsalt": "pyunlearn", "svg.fonttype": "none"}):  # small, and always the same
            figure.savefig(path, metadata={"Date": None})
        written.append(path)
    return written


def slug(case: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in case.lower()).split())


def widest(rows: list[Record], over: str, fixed: str) -> int:
    """The value of `fixed` at which most values of `over` were measured; of several 8192 rows, 128256 columns."""
    counts = {value: len({r[over] for r in rows if r[fixed] == value}) for value in {r[fixed] for r in rows}}
    return max(counts, key=lambda value: (counts[value], value in (8192, 128256), value))


def draw(axis: Axes, rows: list[Record], over: str) -> None:
    limit = {r[over]: r["bytes"] / r["copy_gbps"] / 1e6 for r in rows}
    for impl in dict.fromkeys(r["impl"] for r in rows):
        points = sorted((r[over], r["time_ms"]["median"]) for r in rows if r["impl"] == impl)
        axis.plot(*zip(*points, strict=True), marker="o", label=impl, linewidth=2.5 if is_ours(impl) else 1)
    axis.plot(*zip(*sorted(limit.items()), strict=True), "k--", linewidth=1, label="limit of the copy")
    axis.set(xscale="log", yscale="log", xlabel=over)
    axis.grid(which="both", alpha=0.3)
