"""All numbers of a suite, of any model on TOFU's sets; and the log that other evaluations compare themselves with."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._files import write_json
from .._terminal import shown, visible
from ..data import QA, load_qa
from ..metrics import Number, SuiteResult, cache_folder, evaluate_suite, get_suite, read_log, write_log
from .config import SuiteConfig
from .job import Job, first_model
from .outputs import NUMBERS, check_suite_files

SETS = ("retain", "real_authors", "world_facts")  # in TOFU's {name}_perturbed, beside the forget set


def load_sets(config: SuiteConfig, forget: list[QA]) -> dict[str, list[QA]]:
    """The suite's sets, and holdout where there is one: holdout10 for forget10, no model has seen it.

    Raises what `load_qa` raises, for a file that is missing with its name.
    """
    data, needed = config.data, get_suite(config.suite).sets
    names = {name: f"{name}_perturbed" for name in SETS if name in needed}
    held_out = config.split.replace("forget", "holdout")
    folder = Path(data.path)
    if not folder.exists() or (folder / f"{held_out}.jsonl").is_file():
        names["holdout"] = held_out
    return {"forget": forget} | {name: load_qa(data.path, name=file, limit=data.limit) for name, file in names.items()}


def evaluate_suite_files(
    config: SuiteConfig,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
    command: str = "pyunlearn evaluate",
) -> SuiteResult:
    """The suite's numbers, as a table; into the folder `out` go the log, its summary and numbers.json.

    Raises what `read_log`, `load_qa`, `load_model` and `metrics.evaluate_suite` raise, and before those as
    `check_suite_files`.
    """
    suite = get_suite(config.suite)
    if out is not None:
        check_suite_files(config, Path(out), suite.log_name)
    logs = {name: read_log(path) for name, path in config.logs.items()}
    job = Job.start(config, console, command)
    sets = load_sets(config, job.data.forget)
    with job.interruptible():
        model, tokenizer, stage = first_model(job)
        result = evaluate_suite(
            model,
            tokenizer,
            sets,
            suite,
            logs=logs,
            batch_size=config.evaluate.batch_size,
            max_length=stage.max_length,
            cache=config.evaluate.cache or cache_folder(),
            progress=stage.progress,
        )
        if out is not None:
            about = {"suite": suite.name, "model": config.model.name_or_path, "data": config.data.path}
            numbers = [number.to_json() for number in result.numbers]
            write_json(Path(out) / NUMBERS, {**about, "split": config.split, "numbers": numbers})
            write_log(out, result.log, result.summary, suite.log_name)
    table = Table("name", "value", "samples", "variant", "note", title=suite.summary)
    for number in result.numbers:
        value = "-" if number.value is None else f"{number.value:.6g}"
        table.add_row(number.name, value, number.samples, shown(number.variant), shown(told(number)))
    job.console.print(table)
    if out is not None:
        job.console.print(f"log: {visible(out)}", soft_wrap=True, markup=False)
    return result


def told(number: Number) -> str:
    """Its further numbers, and its note."""
    more = ", ".join(f"{name} {value:.6g}" for name, value in number.more.items())
    return "; ".join(part for part in (more, number.note) if part)
