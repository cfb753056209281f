"""`pyunlearn geffect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Debug, Overwrite, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  # a run that keeps its model every 5 steps
  pyunlearn run --set unlearn.keep_steps=5

  # all of them; Ctrl-C, then the same command, goes on
  pyunlearn geffect runs/demo

  # each sample's own too
  pyunlearn geffect runs/demo --pointwise --overwrite

  # while training instead, into the run's report
  pyunlearn run --set geffect.every=5
"""


def geffect(
    run: Annotated[
        Path, typer.Argument(help="Folder of a run, see unlearn.keep_steps.", show_default=False, metavar="RUN")
    ],
    forget_samples: Annotated[
        int | None, typer.Option(min=1, help="Drawn once, by the run's seed.", show_default="the run's, or 32")
    ] = None,
    retain_samples: Annotated[int | None, typer.Option(min=1, show_default="the run's, or 32")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples of a backward.", show_default="the run's, or 8")
    ] = None,
    pointwise: Annotated[
        bool | None, typer.Option("--pointwise/--no-pointwise", help="Also each forget sample's own effect.")
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Measure the gradient effect (G-effect) along a run, from its saved models; writes RUN/geffect.

    The G-effect of an objective on a metric is the dot product of their gradients: a step of size lr down the objective
    changes the metric by -lr times it. Unlearning (negative log-likelihood of the forget set) wants it far below 0,
    retaining (of the retain set) wants it at 0 or above. Told for the whole objective and each of its terms, in total,
    by group of layers and by layer.
    """
    with clean_errors(debug):
        from ..runs.geffect import measure_run

        changes = {"forget_samples": forget_samples, "retain_samples": retain_samples, "batch_size": batch_size,
                   "pointwise": pointwise}  # fmt: skip
        measure_run(
            run,
            overwrite=overwrite,
            console=make_console(),
            command=command_line(),
            **{key: value for key, value in changes.items() if value is not None},
        )
