"""`pyunlearn run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .._terminal import make_console
from .shared import (
    Columns,
    Debug,
    Forget,
    GgufFile,
    Lora,
    Model,
    Overwrite,
    Prompt,
    Recipe,
    Refusals,
    Retain,
    Set,
    Tokenizer,
    clean_errors,
    command_line,
)

EXAMPLES = """[bold]Examples[/bold]

  # the embedded demo: no network, a minute or two
  pyunlearn run

  # your own model (folder or Hub id) and files
  pyunlearn run --model M --forget F.jsonl --retain R.csv

  # a method by name, training a small adapter alone
  pyunlearn run F.jsonl --model M --recipe npo --lora

  # a method on the embedded demo, samples drawn by MRD
  pyunlearn run recipe:npo+mrd

  # a configuration (pyunlearn init writes one)
  pyunlearn run examples/smollm2_tofu.yaml

  # any key of it; here two retain terms
  pyunlearn run --set unlearn.retain='\\[kl, gd]'

  # go on after Ctrl-C or a crash
  pyunlearn run --resume runs/demo

  # beside a model that has never seen the forget set
  pyunlearn run --retrain --resume runs/demo
"""
MISSED, MISSED_STRICTLY = 1, 3


def run(
    source: Annotated[
        str | None,
        typer.Argument(
            help="YAML file, file to forget, recipe:NAME, or a run's folder; none: the embedded demo.",
            show_default=False,
            metavar="SOURCE",
        ),
    ] = None,
    model: Model[str | None] = None,
    forget: Forget = None,
    retain: Retain = None,
    recipe: Recipe = None,
    lora: Lora = False,
    refusals: Refusals = None,
    columns: Columns = None,
    prompt: Prompt = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/ and its name")] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with this run, or with that of SOURCE.")] = False,
    overwrite: Overwrite = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train a model without the forget set, and measure it beside.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with 3 where a goal was missed.")] = False,
    debug: Debug = False,
) -> None:
    """Unlearn: evaluate a model, have it forget, evaluate again, and write a report.

    The model memorises first only where the configuration says so, as the embedded demo does. Ends with 0 where every
    goal was met, with 1 where one was missed (3 with --strict; evaluate.goal=null asks nothing), with 2 for an error.
    """
    with clean_errors(debug):
        from ..runs.request import run_config
        from ..runs.run import run as run_job

        config = run_config(
            source,
            set_ or [],
            recipe=recipe,
            columns=columns,
            lora=lora,
            anchors=["retrained"] if retrain else [],
            model=model,
            forget=forget,
            retain=retain,
            prompt=prompt,
            gguf_file=gguf_file,
            tokenizer=tokenizer,
            refusals=None if refusals is None else str(refusals),
            out=None if out is None else str(out),
        )
        result = run_job(config, resume=resume, overwrite=overwrite, console=make_console(), command=command_line())
    if not result.reached:
        raise typer.Exit(MISSED_STRICTLY if strict else MISSED)
