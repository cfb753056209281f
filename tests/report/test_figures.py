"""How figures come into a page: a panel each, with its text as text, its name read out, and room on a phone."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from urllib.parse import unquote

import matplotlib
import pytest

from pyunlearn.report.compare import HUES, MARKERS, TOLD_APART
from pyunlearn.report.figures import COLOURS, STYLE, as_file, new_figure, to_panels, to_svg

from .pages import compare_page

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def figure():
    with matplotlib.rc_context(STYLE):
        figure = new_figure(2, 2)
        for i, axes in enumerate(figure.axes):
            axes.plot([0, 1], [i, i + 1])
            axes.set_title(f"part {i} <&>")
    return figure


def texts(svg: str) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_axes_is_a_panel_of_its_own(figure):
    page = to_panels(figure, "losses", [{"step": 1}])
    panels = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(panels) == 4
    for i, panel in enumerate(panels):
        titles = [text for text in texts(panel) if text.startswith("part")]
        assert titles == [f"part {i} <&>"]
        assert ET.fromstring(panel).get("aria-label") == f"losses: part {i} <&>"
        width = int(re.search(r"max-width: (\d+)px", panel)[1])
        # at 390 px, less the margins of 12, the smallest text of a panel (8 pt) has 11 px at least
        assert 250 < width < 420
        view = float(ET.fromstring(panel).get("viewBox").split()[2])
        assert 8 * min(width, 366) / view >= 11
    ids = re.findall(r'\bid="([^"]+)"', page)
    marks = [each for each in ids if re.search(r"[0-9a-f]{8}", each)]
    assert len(marks) == len(set(marks))


def test_the_numbers_of_a_figure_go_with_it(figure):
    rows = [{"name": "a, b", "value": 1 / 3, "bounds": [0.5, -2.0]}, {"name": "é", "value": None, "more": 7}]
    page = to_panels(figure, "Loss of <it>", rows)
    file, href, label = re.search(r'<a download="(.*?)" href="(.*?)" aria-label="(.*?)">', page).groups()
    assert (file, label) == ("loss-of-it.csv", "Data of Loss of &lt;it&gt;, CSV")
    kind, _, content = href.partition(",")
    assert kind == "data:text/csv;charset=utf-8"
    read = list(csv.DictReader(io.StringIO(unquote(content))))
    assert read == [
        {"name": "a, b", "value": "0.333333", "bounds": "0.5 -2", "more": ""},
        {"name": "é", "value": "", "bounds": "", "more": "7"},
    ]


def test_a_file_holds_the_whole_figure(figure):
    text = as_file(to_svg(figure, "losses"))
    assert [each for each in texts(text) if each.startswith("part")] == [f"part {i} <&>" for i in range(4)]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_forget_and_retain_differ_in_lightness():
    light, dark = sorted(map(luminance, (COLOURS["forget"], COLOURS["retain"])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 1.7
    assert 1.05 / (light + 0.05) > 4.5  # on white


def test_a_figure_of_many_runs_keeps_room_for_its_points(recwarn):
    page = compare_page(38)
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
    (panel,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for name in ("ga", "method-0", "method-37", "before"):
        assert name in texts(panel)
    height = float(ET.fromstring(panel).get("viewBox").split()[3])
    assert height > 72 * (2.5 + 41 / 3 * 0.15)
    kinds = {(MARKERS[i % len(MARKERS)], HUES[(i + i // TOLD_APART) % len(HUES)]) for i in range(40)}
    assert len(kinds) == 40
    assert '<td class="stay">method-37<br>' in page
