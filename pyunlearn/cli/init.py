"""`pyunlearn init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from .._terminal import make_console, visible
from .shared import Columns, Debug, Forget, GgufFile, Lora, Model, Prompt, Recipe, Refusals, Retain, Set, clean_errors

EXAMPLES = """[bold]Examples[/bold]

  # writes run.yaml
  pyunlearn init --model M --forget F.jsonl --retain R.jsonl --recipe npo

  pyunlearn init run.yaml --model M --forget F.csv && pyunlearn run run.yaml
"""


def init(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")] = Path("run.yaml"),
    model: Model[str | None] = None,
    forget: Forget = None,
    retain: Retain = None,
    recipe: Recipe = None,
    lora: Lora = False,
    refusals: Refusals = None,
    columns: Columns = None,
    prompt: Prompt = None,
    gguf_file: GgufFile = None,
    set_: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's configuration with every key that there is: what is set, and as comments all else with defaults."""
    with clean_errors(debug):
        from .._files import check_writable, write_text
        from ..runs.request import run_config
        from ..runs.template import commented

        if file.exists() and not overwrite:
            raise FileExistsError(f"{file}: is there already; choose another name, or --overwrite")
        check_writable(file)
        words: dict[str, Any] = {
            "model": model,
            "forget": forget,
            "retain": retain,
            "gguf_file": gguf_file,
            "prompt": prompt,
        }
        words["refusals"] = None if refusals is None else str(refusals)
        config = run_config(None, set_ or [], recipe=recipe, columns=columns, lora=lora, **words)
        write_text(file, commented(config, f"pyunlearn run {shlex.quote(str(file))}"))
        make_console().print(
            f"next: pyunlearn run {visible(shlex.quote(str(file)))}", markup=False, highlight=False, soft_wrap=True
        )
