"""`pyunlearn run`."""

from __future__ import annotations

from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Config, Debug, Overwrite, Set, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  pyunlearn run                                            the embedded demo: no network, a minute or two

  pyunlearn run --set unlearn.forget=npo --set name=npo    the same with another objective

  pyunlearn run --set unlearn.retain='\\[kl, gd]'            two retain terms

  pyunlearn run --set unlearn.recipe=npo+mrd               a method by name, its samples drawn by MRD

  pyunlearn run examples/smollm2_tofu.yaml                 a pretrained model on TOFU

  pyunlearn run --retrain --resume                         beside a model that has never seen the forget set

  pyunlearn run --resume                                   go on after Ctrl-C or a crash
"""


def run(
    config: Config = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue this run where it stopped.")] = False,
    overwrite: Overwrite = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train a model without the forget set, and measure it beside.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Memorise (where asked), evaluate, unlearn, evaluate again, and write a report.

    Ends with 0 where every goal was met, with 1 where one was missed (evaluate.goal=null asks nothing).
    """
    with clean_errors(debug):
        from ..runs import load_config
        from ..runs.run import run as run_job

        loaded = load_config(config, set_ or [], anchors=["retrained"] if retrain else [])
        result = run_job(loaded, resume=resume, overwrite=overwrite, console=make_console(), command=command_line())
    if not result.reached:
        raise typer.Exit(1)
