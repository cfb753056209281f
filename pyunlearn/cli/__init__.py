"""The command line, one file a command: `pyunlearn run`, `init`, `score`, `geffect`, `evaluate`, `calibrate`,
`compare`, `reliability`, `sweep`, `export`, `bench`, `metrics`, `objectives`, `recipes`, `doctor`.

User errors end in one red line and exit code 2; `--debug` shows the traceback. Ctrl-C exits with 130.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from . import (
    bench,
    calibrate,
    compare,
    doctor,
    evaluate,
    export,
    geffect,
    init,
    metrics,
    objectives,
    recipes,
    reliability,
    run,
    score,
    sweep,
)
from .shared import prose

MEANT = {"mrd": "score", "g-effect": "geffect", "unlearn": "run", "eval": "evaluate", "plan": "sweep GRID --plan"}


class Commands(TyperGroup):
    """With where to go from names that the field has, and this command line has not."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in MEANT and args[0] not in self.commands:
            ctx.fail(f"No such command '{args[0]}'; that is `pyunlearn {MEANT[args[0]]}`.")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="pyunlearn",
    cls=Commands,
    help="Make a language model forget chosen samples, keep the rest, and measure both.",
    epilog="Start with [bold]pyunlearn run[/bold]: a small model memorises made-up authors and forgets a tenth.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"pyunlearn {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(epilog=run.EXAMPLES)(prose(run.run))
app.command(epilog=init.EXAMPLES)(prose(init.init))
app.command(epilog=score.EXAMPLES)(prose(score.score))
app.command(epilog=geffect.EXAMPLES)(prose(geffect.geffect))
app.command(epilog=evaluate.EXAMPLES)(prose(evaluate.evaluate))
app.add_typer(calibrate.app, name="calibrate")
app.command(epilog=compare.EXAMPLES)(prose(compare.compare))
app.command(epilog=reliability.EXAMPLES)(prose(reliability.reliability))
app.command(epilog=sweep.EXAMPLES)(prose(sweep.sweep))
app.command(epilog=export.EXAMPLES)(prose(export.export))
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    prose(bench.bench)
)
app.command()(prose(metrics.metrics))
app.command()(prose(objectives.objectives))
app.command(epilog=recipes.EXAMPLES)(prose(recipes.recipes))
app.command()(prose(doctor.doctor))


def main() -> None:
    """Entry point of the `pyunlearn` command."""
    app()
