"""Text of others on the terminal: shown, never obeyed."""

from __future__ import annotations

import re

from rich.markup import escape

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
