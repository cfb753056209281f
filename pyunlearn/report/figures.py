"""How every figure and page looks: colours, style, figures as inline SVG, pages from templates."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"forget": "#c2410c", "retain": "#0f766e", "holdout": "#6d28d9"}
OTHER = "#1d4ed8"
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
    attributes = [part for part in head.split() if not part.startswith(("width=", "height="))]
    width = round(105 * figure.get_figwidth())
    return Markup(" ".join(attributes) + f' role="img" aria-label="{name}" style="max-width: {width}px">' + rest)


def as_file(svg: str) -> str:
    """An <svg> element of a page as a file of its own, on white."""
    head, rest = svg.split(">", 1)
    return f'{head}>\n<rect width="100%" height="100%" fill="white"/>{rest}'
