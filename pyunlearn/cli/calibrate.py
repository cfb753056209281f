"""`pyunlearn calibrate uwc` and `pyunlearn calibrate cru`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Debug, clean_errors, command_line, prose

UWC_EXAMPLES = """[bold]Examples[/bold]

  # Ctrl-C, then the same command, goes on
  pyunlearn calibrate uwc runs/demo

  # what is measured already is not measured again
  pyunlearn calibrate uwc runs/demo --target 0.9

  # what it gave back, and what it kept forgotten
  pyunlearn compare runs/demo runs/demo/uwc
"""
Run = Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False, metavar="RUN")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Trade forgetting for utility after a run, without training: by mixing models (uwc), or by layer (cru).",
)


@app.command(epilog=UWC_EXAMPLES)
@prose
def uwc(
    run: Run,
    target: Annotated[
        float,
        typer.Option(help="Share of the extraction strength before unlearning to keep; 0.9 was published for Phi."),
    ] = 0.95,
    on: Annotated[
        str | None,
        typer.Option(help="Whose: holdout or retain rows.", show_default="those of the verdict"),
    ] = None,
    points: Annotated[int, typer.Option(help="Steps of the grid from 0 to 1; all of them are measured.")] = 10,
    tolerance: Annotated[float, typer.Option(help="How near a is found, between two of them.")] = 0.01,
    debug: Debug = False,
) -> None:
    """Mix the models before and after: the most unlearning that leaves enough of what should stay; writes RUN/uwc.

    Parameters are (1 - a) before + a unlearned, and a is the largest whose extraction strength on retained rows is
    TARGET of that before unlearning. Runs that are calibrated alike can be compared by what they forget alone (Wang et
    al., 2025, UWC). A LoRA adapter is scaled.
    """
    with clean_errors(debug):
        from ..runs.uwc import calibrate_uwc

        calibrate_uwc(
            run, target=target, on=on, points=points, tolerance=tolerance, console=make_console(),
            command=command_line(),
        )  # fmt: skip


CRU_EXAMPLES = """[bold]Examples[/bold]

  # Ctrl-C, then the same command, goes on
  pyunlearn calibrate cru runs/demo

  # of each layer its MLP alone
  pyunlearn calibrate cru runs/demo --component mlp

  # what that gave back, and what it kept forgotten
  pyunlearn compare runs/demo runs/demo/cru
"""


@app.command(epilog=CRU_EXAMPLES)
@prose
def cru(
    run: Run,
    component: Annotated[str, typer.Option(help="layer, or of each its attention, mlp or norm.")] = "layer",
    target: Annotated[
        float, typer.Option(help="Share of what the unlearned model forgets that the result has to forget.")
    ] = 0.9,
    validation: Annotated[float, typer.Option(help="Share of the forget and retain rows to choose by.")] = 0.2,
    utility: Annotated[
        str | None,
        typer.Option(help="probability or model_utility.", show_default="model_utility, where the run has its sets"),
    ] = None,
    forgetting: Annotated[
        str | None,
        typer.Option(help="forgotten or forget_quality.", show_default="forget_quality, after --retrain"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Keep the layers of the unlearned model that forget at little cost, the original's others; writes RUN/cru.

    Each layer is put into the original model alone, to see what it costs and what it forgets. Ranked by both, the first
    k come from the unlearned model: the k of the best utility among those that forget enough, on validation rows that
    the result is not measured by (component-wise replacement, CRU).
    """
    with clean_errors(debug):
        from ..runs.cru import calibrate_cru

        calibrate_cru(
            run, component=component, target=target, validation=validation, utility=utility, forgetting=forgetting,
            console=make_console(), command=command_line(),
        )  # fmt: skip
