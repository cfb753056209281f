"""What goes to the terminal: tables whole, and text of others shown, never obeyed."""

from __future__ import annotations

import os
import re
import sys

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
    """Whole: words that have no room are folded, not cut; those of the first column where they need over two fifths."""
    for column in table.columns:
        column.overflow = "fold"
    first = table.columns[0]
    widest = max(console.measure(cell).maximum for cell in (first.header, *first.cells))
    first.no_wrap = widest <= 2 * console.width // 5
    console.print(table)
