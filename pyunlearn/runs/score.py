"""The job of `pyunlearn score`: Memory Removal Difficulty of a forget set, one record a sample, and a report."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._files import write_json_lines
from ..data import QA, QADataset, collate, load_qa
from ..metrics.teacher_forced import teacher_forced
from ..model.causal_lm import CausalLM
from ..model.load import load_model, process_state
from ..mrd import MRDResult, check_arguments, mrd
from ..mrd.characteristics import text_characteristics
from ..report.score import render_score_report, self_checks
from ..training.unlearn import interruptible
from .config import RunConfig
from .folder import RunFolder
from .run import first_model, load_data, quiet_libraries

SHOWN = 3  # hardest and easiest samples on the console


@dataclass(frozen=True)
class ScoreResult:
    records: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    out: Path
    report: Path


def score_run(
    config: RunConfig,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn score",
    **options: Any,
) -> ScoreResult:
    """Scores the forget set of a run's configuration by the model it starts from, memorised if it says so.

    out: default scores.jsonl in the run's folder. options: of `mrd`. Raises as `run` does, and as `mrd`.
    """
    check_arguments(**options)  # before anything is memorised
    quiet_libraries()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder, data, state = RunFolder(config.folder), load_data(config.data, config.seed), process_state()
    if state.is_main_process:
        folder.open(config, resume=True)
    state.wait_for_everyone()
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    with interruptible(command):
        context, model, tokenizer = first_model(config, folder, data, console, state)
        out = out or folder.path / "scores.jsonl"
        return score(model, tokenizer, data.forget, context.max_length, out, overwrite, console, command, options)


def score_files(
    model: str,
    data: str,
    *,
    out: Path,
    name: str | None = None,
    gguf_file: str | None = None,
    tokenizer: str | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn score",
    **options: Any,
) -> ScoreResult:
    """Scores a file or Hub data set by a model on disk or on the Hub, loaded in float32. options: of `mrd`.

    Raises what `load_qa`, `load_model` and `mrd` raise.
    """
    quiet_libraries()
    items = load_qa(data, name=name, limit=limit)
    state = process_state()
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    with interruptible(command):
        loaded, its_tokenizer = load_model(model, gguf_file=gguf_file, tokenizer=tokenizer)
        loaded.to(state.device)
        return score(loaded, its_tokenizer, items, None, out, overwrite, console, command, options)


def score(
    model: Any,
    tokenizer: Any,
    items: Sequence[QA],
    max_length: int | None,
    out: Path,
    overwrite: bool,
    console: Console,
    command: str,
    options: Mapping[str, Any],
) -> ScoreResult:
    """Scores, and writes `out` (JSON lines), and beside it .json (diagnostics), .html (report) and .state (draws)."""
    dataset = QADataset(items, tokenizer, max_length or CausalLM.of(model).context_length)
    folder, state_folder, processes = RunFolder(out.parent), out.with_suffix(".state"), process_state()
    if overwrite and processes.is_main_process:
        shutil.rmtree(state_folder, ignore_errors=True)
    processes.wait_for_everyone()
    progress = not console.quiet
    batches = [collate([dataset[i]], dataset.pad_token_id) for i in range(len(dataset))]
    result = mrd(model, batches, state=state_folder, progress=progress, **options)
    read = teacher_forced(model, dataset, progress=progress)
    records = make_records(items, result, read)
    scored = ScoreResult(records, result.diagnostics, out, out.with_suffix(".html"))
    if processes.is_main_process:
        write_json_lines(out, records)
        folder.write_json(out.with_suffix(".json"), result.diagnostics)
        folder.write_text(scored.report, render_score_report(records, result, command))
        tell(scored, console)
    processes.wait_for_everyone()
    return scored


def make_records(
    items: Sequence[QA], result: MRDResult, read: Sequence[Mapping[str, float | int]]
) -> list[dict[str, Any]]:
    """One record a sample: its text, mrd and standard_error, num_tokens, linear_ok, likelihood and characteristics."""
    texts = text_characteristics([f"{item.question} {item.answer}" for item in items])
    columns = (result.value, result.standard_error, result.linear_ok)
    return [
        {
            "index": i, "question": item.question, "answer": item.answer, "mrd": value,
            "standard_error": None if math.isnan(error) else error, "linear_ok": linear,
            **{key: known[key] for key in ("num_tokens", "nll", "probability")}, **text,
        }
        for i, (item, known, text, value, error, linear) in enumerate(
            zip(items, read, texts, *(column.tolist() for column in columns), strict=True)
        )
    ]  # fmt: skip


def tell(scored: ScoreResult, console: Console) -> None:
    """The hardest and the easiest samples, the self-check, and where everything is."""
    told = scored.diagnostics
    ranked = sorted(scored.records, key=lambda record: record["mrd"])
    shown = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    title = f"{told['estimator']} of {len(ranked)} samples, hardest to unlearn first"
    table = Table("question", title=title, title_justify="left")
    for column in ("MRD", "standard error", "tokens"):
        table.add_column(column, justify="right")
    for place, record in enumerate(shown):
        error = "" if record["standard_error"] is None else f"{record['standard_error']:.2g}"
        numbers = [f"{record['mrd']:.4g}", error, str(record["num_tokens"])]
        gap = len(shown) < len(ranked) and place == SHOWN - 1
        table.add_row(escape(record["question"]), *numbers, end_section=gap)
    console.print(table)
    for check in self_checks(told):
        mark = "[bold green]ok[/]   " if check["met"] else "[bold yellow]check[/]"
        console.print(f"{mark} {escape(check['text'])}", highlight=False, soft_wrap=True)
    lines = [f"report  {scored.report}", f"scores  {scored.out}"]
    console.print("\n" + "\n".join(lines), highlight=False, soft_wrap=True, markup=False)
