"""The job of `pyunlearn score`: Memory Removal Difficulty of a forget set, one record a sample, and a report."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .._files import write_json, write_json_lines, write_text
from .._hints import check_known
from .._terminal import print_table, shown, visible
from ..data import QA, collate
from ..metrics.teacher_forced import teacher_forced
from ..mrd import LABELS, Labels, MRDResult, check_arguments, mrd, scored_rows
from ..mrd.characteristics import text_characteristics
from ..report.score import all_checks, ordered, render_score_report, scored_part
from ..store import OthersFolder
from .config import RunConfig
from .files_config import FilesConfig
from .job import Job, first_model
from .outputs import check_score_files, score_files
from .provenance import Attempt, describe
from .sections import DataConfig

SHOWN = 3  # hardest and easiest samples on the console


@dataclass(frozen=True)
class ScoreResult:
    records: list[dict[str, Any]]
    diagnostics: dict[str, Any]
    out: Path
    report: Path


def score(
    config: RunConfig | FilesConfig,
    *,
    out: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn score",
    labels: Labels = "answers",
    **options: Any,
) -> ScoreResult:
    """Scores the forget set of a run's configuration by the model it starts from, memorised if it says so; or a file or
    Hub data set by a model on disk or on the Hub.

    out: JSON lines, default scores.jsonl in the run's folder (for files: here); beside it go .json (diagnostics), .html
    (report) and .state (finished draws). overwrite: forget those. labels: which tokens are scored, see `scored_rows`.
    options: of `mrd`.

    Raises as `run` does, as `mrd`, and before anything is computed as `check_score_files`.
    """
    check_arguments(**options)  # before anything is memorised
    check_known("labels", labels, LABELS)
    job, attempt = Job.start(config, console, command), Attempt(command)
    out = out or job.folder.path / "scores.jsonl"
    files = score_files(out)
    with job.processes.first_first():
        if job.processes.first:
            check_score_files(config, out)
    lock = out.with_name(f".{out.name}.lock")
    ways = "choose another folder by --set output=FOLDER"
    with job.interruptible(), job.opened(resume=job.folder.marked, ways=ways), job.locked(lock, out):
        model, tokenizer, stage = first_model(job)
        answers, drawn = stage.rows(job.data.forget, tokenizer), files["finished draws"]
        if overwrite and job.processes.first:
            shutil.rmtree(drawn, ignore_errors=True)
        job.processes.wait()
        rows = scored_rows(answers, labels)
        batches = [collate([row], answers.pad_token_id) for row in rows]
        try:
            result = mrd(model, batches, state=drawn, progress=stage.progress, **options)
        except OthersFolder as error:
            raise ValueError(
                f"{out}: is of other scores, with draws of its own; choose --overwrite or --out FILE\n{error}"
            ) from None
        records = make_records(answers.items, result, teacher_forced(model, rows, progress=stage.progress))
        made = attempt.record(job.data, job.processes.count)
        measured = model_of(job)
        tokens = sum(record["num_tokens"] for record in records)
        known = {
            "nll_a_token": sum(record["nll"] for record in records) / tokens,
            "uniform_nll": math.log(len(tokenizer)),
        }
        result.diagnostics.update(labels=labels, made=made, model=measured, **known)
        scored = ScoreResult(records, result.diagnostics, out, files["report"])
        if job.processes.first:
            tell(scored, job.console)  # first: on a full disk the numbers have been seen
            write_json_lines(out, records)
            write_json(files["diagnostics"], result.diagnostics)
            write_text(scored.report, render_score_report(records, result, describe(config, [made])))
            tell_next(scored, config, job.console)
        job.processes.wait()
    return scored


def make_records(
    items: Sequence[QA], result: MRDResult, read: Sequence[Mapping[str, float | int]]
) -> list[dict[str, Any]]:
    """One record a sample: its text, mrd and standard_error (None where nothing was drawn, or once), num_tokens,
    linear_ok, likelihood and characteristics."""
    texts = text_characteristics([f"{item.question} {item.answer}" for item in items])
    errors = torch.full_like(result.value, math.nan) if result.draws is None else result.standard_error
    columns = (result.value, errors, result.linear_ok)
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
    """The hardest and the easiest samples, of which model, and the self-check."""
    diagnostics = scored.diagnostics
    ranked = sorted(scored.records, key=lambda record: record["mrd"])
    ends = ranked if len(ranked) <= 2 * SHOWN else [*ranked[:SHOWN], *ranked[-SHOWN:]]
    order = "hardest to unlearn first" if ordered(ranked) else "lowest first: their errors leave no order"
    samples = f"{len(ranked)} sample{'' if len(ranked) == 1 else 's'}{scored_part(diagnostics)}"
    table = Table("question", title=f"{diagnostics['estimator']} of {samples}, {order}", title_justify="left")
    drawn = any(record["standard_error"] is not None for record in ranked)
    for column in ("MRD", *(["standard error"] if drawn else []), "tokens"):
        table.add_column(column, justify="right")
    for place, record in enumerate(ends):
        error = "" if record["standard_error"] is None else f"{record['standard_error']:.2g}"
        numbers = [f"{record['mrd']:.4g}", *([error] if drawn else []), str(record["num_tokens"])]
        gap = len(ends) < len(ranked) and place == SHOWN - 1
        table.add_row(shown(record["question"] or record["answer"][:60]), *numbers, end_section=gap)
    print_table(console, table)
    console.print(f"of {shown(diagnostics['model'])}", highlight=False, soft_wrap=True)
    for check in all_checks(scored.records, diagnostics):
        mark = "[bold green]ok[/]   " if check["met"] else "[bold yellow]check[/]"
        console.print(f"{mark} {shown(check['text'])}", highlight=False, soft_wrap=True)
        if check.get("command"):
            console.print(f"      {visible(check['command'])}", highlight=False, soft_wrap=True, markup=False)


def tell_next(scored: ScoreResult, config: RunConfig | FilesConfig, console: Console) -> None:
    """Where everything is, and what the scores are for."""
    lines = [f"report  {scored.report}", f"scores  {scored.out}", "", "try next"]
    lines.append(f"  {unlearn_command(config)}   # samples that are hard to forget are drawn more often")
    console.print("\n" + visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)


def unlearn_command(config: RunConfig | FilesConfig) -> str:
    """A run that draws what was scored by its MRD."""
    if config.model.embedded:
        return "pyunlearn run recipe:npo+mrd --out FOLDER"
    data = config.data
    forget, retain = (data.forget, data.retain) if isinstance(data, DataConfig) else (data, None)
    kept = "RETAIN" if retain is None else shlex.quote(retain.path)
    model = shlex.quote(config.model.name_or_path)
    what = "FORGET" if forget is None else shlex.quote(forget.path)
    return f"pyunlearn run --model {model} --forget {what} --retain {kept} --recipe npo+mrd{config.prompt.option}"


def model_of(job: Job[Any]) -> str:
    """Which one was measured, in words."""
    config = job.config
    if not isinstance(config, RunConfig):
        return f"the model {config.model.name_or_path}"
    if config.memorise is not None:
        return f"the model {job.folder.memorised}, which the run's unlearning starts from"
    return f"the model {config.model.name_or_path}, which the run's unlearning starts from"
