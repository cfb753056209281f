"""Tables on the terminal: no name is cut, however narrow it is."""

import io
import re
import sys

import pytest
from rich.console import Console
from rich.table import Table

from pyunlearn._terminal import WIDE, make_console, print_table

NAMES = ("forget_Q_A_Prob_normalised", "exact_memorization")


def printed(width):
    table = Table("name", "value", "variant", "note")
    for name in NAMES:
        table.add_row(
            name, "0.123456", "OpenUnlearning, closer_to_1_better, epsilon=1e-10", "a note of many words " * 4
        )
    out = io.StringIO()
    print_table(Console(file=out, width=width), table)
    return out.getvalue()


def column(text, place):
    """What stands in it, folded lines together."""
    return "".join(line.split("│")[place + 1].strip() for line in text.splitlines() if line.startswith("│"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_name_is_cut(width):
    text = printed(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert column(text, 0) == "".join(NAMES)
    assert column(text, 1) == 2 * "0.123456"
    assert (NAMES[0] in text) == (width >= 80)  # whole where two fifths of the width are enough


def test_without_a_terminal_lines_are_wide(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == WIDE
    monkeypatch.setenv("COLUMNS", "77")
    assert make_console().width == 77


def test_words_stay_whole_where_there_is_room():
    table = Table("recipe", "retain", "what it does", "published for")
    table.add_row("dpo_ap", "preservation", "a note of many words " * 20, "a-model-forget10, " * 20)
    out = io.StringIO()
    print_table(Console(file=out, width=60), table)
    assert "│ dpo_ap │ preservation │ a note of" in out.getvalue()
    assert out.getvalue().count(" a-model-forget10, ") == 20
    assert max(map(len, out.getvalue().splitlines())) == 60


@pytest.mark.parametrize("collapse", [False, True])
def test_the_first_column_is_whole_beside_many(collapse):
    table = Table("method", "verdict", collapse_padding=collapse)
    for _ in range(7):
        table.add_column("forget\nprob.", justify="right")
    table.add_row("refuse", "still knows (1), forgot cleanly (1)", *["0.612 ± 1.059"] * 7)
    out = io.StringIO()
    print_table(Console(file=out, width=80), table)
    assert re.search(r"│ refuse │ ?still ", out.getvalue())
    assert max(map(len, out.getvalue().splitlines())) <= 80
