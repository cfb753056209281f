"""What goes to the terminal: tables whole, and text of others shown, never obeyed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDE = 200  # columns, where no terminal tells its own

# What a terminal obeys (C0 but tab and newline, DEL, C1), and what turns the direction of the text after it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: object) -> str:
    r"""With every control character written out.

    >>> visible("\x1b[2Jbold")
    '\\x1b[2Jbold'
    """
    return CONTROL.sub(lambda control: control[0].encode("unicode_escape").decode(), str(text))


def shown(text: object) -> str:
    """The same for rich, which takes none of it for markup."""
    return escape(visible(text))


def make_console() -> Console:
    """On stdout; in a file or a pipe lines are WIDE, unless COLUMNS tells how wide."""
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console(width=None if known else WIDE)


def print_table(console: Console, table: Table) -> None:
    """Whole: words have room where there is any, and are folded where there is none, never cut; those of the first
    column stay on one line unless that takes over two fifths."""
    for column in table.columns:
        column.overflow = "fold"
    first = table.columns[0]
    widest = max(console.measure(cell).maximum for cell in (first.header, *first.cells))
    first.no_wrap = widest <= 2 * console.width // 5
    edges = len(table.columns) + 1
    collapsed = int(table.collapse_padding)  # rich takes the first column's own padding for 1 then, and draws 2
    room = console.width - edges - (edges if collapsed else 2 * len(table.columns))
    measured = [[console.measure(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    words = [max(cell.minimum for cell in cells) for cells in measured]
    lines = [max(cell.maximum for cell in cells) for cells in measured]
    rest = room - widest
    if sum(lines) > room >= len(words):
        if first.no_wrap and rest >= len(words) - 1:
            found = [widest, *widths(words[1:], lines[1:], rest)]
        else:
            first.no_wrap, found = False, widths(words, lines, room)
        for column, width in zip(table.columns, found, strict=True):
            column.width = width
        first.width = found[0] + collapsed
    console.print(table)


def widths(words: Sequence[int], lines: Sequence[int], room: int) -> list[int]:
    """Of columns, `room` in all: what the longest word of each takes, then more to whichever is folded the most.

    Where the words have no room, the longest are folded, one letter after the other.

    >>> widths([6, 12], [6, 90], 40)
    [6, 34]
    >>> widths([6, 12, 20], [6, 12, 20], 30)
    [6, 12, 12]
    """
    taken = list(words)
    while sum(taken) > room:
        taken[taken.index(max(taken))] -= 1
    while sum(taken) < min(room, sum(lines)):
        folded = [line / width for line, width in zip(lines, taken, strict=True)]
        taken[folded.index(max(folded))] += 1
    return taken
