"""`pyunlearn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Debug, clean_errors

EXAMPLES = """[bold]Examples[/bold]

  # the unlearned model, adapters merged, with a model card
  pyunlearn export runs/demo --out model

  # and onto the Hub, as a private repository
  pyunlearn export runs/demo --out model --push me/name
"""


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False, metavar="RUN")],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    push: Annotated[
        str | None, typer.Option(help="Also upload it to this Hub repository (private if new).", metavar="OWNER/NAME")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's model to be given away: weights and tokenizer, and a card with the verdict and every number."""
    with clean_errors(debug):
        from ..runs.export import export as export_run

        export_run(run, out, push=push, console=make_console())
