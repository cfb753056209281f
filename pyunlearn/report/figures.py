"""How every figure and page looks: colours, style, figures as inline SVG with their numbers, pages from templates."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# told apart by lightness, dash and marker too: hue alone is lost on some eyes, printers and screens
COLOURS = {"forget": "#c2410c", "retain": "#134e4a", "holdout": "#6d28d9"}
DASHES = {"forget": "-", "retain": "--", "holdout": ":"}
MARKERS = {"forget": "o", "retain": "s", "holdout": "^"}
OTHER = "#1d4ed8"  # sets of other names
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # each text of a figure lists them all
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
    """A page from a template of this folder; what comes from data or a model is escaped.

    A page runs its own script and no other, and loads nothing: its policy names the script by its digest.
    """
    loader = PackageLoader("pyunlearn.report", "templates")
    environment = Environment(
        loader=loader,
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters["in_words"] = in_words
    script, _, _ = loader.get_source(environment, "page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_digest=digest, **values)


def in_words(name: str) -> str:
    """A name of the code's as people read it."""
    return name.replace("_", " ")


def as_label(name: str) -> str:
    """A name as it stands, for a legend: which leaves out what begins with _, and reads formulas between two $."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def new_figure(rows: int, columns: int, height: float = 2.3) -> Figure:
    figure = Figure(figsize=(3.6 * columns, height * rows), layout="constrained")
    axes: Axes
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axisbelow(True)
    return figure


def to_panels(figure: Figure, name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Every axes of the figure as an <svg> of its own, for a page to lay out: side by side, or below each other; and a
    link to what they show, as a CSV file.

    name: what each shows, read out before its title; ids are unique to it. rows: the numbers, by column.
    """
    figure.draw_without_rendering()  # lays it out, for good
    figure.set_layout_engine("none")
    every = list(figure.axes)
    panels = []
    for i, axes in enumerate(every):
        for other in every:
            other.set_visible(other is axes)
        box = axes.get_tightbbox()
        assert box is not None
        inches = box.transformed(figure.dpi_scale_trans.inverted()).padded(0.05)
        title = axes.get_title()
        panels.append(svg_of(figure, f"{name}-{i}", f"{name}: {title}" if title else name, bbox_inches=inches))
    return Markup('<div class="panels">') + Markup("").join(panels) + Markup("</div>") + csv_link(rows, name)


def csv_link(rows: Sequence[Mapping[str, Any]], name: str) -> Markup:
    """The rows as a CSV file inside of a link, numbers to six digits; a column that a row lacks is empty there."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer.writerow(columns)
    writer.writerows([shortened(row.get(column, "")) for column in columns] for row in rows)
    file, href = f"{slug(name)}.csv", f"data:text/csv;charset=utf-8,{quote(out.getvalue(), safe=',-_.+:;/')}"
    return Markup('<p class="csv"><a download="{}" href="{}" aria-label="Data of {}, CSV">data (CSV)</a></p>').format(
        file, href, name
    )


def shortened(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return " ".join(str(shortened(each)) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def to_svg(figure: Figure, name: str) -> Markup:
    """The whole figure as an <svg> element that takes the width of its box. Element ids are unique to `name`."""
    return svg_of(figure, name, name)


def svg_of(figure: Figure, salt: str, label: str, **options: Any) -> Markup:
    out = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, **options)
    svg = out.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # of parts, the same in every figure; none is used
    head, rest = svg.split(">", 1)
    attributes = [part for part in head.split() if not part.startswith(("width=", "height="))]
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]
    box = f'role="img" aria-label="{escape(label)}" style="max-width: {round(105 / 72 * width)}px"'
    return Markup(f"{' '.join(attributes)} {box}>{rest}")


def as_file(svg: str) -> str:
    """An <svg> element of a page as a file of its own, on white."""
    head, rest = svg.split(">", 1)
    return f'{head}>\n<rect width="100%" height="100%" fill="white"/>{rest}'
