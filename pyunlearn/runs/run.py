"""The main job: memorise (where asked), evaluate, unlearn, evaluate again, report. What is done is kept."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import QA, check_disjoint, generate_authors, load_qa, load_refusals
from ..model.causal_lm import CausalLM
from ..model.load import load_model, process_state
from ..report.geffect import section
from ..report.run import check_goal, make_table, render_report, table_markdown
from ..report.sampling import sampling_figure
from ..training.callbacks import read_metrics
from ..training.unlearn import Context, interruptible, memorise, remove_training, unlearn
from .config import EMBEDDED, DataConfig, RunConfig
from .evaluate import evaluate_sets, read_records, read_summaries
from .folder import RunFolder, config_text


@dataclass(frozen=True)
class RunData:
    """Questions and answers of a run; `texts` trains the embedded tokenizer."""

    forget: list[QA]
    retain: list[QA]
    refusals: list[str]
    texts: list[str]


@dataclass(frozen=True)
class RunResult:
    folder: Path
    table: list[dict[str, Any]]
    goals: list[dict[str, Any]]

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
    resume_command: str = "pyunlearn run --resume",
) -> RunResult:
    """Runs `config` to its end and writes its folder (see `folder`).

    resume: take up the same run where it stopped. overwrite: delete the folder first. console: None is silent.
    Under torchrun every process trains, and the first one evaluates and writes.

    Raises FileExistsError for a folder that is not this run's, Interrupted after Ctrl-C, NonFiniteLossError, and what
    loading of data and model raises, before anything is trained.
    """
    quiet_libraries()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    state = process_state()
    console = console if console is not None and state.is_main_process else Console(quiet=True)
    folder = RunFolder(config.folder)
    data = load_data(config.data, config.seed)
    if state.is_main_process:
        folder.open(config, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    with interruptible(resume_command):
        if not folder.evaluation("after.json").is_file():
            compute(config, folder, data, console, state)
        result = finish(config, folder, state)
        state.wait_for_everyone()
    tell(result, console, resume_command.removesuffix(" --resume"))
    return result


def compute(config: RunConfig, folder: RunFolder, data: RunData, console: Console, state: PartialState) -> None:
    """Everything up to the second evaluation, leaving out what an earlier attempt has finished."""
    context, model, tokenizer = first_model(config, folder, data, console, state)
    max_length = context.max_length
    sets = {"forget": data.forget, "retain": data.retain[: config.evaluate.retain_limit]}

    def evaluated(moment: str) -> None:
        if state.is_main_process and not folder.evaluation(f"{moment}.json").is_file():
            console.print(
                f"[bold]evaluate[/] {moment}: {len(sets['forget'])} forget, {len(sets['retain'])} retain samples"
            )
            evaluate_sets(model, tokenizer, sets, config.evaluate, folder, moment, max_length=max_length,
                          seed=config.seed, progress=context.progress)  # fmt: skip
        state.wait_for_everyone()

    evaluated("before")
    if folder.checkpoint.is_dir():
        model, tokenizer = load_model(str(folder.checkpoint), dtype=config.model.dtype)
        model.to(state.device)
    else:
        terms = [f"{term.coefficient:g}·{term.name}" for term in (*config.unlearn.forget, *config.unlearn.retain)]
        console.print(f"[bold]unlearn[/] {' + '.join(terms)}")
        unlearn(context, model, tokenizer, data.forget, data.retain, data.refusals)
        save(folder, folder.checkpoint, "unlearn", model, tokenizer, state)
    evaluated("after")


def first_model(
    config: RunConfig, folder: RunFolder, data: RunData, console: Console, state: PartialState
) -> tuple[Context, Any, Any]:
    """Context, model and tokenizer before unlearning: as loaded, or memorised, by an earlier attempt or now."""
    model, tokenizer = starting_model(config, folder, data)
    model.to(state.device)
    context = Context(config, folder, console, check_length(config.data, model), state.num_processes)
    if config.memorise is not None and not folder.memorised.is_dir():
        console.print("[bold]memorise[/] so that there is something to forget")
        memorise(context, model, tokenizer, data.forget, data.retain)
        save(folder, folder.memorised, "memorise", model, tokenizer, state)
    return context, model, tokenizer


def starting_model(config: RunConfig, folder: RunFolder, data: RunData) -> tuple[Any, Any]:
    if config.memorise is not None and folder.memorised.is_dir():
        return load_model(str(folder.memorised), dtype=config.model.dtype)
    return load_model(**config.model.model_dump(), texts=data.texts, seed=config.seed)


def save(folder: RunFolder, path: Path, stage: str, model: Any, tokenizer: Any, state: PartialState) -> None:
    """Model (safetensors) and tokenizer under `path`, whole; then the stage's resumable checkpoints go."""
    if state.is_main_process:
        folder.write_model(path, model, tokenizer)
        remove_training(folder, stage)
    state.wait_for_everyone()


def load_data(config: DataConfig, seed: int) -> RunData:
    """Raises what `load_qa` and `load_refusals` raise, and ValueError where forget and retain overlap."""
    if config.source == EMBEDDED:
        world = generate_authors(config.num_authors, config.questions_per_author, seed, config.forget_fraction)
        data = RunData(world.forget, world.retain, list(world.refusals), world.texts)
    else:
        forget, retain = (
            load_qa(source.path, name=source.name, split=source.split, limit=source.limit)
            for source in (config.forget, config.retain)
            if source is not None
        )
        refusals = [] if config.refusals is None else load_refusals(config.refusals)
        texts = [f"Question: {item.question}\nAnswer: {item.answer}" for item in forget + retain]
        data = RunData(forget, retain, refusals, texts + refusals)
    check_disjoint(data.forget, data.retain)
    return data


def check_length(config: DataConfig, model: Any) -> int | None:
    """The longest sequence allowed, in tokens. Raises ValueError if data.max_length is beyond the model's context."""
    context = CausalLM.of(model).context_length
    if context is not None and config.max_length is not None and config.max_length > context:
        raise ValueError(f"data.max_length={config.max_length}: the model's context is {context} tokens")
    return config.max_length or context


def finish(config: RunConfig, folder: RunFolder, state: PartialState) -> RunResult:
    """Table and report from what is on disk."""
    before, after = read_summaries(folder, "before"), read_summaries(folder, "after")
    table = make_table(before, after)
    goals = [] if config.evaluate.goal is None else check_goal(before, after, config.evaluate.goal)
    if state.is_main_process:
        unlearning = json.loads(folder.unlearning.read_text(encoding="utf-8"))
        folder.write_json(folder.path / "table.json", {"table": table, "goals": goals})
        folder.write_text(folder.path / "table.md", table_markdown(table))
        metrics = read_metrics(folder.metrics)
        html = render_report(
            config=config.to_dict(),
            config_text=config_text(config),
            table=table,
            goals=goals,
            metrics=metrics,
            before=read_records(folder, "before"),
            after=read_records(folder, "after"),
            unlearning={**unlearning, "svg": sampling_figure(unlearning)},
            g_effect=section([row for row in metrics if "g_effect" in row]),
        )
        folder.write_text(folder.report, html)
    return RunResult(folder.path, table, goals)


def tell(result: RunResult, console: Console, command: str) -> None:
    """The table, the goals, and what to try next after `command`."""
    table = Table("set", "metric", title="before and after", title_justify="left")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for row in result.table:
        numbers = [f"{row['before']:.4f}", f"{row['after']:.4f}", f"{row['change']:+.4f}"]
        table.add_row(row["set"], row["metric"], *numbers, end_section=row is result.table[-1])
    console.print(table)
    for goal in result.goals:
        mark = "[bold green]reached[/]" if goal["met"] else "[bold red]missed[/] "
        console.print(f"{mark} {escape(goal['text'])}", highlight=False, soft_wrap=True)
    folder = result.folder
    lines = [
        f"report  {folder / 'report.html'}",
        f"model   {folder / 'checkpoint'}",
        "",
        "try next",
        f"  {command} --set unlearn.forget=npo --set output={shlex.quote(f'{folder}-npo')}   # another objective",
        "  pyunlearn objectives   # all of them, with their options",
        f"  pyunlearn evaluate --model {shlex.quote(str(folder / 'checkpoint'))} --data FILE.jsonl",
    ]
    console.print("\n" + "\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def quiet_libraries() -> None:
    """One progress bar at a time: ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_result(path: str | Path) -> RunResult:
    """The result of a finished run folder. Raises FileNotFoundError if it has none."""
    file = Path(path) / "table.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no finished run there (table.json is missing)")
    stored = json.loads(file.read_text(encoding="utf-8"))
    return RunResult(Path(path), stored["table"], stored["goals"])
