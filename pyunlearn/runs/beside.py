"""What lines of a suite need of another model: texts written before unlearning, and a reference's likelihoods.

Each model is loaded for the lines that need it, asked, and let go before the next one, and before the model at work.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data import QA
from ..metrics import Measure, Suite, cache_folder, get_metric
from ..metrics.examine import Examinations
from ..metrics.reading import Reading
from .evaluate import run_of
from .files_config import SuiteConfig
from .folder import RunFolder
from .job import Job, loaded
from .overrides import load_config
from .sections import ModelConfig

logger = logging.getLogger("pyunlearn")


def load_beside(job: Job[SuiteConfig]) -> dict[str, Any]:
    """The tools `before` and `reference`, those that lines of the suite need and the job can give.

    before: what --before wrote, by question; else what the model wrote that the run started from, where the model at
    work is a run's, "itself" where it is that one. Where the start cannot be loaded again, that is told and there is
    none.

    Raises as `loaded` for a model that is named.
    """
    config, tools = job.config, dict[str, Any]()
    if before := needed(job, "before"):
        if config.before is not None:
            tools["before"] = texts_by(job, ModelConfig(name_or_path=config.before), before)
        elif (run := run_of(config.model.name_or_path)) is not None:
            tools["before"] = texts_of_start(job, run, before)
    if config.reference is not None and (read := needed(job, "reference")):
        tools["reference"] = readings_by(job, ModelConfig(name_or_path=config.reference), read)
    return {name: tool for name, tool in tools.items() if tool is not None}


def needed(job: Job[SuiteConfig], tool: str) -> list[Measure]:
    """The lines whose sets are there, and their other tools, and that need this one."""
    settings = job.config.evaluate
    return [
        measure
        for measure in job.config.lines.measures
        if tool in get_metric(measure.metric).tools
        and (tool != "before" or measure.options.get("against") == tool)
        and all(name.partition(":")[0] in job.data.sets for name in measure.sets)
        and all(
            settings.has_tool(other, measure.metric)
            for other in get_metric(measure.metric).required_tools
            if other != tool
        )
    ]


def texts_of_start(job: Job[SuiteConfig], run: RunFolder, lines: Sequence[Measure]) -> dict[str, str] | str | None:
    started = start_of(run)
    if Path(started.name_or_path).resolve() == Path(job.config.model.name_or_path).resolve():
        return "itself"
    told = f"before: {run.path} started from {started.name_or_path}"
    if started.embedded:
        logger.warning("%s, which is made of its data and not kept: needs --before, a model's folder", told)
        return None
    try:
        return texts_by(job, started, lines)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("%s, which cannot be used (%s); name a model by --before", told, " ".join(str(error).split()))
        return None


def start_of(run: RunFolder) -> ModelConfig:
    """The model that a run's unlearning started from."""
    config = load_config(run.config)
    if config.memorise is not None:
        return ModelConfig(name_or_path=str(run.memorised))
    return config.model.model_copy(update={"lora": None, "quantize": None, "dtype": "float32"})


def texts_by(job: Job[SuiteConfig], model: ModelConfig, lines: Sequence[Measure]) -> dict[str, str]:
    """Question -> what the model answers."""

    def ask(examinations: Examinations, name: str) -> dict[str, str]:
        of = examinations[name]
        return {item.question: text for item, text in zip(of.item, of.written, strict=True) if text is not None}

    return asked(job, model, lines, ask)


def readings_by(
    job: Job[SuiteConfig], model: ModelConfig, lines: Sequence[Measure]
) -> Callable[[Sequence[QA]], list[Reading]]:
    """As `metrics.readings_by`, of these lines' sets."""

    def ask(examinations: Examinations, name: str) -> dict[QA, Reading]:
        of = examinations[name]
        return dict(zip(of.item, of.answer, strict=True))

    readings = asked(job, model, lines, ask)
    return lambda items: [readings[item] for item in items]


def asked(
    job: Job[SuiteConfig],
    config: ModelConfig,
    lines: Sequence[Measure],
    ask: Callable[[Examinations, str], dict[Any, Any]],
) -> dict[Any, Any]:
    """What a model says of all sets of these lines, put and read as the model at work is; then it goes."""
    suite: Suite = replace(job.config.lines, measures=tuple(lines), aggregates=(), tasks=())
    settings = job.config.evaluate
    model, tokenizer = loaded(job, config)
    stage = job.stage(model, tokenizer)
    examinations = Examinations(
        model,
        tokenizer,
        job.data.sets,
        suite,
        settings.batch_size,
        stage.max_length,
        settings.cache or cache_folder(),
        stage.progress,
        stage.prompt_format,
    )
    found: dict[Any, Any] = {}
    for name in dict.fromkeys(name for line in lines for name in line.sets):
        found |= ask(examinations, name)
    del model, stage, examinations
    gc.collect()
    return found
