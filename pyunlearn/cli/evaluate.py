"""`pyunlearn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .shared import BatchSize, Data, Debug, GgufFile, Limit, Model, Name, Tokenizer, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --out records.jsonl

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --metric rouge_l --metric fluency
"""


def evaluate(
    model: Model[str],
    data: Data[str],
    name: Name = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric of `pyunlearn metrics` (repeatable); none: the usual four.", show_default=False),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a sentence embedding model, for cosine_similarity.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server that judges, e.g. http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on that server.")] = None,
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
        from ..runs.overrides import problems_told

        if (judge is None) != (judge_model is None):
            raise ValueError("--judge and --judge-model go together: the URL of a server, and a model's name there")
        with problems_told():
            files = FilesConfig.of(
                model, data, name=name, gguf_file=gguf_file, tokenizer=tokenizer, limit=limit, batch_size=batch_size,
                rouge_samples=rouge_samples, variant=variant, metrics=metric or (), embedder=embedder,
                judge=None if judge is None else {"url": judge, "model": judge_model},
            )  # fmt: skip
        evaluate_files(files, out=out, console=Console(), command=command_line())
