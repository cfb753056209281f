"""Evaluations: of a run, before and after, and of any model on any set. Records are on disk before the means are."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import check_writable, read_json, write_json, write_json_lines
from .._terminal import print_table, visible
from ..data import QA
from ..metrics import EvaluationResult, Kept, cache_folder, evaluate, mean_interval
from ..training.stage import Stage
from .evaluate_config import EvaluateConfig
from .files_config import FilesConfig
from .folder import RunFolder
from .job import Job, first_model
from .outputs import check_records_file
from .table import RESAMPLES, as_number
from .tools import load_tools

logger = logging.getLogger("pyunlearn")


def evaluate_sets(
    stage: Stage,
    settings: EvaluateConfig,
    folder: RunFolder,
    moment: str,
    sets: Mapping[str, Sequence[QA]],
    model: Any,
    tokenizer: Any,
    tools: Mapping[str, Any] | None = None,
) -> None:
    """Writes evaluation/{moment}-{set}.jsonl for every set, and evaluation/{moment}.json last; tools: `load_tools`.

    A mean that is not finite, as of a metric without a value of any sample, is told and left out; a sample's value that
    is not finite is null.
    """
    summaries = {}
    kept = Kept(settings.cache or cache_folder(), model)
    for name, items in sets.items():
        result = evaluate_items(stage, settings, items, model, tokenizer, tools, kept)
        write_json_lines(folder.evaluation(f"{moment}-{name}.jsonl"), result.records)
        summaries[name] = {metric: value for metric, value in result.summary.items() if math.isfinite(value)}
        if without := [metric for metric in result.summary if metric not in summaries[name]]:
            logger.warning("%s, %s: no finite mean of %s, which is left out", moment, name, ", ".join(without))
    write_json(folder.evaluation(f"{moment}.json"), summaries)


def evaluate_items(
    stage: Stage,
    settings: EvaluateConfig,
    items: Sequence[QA],
    model: Any,
    tokenizer: Any,
    tools: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
) -> EvaluationResult:
    """tools: `load_tools`; kept: the model's, where it is evaluated on several sets."""
    return evaluate(
        model,
        tokenizer,
        items,
        metrics=settings.metrics,
        options=settings.options,
        tools={name: tool for name, tool in (tools or {}).items() if name != "writer"},
        batch_size=settings.batch_size,
        max_length=stage.max_length,
        rouge_samples=settings.rouge_samples,
        max_new_tokens=settings.max_new_tokens,
        variant=settings.variant,
        seed=stage.seed,
        cache=kept or settings.cache or cache_folder(),
        writer=(tools or {}).get("writer"),
        prompt_format=stage.prompt_format,
        progress=stage.progress,
    )


def read_summaries(folder: RunFolder, moment: str, sets: Iterable[str]) -> dict[str, dict[str, float]]:
    """The means of every set. Raises ValueError that names the file if it is damaged."""
    path = folder.evaluation(f"{moment}.json")
    summaries = read_json(path, evaluate_again(path))
    if not isinstance(summaries, dict) or not all(isinstance(summaries.get(name), dict) for name in sets):
        raise ValueError(f"{path}: is damaged, it has no means of {', '.join(sets)}; {evaluate_again(path)}")
    return {name: summaries[name] for name in sets}


def read_records(folder: RunFolder, moment: str, sets: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Of every set, one record a sample. Raises ValueError that names file and line if one is damaged."""
    return {name: read_lines(folder.evaluation(f"{moment}-{name}.jsonl")) for name in sets}


def texts_before(folder: RunFolder) -> dict[str, str]:
    """What a run's model wrote before it unlearned, by question. Raises ValueError as `read_records`."""
    paths = sorted(folder.evaluation("").glob("before-*.jsonl"))
    records = [record for path in paths for record in read_lines(path)]
    return {record["question"]: record["generated"] for record in records if "generated" in record}


def check_cache(settings: EvaluateConfig) -> None:
    """Raises OSError if what models read and write cannot be kept: before the time is spent to get there."""
    folder = Path(settings.cache or cache_folder())
    what = f"{folder}, which keeps what models read and write"
    check_writable(folder / "reading", what, "choose another by evaluate.cache, or by $PYUNLEARN_CACHE")


def run_of(model: str) -> RunFolder | None:
    """The run that a model on disk is of; None for any other."""
    folders = map(RunFolder, Path(model).resolve().parents if Path(model).exists() else ())
    return next((folder for folder in folders if folder.marked), None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: is damaged, no JSON ({error}); {evaluate_again(path)}") from None
    return records


def evaluate_again(path: Path) -> str:
    return f"delete {path.parent}, and --resume evaluates again"


def evaluate_files(
    config: FilesConfig,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
    command: str = "pyunlearn evaluate",
) -> dict[str, float]:
    """Metric means of a model on disk or on the Hub over a file or Hub data set; records go to `out`, with null for
    values that are not finite.

    A model in a run's folder has what that run's model wrote before unlearning beside it, for cosine_similarity.

    Raises what `load_model`, `load_qa` and `metrics.evaluate` raise, and before those as `check_records_file` and
    `check_cache`.
    """
    if out is not None:
        check_records_file(config, Path(out))
    check_cache(config.evaluate)
    job = Job.start(config, console, command)
    with job.interruptible():
        model, tokenizer, stage = first_model(job)
        run = run_of(config.model.name_or_path)
        before = None if run is None else partial(texts_before, run)
        tools = load_tools(job.config.evaluate, job.data.texts, job.processes.device, stage.progress, before)
        result = evaluate_items(stage, job.config.evaluate, job.data.forget, model, tokenizer, tools)
    table = Table("metric", "value", "95 % interval", "samples")
    for metric, value in result.summary.items():
        own = mean_interval([record.get(metric) for record in result.records], num_resamples=RESAMPLES)
        told = "" if own.low is None or own.high is None else f"{as_number(own.low)} to {as_number(own.high)}"
        table.add_row(metric, "-" if math.isnan(value) else as_number(value), told, str(own.num_samples))
    print_table(job.console, table)
    if out is not None:  # last: on a full disk the numbers have been seen
        write_json_lines(out, result.records)
        job.console.print(f"records: {visible(out)}", soft_wrap=True, markup=False)
    tell_next(config, job.console)
    return result.summary


def tell_next(config: FilesConfig, console: Console) -> None:
    """Numbers of one set say little alone: the other one, or the other run."""
    assert config.data is not None  # suites alone may have none
    model, data = (shlex.quote(name) for name in (config.model.name_or_path, config.data.path))
    run, prompt = run_of(config.model.name_or_path), config.prompt.option
    lines = ["", "try next"]
    if run is None:
        lines.append(
            f"  pyunlearn evaluate --model {model} --data OTHER_SET{prompt}   # what it should keep, or forget"
        )
        lines.append(f"  pyunlearn run --model {model} --forget {data} --retain OTHER_SET{prompt}   # to forget these")
    else:
        here = Path.cwd()
        place = shlex.quote(str(run.path.relative_to(here) if run.path.is_relative_to(here) else run.path))
        lines.append(f"  pyunlearn evaluate --model {model} --data OTHER_SET   # what it should keep, or forget")
        lines.append(f"  pyunlearn compare {place} OTHER_RUN   # beside what another method forgot and kept")
    console.print(visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)
