"""The main job: memorise (where asked), evaluate, unlearn, evaluate again, report. What is done is kept."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .._files import read_json, write_json, write_text
from .._hints import path_hint
from .._terminal import print_table, shown, visible
from ..model.lora import add_adapter, merge
from ..report.geffect import section
from ..report.run import render_report
from ..report.sampling import sampling_figure
from ..training.callbacks import Evaluations, read_metrics
from ..training.folder import write_model
from ..training.rate import rate_for
from ..training.stage import Stage
from ..training.unlearn import unlearn
from .advice import next_changes, next_command
from .anchors import ANCHORS
from .config import RunConfig
from .evaluate import check_cache, evaluate_sets, read_records, read_summaries, texts_before
from .evaluate_config import PickConfig
from .fits import check_fits
from .folder import RunFolder, config_text
from .job import Job, adapters_base, first_model, loaded, save
from .pick import copy_model, pick_step, told_pick
from .provenance import Attempt, describe, keep_attempt, read_attempts
from .reinforce import arithmetic, make_reinforced, reinforced_model, reinforcement, told
from .sections import ModelConfig
from .table import cell, columns, make_table, table_markdown
from .tools import load_tools
from .verdict import check_goals, reach_verdict

COMPARED = ("before", "after", "retrained")  # whose answers the report puts side by side


@dataclass(frozen=True)
class RunResult:
    folder: Path
    table: list[dict[str, Any]]
    goals: list[dict[str, Any]]
    verdict: dict[str, Any] | None

    @property
    def reached(self) -> bool:
        """Whether every goal was met (True when there is none)."""
        return all(goal["met"] for goal in self.goals)


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn run",
    references: Path | None = None,
) -> RunResult:
    """Runs `config` to its end and writes its folder (see `folder`).

    resume: take up the same run where it stopped. overwrite: begin anew; what the folder holds goes as soon as the new
    run has loaded its model. console: None is silent. command: what was typed, for the messages. references: a folder
    of reference caches that runs share; None keeps the run's own in its folder. Under torchrun every process trains,
    and the first one evaluates and writes.

    Raises FileExistsError for a folder that is not this run's, FileNotFoundError for nothing to resume, ValueError for
    a folder that is no run's own, or for resume and overwrite together, InUse where another job works there,
    Interrupted after Ctrl-C, NonFiniteLossError, and what `check_fits` and loading of data and model raise, before
    anything is trained.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins it anew: needs one of them")
    check_fits(config)
    job = Job.start(config, console, command, references)
    with job.interruptible(" --resume"), job.opened(resume=resume, overwrite=overwrite):
        missing = unmeasured(job.folder, ("before", "after", *config.evaluate.anchors))
        job.processes.wait()  # all have looked before any writes
        if missing:
            attempt_to(job, missing)
        result = finish(job)
        job.processes.wait()
    tell(job, result)
    return result


def prepare(config: RunConfig, *, command: str) -> None:
    """What a run of `config` is before it unlearns, in its folder: memorised, evaluated, and the models that it is held
    against; what is there of it is taken up. Raises as `run`."""
    job = Job.start(config, None, command)
    with job.interruptible(), job.opened(resume=job.folder.marked):
        if missing := unmeasured(job.folder, ("before", *config.evaluate.anchors)):
            attempt_to(job, missing)


def unmeasured(folder: RunFolder, moments: Iterable[str]) -> list[str]:
    return [moment for moment in moments if not folder.evaluation(f"{moment}.json").is_file()]


def attempt_to(job: Job[RunConfig], missing: Sequence[str]) -> None:
    """`compute`, and a note of what it took."""
    with job.processes.first_first():
        if job.processes.first:
            check_cache(job.config.evaluate)
    attempt = Attempt(job.command)
    try:
        compute(job, missing)
    except BaseException:
        with suppress(OSError, ValueError):  # what went wrong is told, not that it cannot be noted
            note_attempt(job, attempt)
        raise
    note_attempt(job, attempt)


def note_attempt(job: Job[RunConfig], attempt: Attempt) -> None:
    if job.processes.first and job.folder.computed:
        keep_attempt(job.folder, attempt.record(job.data, job.processes.count))


def compute(job: Job[RunConfig], missing: Sequence[str]) -> None:
    """The missing evaluations and all that comes before them, leaving out what an earlier attempt has finished."""
    model, tokenizer, stage = first_model(job)
    if "before" in missing:
        evaluate_moment(job, stage, "before", model, tokenizer)
    if "after" in missing:
        if job.folder.checkpoint.is_dir():
            model, tokenizer = unlearned_model(job)
        else:
            model = unlearn_model(job, stage, model, tokenizer)
        evaluate_moment(job, stage, "after", model, tokenizer)
    for name in job.config.evaluate.anchors:
        if name in missing:
            evaluate_moment(job, stage, name, *ANCHORS[name](job, stage))


def evaluate_moment(job: Job[RunConfig], stage: Stage, moment: str, model: Any, tokenizer: Any) -> None:
    settings = job.config.evaluate
    sets = job.data.evaluated(settings.retain_limit)
    if job.processes.first:
        counts = ", ".join(f"{len(items)} {name}" for name, items in sets.items())
        job.console.print(f"[bold]evaluate[/] {moment}: {counts} samples")

        def before() -> Any:
            return "itself" if moment == "before" else texts_before(job.folder)

        device, progress = job.processes.device, stage.progress
        tools = load_tools(settings, job.data.texts, device, progress, before, job.endpoints)
        evaluate_sets(stage, settings, job.folder, moment, sets, model, tokenizer, tools)
    job.processes.wait()


def unlearned_model(job: Job[RunConfig]) -> tuple[Any, Any]:
    """As it is loaded from the checkpoint."""
    kind: Any = {"dtype": job.config.model.dtype, "quantize": job.config.model.quantize}
    return loaded(job, ModelConfig(name_or_path=str(job.folder.checkpoint), **kind))


def unlearn_model(job: Job[RunConfig], stage: Stage, model: Any, tokenizer: Any) -> Any:
    """The model after it, as it is loaded from the checkpoint that is written."""
    settings, lora = job.config.unlearn, job.config.model.lora
    if settings.reinforce is not None:
        make_reinforced(job, stage)
    if not settings.trains:
        return arithmetic(job, stage, model, tokenizer)
    reinforced = None if settings.reinforce is None else reinforced_model(job)
    if lora is not None:
        model = add_adapter(model, **lora.adapter(), seed=stage.seed, base=adapters_base(job))
    merged = lora is not None and lora.save == "merged"
    rate = rate_for(model) if settings.learning_rate is None else settings.learning_rate
    job.console.print(f"[bold]unlearn[/] {shown(told(settings))}, at a learning rate of {rate:g}", highlight=False)
    quiet = replace(stage, console=Console(quiet=True))  # the training's bar is on the screen

    def evaluate(step: int, model: Any) -> dict[str, float]:
        evaluate_moment(job, quiet, f"step-{step}", model, tokenizer)
        means = read_summaries(job.folder, f"step-{step}", job.data.evaluated(None)) if job.processes.first else {}
        return {f"{name}/{metric}": value for name, own in means.items() for metric, value in own.items()}

    every = job.config.evaluate.every
    watching = [] if every is None else [Evaluations(every, evaluate)]
    unlearned = unlearn(stage, settings, model, tokenizer, job.data, job.config.geffect, watching, merged, reinforced)
    if job.processes.first:
        first = {} if reinforced is None else {"reinforced": reinforcement(job)}
        write_json(job.folder.unlearning, {**unlearned.as_dict(), **first})
    if merged:
        model = merge(model)
    if job.config.evaluate.pick is not None:
        return pick_model(job, stage, unlearned.steps, model, tokenizer)
    save(job, "unlearn", model, tokenizer)
    return merge(model) if lora is not None and not merged and job.config.model.quantize is None else model


def pick_model(job: Job[RunConfig], stage: Stage, steps: int, model: Any, tokenizer: Any) -> Any:
    """Measures and keeps the last model, of `steps`, too; the one that is picked is then the run's checkpoint, of which
    it is loaded."""
    folder, settings = job.folder, job.config.evaluate
    evaluate_moment(job, stage, f"step-{steps}", model, tokenizer)
    if job.processes.first:
        if steps not in folder.kept_models():
            write_model(folder.kept / f"step-{steps}", model, tokenizer)
        sets = job.data.evaluated(settings.retain_limit)
        kept = [step for step in folder.evaluated_steps() if step in folder.kept_models()]
        means = {step: read_summaries(folder, f"step-{step}", sets) for step in kept}
        rows = {name: len(items) for name, items in sets.items()}
        picked = pick_step(read_summaries(folder, "before", sets), means, settings.pick or PickConfig(), rows)
        write_json(folder.unlearning, {**read_json(folder.unlearning, "--resume unlearns again"), "picked": picked})
        job.console.print(f"[bold]pick[/] {told_pick(picked)}", highlight=False, soft_wrap=True)
        copy_model(folder.kept_models()[picked["step"]], folder.checkpoint)
        folder.remove_training("unlearn")
    job.processes.wait()
    return unlearned_model(job)[0]


def finish(job: Job[RunConfig]) -> RunResult:
    """Table and report from what is on disk."""
    folder, config = job.folder, job.config
    sets = list(job.data.evaluated(config.evaluate.retain_limit))
    measured = [name for name in ("before", "after", *ANCHORS) if folder.evaluation(f"{name}.json").is_file()]
    moments = {moment: read_summaries(folder, moment, sets) for moment in measured}
    records = {moment: read_records(folder, moment, sets) for moment in measured}
    table = make_table(moments, records)
    goal = config.evaluate.goal
    rows = {name: len(records["after"][name]) for name in sets}
    goals = [] if goal is None else check_goals(moments["before"], moments["after"], goal, rows)
    remedy = f"delete {folder.checkpoint} and {folder.evaluation('after.json')}, and --resume unlearns again"
    unlearning = read_json(folder.unlearning, remedy)
    verdict = None
    if goal is not None:
        verdict = reach_verdict(moments["before"], goal, goals).as_dict()
        left = moments["after"]["forget"]["probability"] / max(moments["before"]["forget"]["probability"], 1e-12)
        changes = next_changes(verdict["name"], config, rate_of(config, unlearning), left)
        if not config.unlearn.trains:
            verdict["advice"] = "another strength of the arithmetic"
        verdict["command"] = next_command(job.command, changes, f"{folder.path}-2")
    if job.processes.first:
        write_json(folder.path / "table.json", {"table": table, "goals": goals, "verdict": verdict})
        write_text(folder.path / "table.md", table_markdown(table))
        metrics = read_metrics(folder.metrics)
        on_the_way = {step: read_summaries(folder, f"step-{step}", sets) for step in folder.evaluated_steps()}
        ends = {0: moments["before"], unlearning["steps"]: moments["after"]}
        curves = dict(sorted((ends | on_the_way).items())) if on_the_way else {}  # where one is picked, the last is too
        html = render_report(
            config=config.to_dict(),
            config_text=config_text(config),
            table=table,
            goals=goals,
            verdict=verdict,
            made=describe(config, read_attempts(folder), steps_taken(config, unlearning)),
            metrics=metrics,
            curves=curves,
            records={moment: records[moment] for moment in COMPARED if moment in records},
            unlearning={**unlearning, "svg": sampling_figure(unlearning)},
            geffect=section([row for row in metrics if "geffect" in row]),
        )
        write_text(folder.report, html)
    return RunResult(folder.path, table, goals, verdict)


def rate_of(config: RunConfig, unlearning: Mapping[str, Any]) -> float:
    """The learning rate that an unlearning took; runs of earlier versions have it in their settings alone."""
    return float(unlearning.get("learning_rate", config.unlearn.learning_rate or 0))


def steps_taken(config: RunConfig, unlearning: Mapping[str, Any]) -> dict[str, str]:
    """What of the unlearning a page tells beside model, data and seed."""
    settings = config.unlearn
    rate = f"{rate_of(config, unlearning):g}"
    batch = settings.batch_size * settings.gradient_accumulation_steps
    made = {"objective" if settings.trains else "made of": told(settings)}
    if (first := unlearning.get("reinforced")) is not None:
        made["reinforced"] = (
            f"{first['steps']} steps on the forget set, at a learning rate of {first['learning_rate']:g}"
        )
    if settings.trains:
        made["steps"] = f"{unlearning['steps']}, of {batch} samples, at a learning rate of {rate}"
    if (picked := unlearning.get("picked")) is not None:
        made["picked"] = told_pick(picked)
    trained, every = unlearning.get("trained", 0), unlearning.get("parameters", 0)  # older runs do not tell
    part = {} if trained == every else {"trained": f"{trained:,} of {every:,} parameters ({trained / every:.2%})"}
    return made | part


def tell(job: Job[RunConfig], result: RunResult) -> None:
    """The table, the goals, and what to try next."""
    first = "" if job.config.memorise is None else "; the model memorised the rows first"
    table = Table("set", "metric", title=f"before and after{first}", title_justify="left", collapse_padding=True)
    for column in columns(result.table):
        table.add_column(column, justify="right")
    for row, following in zip(result.table, [*result.table[1:], None], strict=True):
        numbers = [cell(row, column) for column in columns(result.table)]
        last = following is None or following["set"] != row["set"]
        table.add_row(shown(row["set"]), row["metric"], *numbers, end_section=last)
    print_table(job.console, table)
    for goal in result.goals:
        mark = "[bold green]reached[/]" if goal["met"] else "[bold red]missed[/] "
        job.console.print(f"{mark} {shown(goal['text'])}", highlight=False, soft_wrap=True)
    if result.verdict is not None:
        style, verdict = "green" if result.verdict["clean"] else "red", result.verdict
        job.console.print(f"[bold {style}]verdict: {verdict['name']}[/]", highlight=False)
    if not job.config.has_retain:
        job.console.print("no rows to retain: nothing kept the rest in its place, and what it cost was not measured")
    folder = result.folder
    known = job.config.memorise is None or "retrained" in columns(result.table) or not job.config.has_retain
    next_try = [] if result.verdict is None else [f"  {result.verdict['command']}   # {result.verdict['advice']}"]
    lines = [
        f"report  {folder / 'report.html'}",
        f"model   {folder / 'checkpoint'}",
        "",
        "try next",
        *next_try,
        "  pyunlearn recipes   # other methods by name; pyunlearn objectives has their parts and options",
        *([] if known else [f"  {job.command} --retrain --resume   # beside a model that never saw the forget set"]),
        f"  pyunlearn evaluate {shlex.quote(str(folder))} --data FILE.jsonl   # what it says of other questions",
    ]
    job.console.print("\n" + visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)


def load_result(path: str | Path) -> RunResult:
    """The result of a finished run folder. Raises FileNotFoundError if it has none."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f"RUN: no such folder: {path}{path_hint(Path(path))}")
    file = Path(path) / "table.json"
    if not file.is_file():
        runs = sorted(Path(path).glob("runs/*/seed*"))
        hint = f"; it is a sweep's folder, its runs are {path}/runs/*/seed*" if runs else ""
        raise FileNotFoundError(f"{path}: no finished run there (table.json is missing){hint}")
    stored = read_json(file, remedy := "--resume of the run makes it again")
    if (
        not isinstance(stored, dict)
        or not {"table", "goals"} <= stored.keys()
        or not all(isinstance(row, dict) and {"set", "metric"} <= row.keys() for row in stored["table"])
    ):
        raise ValueError(f"{file}: is damaged, it has no table and goals; {remedy}")
    return RunResult(Path(path), stored["table"], stored["goals"], stored.get("verdict"))
