"""`pyunlearn compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Debug, clean_errors

EXAMPLES = """[bold]Examples[/bold]

  # a table on the screen
  pyunlearn compare runs/demo runs/npo

  # with a page, CSV, JSON and LaTeX; seeds become intervals
  pyunlearn compare runs/npo-* --out runs/comparison
"""


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", show_default=False, metavar="RUN...")],
    out: Annotated[Path | None, typer.Option(help="Write compare.html, .csv, .json and .tex into this folder.")] = None,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side: what each forgot, what it kept, and what they differ in."""
    with clean_errors(debug):
        from ..runs.compare import compare as compare_job

        compare_job(runs, out=out, console=make_console())
