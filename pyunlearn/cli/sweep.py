"""`pyunlearn sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console, print_table
from .shared import Debug, Forget, GgufFile, Model, Prompt, Refusals, Retain, Set, Tokenizer, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  # what it would run: every run is checked before any begins
  pyunlearn sweep grid.yaml --plan

  # four at a time; Ctrl-C, and the same command goes on
  pyunlearn sweep grid.yaml --workers 4

  # every recipe on the embedded world, three seeds
  pyunlearn sweep grid:embedded

  # alpha, beta and c as UWC tunes them, your model and files
  pyunlearn sweep grid:uwc --model M --forget F --retain R

[bold]A grid[/bold]

  run:  # what all runs share, as in a run's configuration
    model: {name_or_path: MODEL}
    data: {forget: forget.jsonl, retain: retain.jsonl}
  axes:  # every combination is a run
    unlearn.recipe: \\[npo_kl, "wga*"]
    unlearn.learning_rate: \\[1.0e-5, 5.0e-5]
  seeds: 3
"""
FAILED = 1


def sweep(
    grid: Annotated[str, typer.Argument(help="YAML file, or grid:NAME of those here.", metavar="GRID")],
    model: Model[str | None] = None,
    forget: Forget = None,
    retain: Retain = None,
    refusals: Refusals = None,
    prompt: Prompt = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None, typer.Option(help="The sweep's folder.", show_default="runs/ and the grid's name")
    ] = None,
    set_: Set = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once, each a process with its share of the cores.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="On Ray (extra 'ray'), here or at $RAY_ADDRESS.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only check every run, and list them.")] = False,
    debug: Debug = False,
) -> None:
    """Run every combination of a grid, with every seed, and compare them.

    Runs that begin alike share one start and one reference. What is finished stays: after Ctrl-C, a crash, or with
    values and seeds added to the grid, the same command goes on. Ends with 0 where every run is finished, with 1 where
    some failed (the others go on), with 2 for an error.
    """
    with clean_errors(debug):
        from ..runs.grid import load_grid, make_cells
        from ..runs.sweep import Sweep, plan_table, told_plan
        from ..runs.sweep import sweep as sweep_job

        console = make_console()
        loaded = load_grid(grid)
        folder = out or Path("runs") / loaded.name
        words = {
            "model": model,
            "forget": forget,
            "retain": retain,
            "refusals": None if refusals is None else str(refusals),
            "prompt": prompt,
            "gguf_file": gguf_file,
            "tokenizer": tokenizer,
        }
        cells = make_cells(loaded, folder, set_ or [], words)
        if plan:
            job = Sweep(loaded, cells, folder)
            job.check()
            print_table(console, plan_table(job))
            console.print(told_plan(job), markup=False, highlight=False, soft_wrap=True)
            return
        result = sweep_job(loaded, cells, folder, workers=workers, ray=ray, console=console, command=command_line())
    if result.failed:
        raise typer.Exit(FAILED)
