"""`pyunlearn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .shared import BatchSize, Data, Debug, GgufFile, Limit, Model, Name, Tokenizer, clean_errors, command_line

EXAMPLES = """[bold]Example[/bold]

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --out records.jsonl
"""


def evaluate(
    model: Model[str],
    data: Data[str],
    name: Name = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    rouge_samples: Annotated[int, typer.Option(min=0, help="Samples to generate for; 0 is none.")] = 20,
    batch_size: BatchSize = 16,
    variant: Annotated[
        str, typer.Option(help="suffix, or open_unlearning: leaves an answer's last token out.")
    ] = "suffix",
    out: Annotated[Path | None, typer.Option(help="Write one JSON line per sample here.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how well a model knows a set of answers."""
    with clean_errors(debug):
        from ..runs.config import FilesConfig
        from ..runs.evaluate import evaluate_files

        files = FilesConfig.of(
            model, data, name=name, gguf_file=gguf_file, tokenizer=tokenizer, limit=limit, batch_size=batch_size,
            rouge_samples=rouge_samples, variant=variant,
        )  # fmt: skip
        evaluate_files(files, out=out, console=Console(), command=command_line())
