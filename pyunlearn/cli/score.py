"""`pyunlearn score`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .._terminal import make_console
from .shared import (
    BatchSize,
    Columns,
    Data,
    Debug,
    GgufFile,
    Limit,
    Model,
    Name,
    Overwrite,
    Prompt,
    Set,
    Tokenizer,
    clean_errors,
    command_line,
)

EXAMPLES = """[bold]Examples[/bold]

  # the embedded demo: no network, a minute or two
  pyunlearn score

  # the same in seconds, to leading order
  pyunlearn score --estimator gradient

  pyunlearn score --model FOLDER --data forget.jsonl --out scores.jsonl

  # draws shared out
  torchrun --nproc_per_node 8 -m pyunlearn.cli score --model FOLDER \\
      --data forget.jsonl
"""

NAMED = re.compile(r"(?<!--set )\b(estimator|num_draws|sigma|seed|batch_size|labels)=('?)([^\s:,;')]+)\2")


@contextmanager
def options_told() -> Iterator[None]:
    """Arguments of `mrd` that an error names are called as they are here."""
    try:
        yield
    except (ValueError, TypeError) as error:
        told = NAMED.sub(lambda named: f"--{named[1].replace('_', '-')} {named[3]}", str(error))
        if type(error) not in (ValueError, TypeError) or told == str(error):
            raise
        raise type(error)(told) from error


def score(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A run's YAML file or folder, or a file to score; none: the embedded demo.",
            show_default=False,
            metavar="SOURCE",
        ),
    ] = None,
    set_: Set = None,
    model: Model[str | None] = None,
    data: Data[str | None] = None,
    name: Name = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    columns: Columns = None,
    prompt: Prompt = None,
    estimator: Annotated[
        str, typer.Option(help="algorithm1, gradient (its leading order), definition, hutchinson or initial.")
    ] = "algorithm1",
    num_draws: Annotated[
        int | None, typer.Option(help="Draws of noise; more may be asked for later.", show_default="200")
    ] = None,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise.")] = 1e-5,
    seed: Annotated[int | None, typer.Option(help="Of the noise.", show_default="0")] = None,
    batch_size: BatchSize = 8,
    labels: Annotated[
        str, typer.Option(help="answers, or all: the question's tokens too, as in the paper's equations.")
    ] = "answers",
    per_token: Annotated[bool, typer.Option("--per-token", help="Divide by the number of scored tokens.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="One JSON line a sample; a report, diagnostics and finished draws go beside it."),
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Measure how hard each sample is to unlearn (Memory Removal Difficulty), with a report.

    Of the forget set of a run's configuration, by the model that the run starts from; or of --data, by --model. Ctrl-C,
    then the same command, goes on where it stopped.
    """
    with clean_errors(debug), options_told():
        for option, value in (("num-draws", num_draws), ("seed", seed)):
            if estimator == "gradient" and value is not None:
                raise ValueError(f"--{option} {value}: --estimator gradient draws no noise; leave it out")

        from ..runs import load_config
        from ..runs.files_config import FilesConfig
        from ..runs.overrides import problems_told
        from ..runs.request import check_pair, columns_of, of_source, prompt_of
        from ..runs.score import score as score_job

        job: dict[str, Any] = {
            "overwrite": overwrite,
            "console": make_console(),
            "command": command_line(),
            "estimator": estimator,
            "num_draws": 200 if num_draws is None else num_draws,
            "sigma": sigma,
            "seed": 0 if seed is None else seed,
            "batch_size": batch_size,
            "labels": labels,
            "normalize": "tokens" if per_token else None,
        }
        options: dict[str, Any] = {"name": name, "gguf_file": gguf_file, "tokenizer": tokenizer, "limit": limit}
        options |= {"columns": columns, "prompt": prompt}
        config, model, data = of_source(source, model, data)
        of_files = model is not None or data is not None
        if of_files and set_:
            raise ValueError(f"--set {set_[0]}: goes with a run's configuration, not with --model and --data")
        if of_files:
            model, data = check_pair("score", model, data)
            options["prompt"] = prompt_of(model) if prompt is None else prompt
            options["columns"] = columns_of(model, data) if columns is None else columns
            with problems_told():
                files = FilesConfig.of(model, data, **options)
            score_job(files, out=out, **job)
        elif given := [f"--{option.replace('_', '-')}" for option, value in options.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: of --model and --data, which are not given")
        else:
            score_job(load_config(config, set_ or []), out=out, **job)
