"""`pyunlearn doctor`."""

from __future__ import annotations

import typer

from .shared import Debug, clean_errors


def doctor(debug: Debug = False) -> None:
    """Say what is built, what is missing and why, and which backend each operation takes."""
    with clean_errors(debug):
        from ..doctor import main as examine

        raise typer.Exit(examine() or 0)
