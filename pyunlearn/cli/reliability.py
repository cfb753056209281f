"""`pyunlearn reliability`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import Debug, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  # Ctrl-C, then the same command, goes on
  pyunlearn reliability runs/npo runs/ga runs/idk

  pyunlearn reliability runs/npo-* --attack relearning --relearn 8 \\
      --metric extraction_strength

  # models on the way count, too
  pyunlearn run --set unlearn.keep_steps=5
"""


def reliability(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", show_default=False, metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="Folder for the page, the numbers and what is measured.")] = Path(
        "runs/reliability"
    ),
    attack: Annotated[
        list[str] | None,
        typer.Option(help="jailbreak, noising, probing or relearning (repeatable).", show_default="all"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric of `pyunlearn metrics` (repeatable).",
            show_default="probability, memorization_accuracy, extraction_strength, rouge_l",
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="What the jailbreak puts before a question.", show_default="one of its own")
    ] = None,
    noise: Annotated[float, typer.Option(help="Share of a question's tokens to replace.")] = 0.05,
    layer: Annotated[str, typer.Option(help="To probe: a number from 1 on, or shallow, middle or deep.")] = "middle",
    relearn: Annotated[int, typer.Option(help="Forget rows to learn again.")] = 4,
    relearn_rate: Annotated[
        float | None, typer.Option(help="Learning rate of that.", show_default="the unlearning's own")
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of each set at most, drawn with the run's seed.")] = 100,
    debug: Debug = False,
) -> None:
    """Tell which metrics can be relied on: do they rank unlearned models after an attack as before?

    Every saved model of the runs is measured, attacked, and measured again: by a prefix that asks for all it knows, by
    noise in the questions, by reading a middle layer, and by learning a few forget rows again. Pearson's r of each
    metric before and after, of forget and retain rows each (Wang et al., 2025).
    """
    with clean_errors(debug):
        from ..runs.reliability import METRICS, Settings, measure_reliability

        own = {} if prefix is None else {"prefix": prefix}
        settings = Settings(
            noise=noise, layer=int(layer) if layer.lstrip("-").isdigit() else layer, relearn=relearn,
            rate=relearn_rate, samples=samples, **own,
        )  # fmt: skip
        measure_reliability(
            runs, out=out, attacks=attack or (), metrics=metric or METRICS, settings=settings, console=make_console(),
            command=command_line(),
        )  # fmt: skip
