"""Evaluations of a run: before and after, forget and retain, each record on disk before the means are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import write_json_lines
from ..data import QA, load_qa
from ..metrics import METRICS, evaluate
from ..model.load import load_model, process_state
from .config import EvaluateConfig
from .folder import RunFolder

SETS = ("forget", "retain")


def evaluate_sets(
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[QA]],
    config: EvaluateConfig,
    folder: RunFolder,
    moment: str,
    *,
    max_length: int | None,
    seed: int,
    progress: bool,
) -> None:
    """Writes evaluation/{moment}-{set}.jsonl for every set, and evaluation/{moment}.json last."""
    summaries = {}
    for name, items in sets.items():
        result = evaluate(
            model,
            tokenizer,
            items,
            metrics=config.metrics,
            batch_size=config.batch_size,
            max_length=max_length,
            rouge_samples=config.rouge_samples,
            max_new_tokens=config.max_new_tokens,
            seed=seed,
            progress=progress,
        )
        write_json_lines(folder.evaluation(f"{moment}-{name}.jsonl"), result.records)
        summaries[name] = result.summary
    folder.write_json(folder.evaluation(f"{moment}.json"), summaries)


def read_summaries(folder: RunFolder, moment: str) -> dict[str, dict[str, float]]:
    return json.loads(folder.evaluation(f"{moment}.json").read_text(encoding="utf-8"))


def read_records(folder: RunFolder, moment: str) -> dict[str, list[dict[str, Any]]]:
    records = {}
    for name in SETS:
        with open(folder.evaluation(f"{moment}-{name}.jsonl"), encoding="utf-8") as lines:
            records[name] = [json.loads(line) for line in lines]
    return records


def evaluate_files(
    model: str,
    data: str,
    *,
    name: str | None = None,
    gguf_file: str | None = None,
    tokenizer: str | None = None,
    limit: int | None = None,
    rouge_samples: int = 20,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    out: str | Path | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Metric means of a model on disk or on the Hub over a file or Hub data set; records go to `out`.

    rouge_samples: 0 generates nothing. Raises what `load_model`, `load_qa` and `metrics.evaluate` raise.
    """
    items = load_qa(data, name=name, limit=limit)
    loaded, loaded_tokenizer = load_model(model, gguf_file=gguf_file, tokenizer=tokenizer)
    result = evaluate(
        loaded.to(process_state().device),
        loaded_tokenizer,
        items,
        metrics=[metric for metric in METRICS if rouge_samples or metric != "rouge_l"],
        batch_size=batch_size,
        rouge_samples=rouge_samples or None,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    if out is not None:
        write_json_lines(out, result.records)
    return result.summary
