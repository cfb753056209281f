"""`pyunlearn evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .shared import BatchSize, Data, Debug, GgufFile, Limit, Model, Name, Tokenizer, clean_errors, command_line

EXAMPLES = """[bold]Examples[/bold]

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --out records.jsonl

  pyunlearn evaluate --model runs/demo/checkpoint --data forget.jsonl --metric rouge_l --metric fluency

  pyunlearn evaluate --suite tofu --model runs/x/checkpoint --data tofu --retain-log retain90/TOFU_EVAL.json --out eval
"""
Log = Annotated[str | None, typer.Option(help="Log of a reference model, from --out or OpenUnlearning or TOFU.")]


def evaluate(
    model: Model[str],
    data: Data[str],
    name: Name = None,
    gguf_file: GgufFile = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric of `pyunlearn metrics` (repeatable); none: the usual ones.", show_default=False),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a sentence embedding model, for cosine_similarity.")
    ] = None,
    entailer: Annotated[
        str | None, typer.Option(help="The same of a model of natural language inference, for entailment_score.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="The same of a text classifier, for clean or toxicity.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="URL of an OpenAI-compatible server that judges, e.g. http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name on that server.")] = None,
    rouge_samples: Annotated[
        int | None, typer.Option(min=0, help="Samples to generate for; 0 is none.", show_default="20")
    ] = None,
    batch_size: BatchSize = 16,
    variant: Annotated[
        str | None,
        typer.Option(help="suffix, or open_unlearning: leaves an answer's last token out.", show_default="suffix"),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="All numbers of tofu, open_unlearning, closer_look, mrd_paper, g_effect_paper or tutorial; --data is "
            "then a folder or Hub data set with TOFU's files (forget10_perturbed.jsonl, retain_perturbed.jsonl, ...)."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a suite's forget set.", show_default="forget10")] = None,
    retain_log: Log = None,
    full_log: Log = None,
    out: Annotated[
        Path | None, typer.Option(help="Write one JSON line per sample here; of a suite the log, into this folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure how well a model knows a set of answers."""
    with clean_errors(debug):
        console, command = Console(), command_line()
        model_options: dict[str, Any] = {
            "gguf_file": gguf_file,
            "tokenizer": tokenizer,
            "limit": limit,
            "batch_size": batch_size,
        }
        of_suites: dict[str, Any] = {"split": split, "retain-log": retain_log, "full-log": full_log}
        of_sets: dict[str, Any] = {
            "name": name, "rouge-samples": rouge_samples, "variant": variant, "metric": metric,
            "embedder": embedder, "entailer": entailer, "classifier": classifier, "judge": judge,
            "judge-model": judge_model,
        }  # fmt: skip
        for option, value in (of_suites if suite is None else of_sets).items():
            if value is not None:
                raise ValueError(f"--{option}={value}: goes {'with' if suite is None else 'without'} --suite only")
        if suite is None:
            from ..runs.config import FilesConfig
            from ..runs.evaluate import evaluate_files
            from ..runs.overrides import problems_told

            if (judge is None) != (judge_model is None):
                raise ValueError("--judge and --judge-model go together: the URL of a server, and a model's name there")
            with problems_told():
                files = FilesConfig.of(
                    model, data, name=name, rouge_samples=20 if rouge_samples is None else rouge_samples,
                    variant=variant or "suffix", metrics=metric or (), embedder=embedder,
                    entailer=entailer, classifier=classifier,
                    judge=None if judge is None else {"url": judge, "model": judge_model}, **model_options,
                )  # fmt: skip
            evaluate_files(files, out=out, console=console, command=command)
        else:
            from ..runs.config import SuiteConfig
            from ..runs.suite import evaluate_suite_files

            logs = {key: log for key, log in (("retain", retain_log), ("full", full_log)) if log is not None}
            config = SuiteConfig.of_tofu(suite, model, data, split=split or "forget10", logs=logs, **model_options)
            evaluate_suite_files(config, out=out, console=console, command=command)
