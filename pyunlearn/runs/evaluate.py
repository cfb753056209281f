"""Evaluations: of a run, before and after, and of any model on any set. Records are on disk before the means are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import write_json, write_json_lines
from ..data import QA
from ..metrics import evaluate
from ..training.stage import Stage
from .config import EvaluateConfig, FilesConfig
from .folder import RunFolder
from .job import Job, first_model
from .outputs import check_records_file

SETS = ("forget", "retain")


def evaluate_sets(
    stage: Stage,
    settings: EvaluateConfig,
    folder: RunFolder,
    moment: str,
    sets: Mapping[str, Sequence[QA]],
    model: Any,
    tokenizer: Any,
) -> None:
    """Writes evaluation/{moment}-{set}.jsonl for every set, and evaluation/{moment}.json last."""
    summaries = {}
    for name, items in sets.items():
        result = evaluate(
            model,
            tokenizer,
            items,
            metrics=settings.metrics,
            batch_size=settings.batch_size,
            max_length=stage.max_length,
            rouge_samples=settings.rouge_samples,
            max_new_tokens=settings.max_new_tokens,
            seed=stage.seed,
            progress=stage.progress,
        )
        write_json_lines(folder.evaluation(f"{moment}-{name}.jsonl"), result.records)
        summaries[name] = result.summary
    write_json(folder.evaluation(f"{moment}.json"), summaries)


def read_summaries(folder: RunFolder, moment: str) -> dict[str, dict[str, float]]:
    return json.loads(folder.evaluation(f"{moment}.json").read_text(encoding="utf-8"))


def read_records(folder: RunFolder, moment: str) -> dict[str, list[dict[str, Any]]]:
    records = {}
    for name in SETS:
        with open(folder.evaluation(f"{moment}-{name}.jsonl"), encoding="utf-8") as lines:
            records[name] = [json.loads(line) for line in lines]
    return records


def evaluate_files(
    config: FilesConfig,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
    command: str = "pyunlearn evaluate",
) -> dict[str, float]:
    """Metric means of a model on disk or on the Hub over a file or Hub data set; records go to `out`.

    Raises what `load_model`, `load_qa` and `metrics.evaluate` raise, and before those as `check_records_file`.
    """
    if out is not None:
        check_records_file(config, Path(out))
    job, settings = Job.start(config, console, command), config.evaluate
    with job.interruptible():
        model, tokenizer, stage = first_model(job)
        result = evaluate(
            model,
            tokenizer,
            job.data.forget,
            metrics=settings.metrics,
            batch_size=settings.batch_size,
            max_length=stage.max_length,
            rouge_samples=settings.rouge_samples,
            max_new_tokens=settings.max_new_tokens,
            progress=stage.progress,
        )
        if out is not None:
            write_json_lines(out, result.records)
    table = Table("metric", "value")
    for metric, value in result.summary.items():
        table.add_row(metric, f"{value:.4f}")
    job.console.print(table)
    if out is not None:
        job.console.print(f"records: {out}", soft_wrap=True, markup=False)
    return result.summary
