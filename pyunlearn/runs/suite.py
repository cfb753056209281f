"""All numbers of a suite, of any model on its sets; and the log that other evaluations compare themselves with."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._files import write_json
from .._terminal import print_table, shown, visible
from ..metrics import Number, SuiteResult, cache_folder, evaluate_suite, read_log, write_log
from .beside import load_beside
from .evaluate import check_cache
from .files_config import SuiteConfig
from .job import Job, first_model
from .outputs import NUMBERS, check_suite_files
from .tools import load_models


def evaluate_suite_files(
    config: SuiteConfig,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
    command: str = "pyunlearn evaluate",
) -> SuiteResult:
    """The suite's numbers, as a table; into the folder `out` go the log, its summary and numbers.json.

    Raises what `read_log`, `load_sets`, `load_beside`, `load_model`, `load_models` and `metrics.evaluate_suite` raise,
    and before that as `check_suite_files` and `check_cache`.
    """
    suite = config.lines
    if out is not None:
        check_suite_files(config, Path(out), suite.log_name)
    check_cache(config.evaluate)
    logs = {name: read_log(path) for name, path in config.logs.items()}
    for name, log in logs.items():
        suite.check_log(name, log, f"--{name}-log={config.logs[name]}")
    job = Job.start(config, console, command)
    with job.interruptible():
        beside = load_beside(job)
        model, tokenizer, stage = first_model(job)
        metrics = [measure.metric for measure in suite.measures]
        result = evaluate_suite(
            model,
            tokenizer,
            job.data.sets,
            suite,
            logs=logs,
            tools=load_models(config.evaluate, metrics, job.processes.device, stage.progress) | beside,
            batch_size=config.evaluate.batch_size,
            max_length=stage.max_length,
            cache=config.evaluate.cache or cache_folder(),
            progress=stage.progress,
            task_folder=config.task_folder,
            task_limit=config.limit,
            prompt_format=stage.prompt_format,
        )
    table = Table("name", "value", "samples", "variant", "note", title=suite.summary)
    for number in result.numbers:
        value = "-" if number.value is None else f"{number.value:.6g}"
        table.add_row(number.name, value, number.samples, shown(number.variant), shown(told(number)))
    print_table(job.console, table)
    if any("not its source's" in number.note for number in result.numbers):
        names = ", ".join(suite.prompts)
        job.console.print(
            f"prompt: suite {suite.name} has another than this; --prompt takes one of {names}", soft_wrap=True
        )
    if without := sum(number.value is None for number in result.numbers):
        job.console.print(f"{without} of {len(result.numbers)} lines have no value here; their notes say why")
    if out is not None:  # last: on a full disk the numbers have been seen
        data = config.data
        about = {"suite": suite.name, "model": config.model.name_or_path}
        about |= {} if data is None else {"data": data.path}
        numbers = [number.to_json() for number in result.numbers]
        split = {} if data is None or data.name is None else {"split": config.split}
        told_once = {"declined": result.declined} if result.declined else {}
        write_json(Path(out) / NUMBERS, {**about, **split, "numbers": numbers, **told_once})
        write_log(out, result.log, result.summary, suite.log_name)
        job.console.print(f"log: {visible(out)}", soft_wrap=True, markup=False)
    of = "" if config.data is None else f"--data {shlex.quote(config.data.path)} "
    again = f"pyunlearn evaluate --suite {suite.name} --model OTHER {of}--out FOLDER{config.prompt.option}"
    lines = ["", "try next", f"  {again}   # the model before, or one that never saw the forget set"]
    job.console.print(visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)
    return result


def told(number: Number) -> str:
    """Its further numbers, and its note."""
    more = ", ".join(f"{name} {value:.6g}" for name, value in number.more.items())
    return "; ".join(part for part in (more, number.note) if part)
