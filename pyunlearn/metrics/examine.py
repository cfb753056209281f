"""A suite of one model: every line's number, and the log that other evaluations compare themselves with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._hints import check_known
from ..data import QA, PlainFormat, PromptFormat
from ..data.prompts import is_one_of
from ..model.causal_lm import CausalLM
from .evaluate import Examination, reads_of
from .generation import first_tokens, rouge_scores
from .logs import Entry, Log
from .metric import METRICS, CannotMeasure, check_tools
from .reading import Kept
from .suites import PAIRED, SUITES, Aggregate, Form, Logs, Measure, Suite, get_suite
from .teacher_forced import probability_of
from .utility import REDUCTIONS, mean
from .zero_shot import run_tasks, task_manager

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Number:
    """One line of a suite. value: None where there is none, and note says why. samples: how many it is made of, as
    "300" or "300 / 400"; variant: source and options; more: further numbers, by name."""

    name: str
    value: float | None
    samples: str
    variant: str
    note: str = ""
    more: Mapping[str, float] = field(default_factory=dict)

    def noted(self, note: str) -> Number:
        """With a note beside its own, if it has a value."""
        told = "; ".join(part for part in (self.note, note) if part)
        return self if self.value is None else replace(self, note=told)

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: null."""
        numbers = {"value": self.value, **self.more}
        finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
        return {"name": self.name, **finite, "samples": self.samples, "variant": self.variant, "note": self.note}


@dataclass(frozen=True)
class SuiteResult:
    """numbers: the suite's lines, then its aggregates. log: what they are made of, to be written by `write_log`.
    declined: by optimisation that was not used, why."""

    numbers: list[Number]
    log: dict[str, Entry]
    declined: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, float | None]:
        return {number.name: number.value for number in self.numbers}


def evaluate_suite(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[QA]],
    suite: str | Suite = "tofu",
    *,
    logs: Logs | None = None,
    tools: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    task_folder: str | Path | None = None,
    task_limit: int | None = None,
    prompt_format: PromptFormat | None = None,
) -> SuiteResult:
    """Every number of a suite.

    sets: by name, those that the suite names (`Suite.sets`), and optional ones where they are there. logs: of reference
    models, "retain" and "full", from `read_log` or an earlier result. tools: what some metrics need, by name. Each text
    is read, and each question answered, once for all lines. cache: a folder where every finished batch is kept
    (`reading.Kept`). task_folder: more of lm-eval's tasks; task_limit: samples of each task (`zero_shot`).
    prompt_format: of the sets that have no form of their own, None is `PromptFormat`.

    A line that cannot be had here (a tool, a metric, an optional set, a log, lm-eval or a task's data are not there)
    has the value None and a note; a suite with tasks whose sets are all optional takes no sets at all. Raises
    ValueError for an unknown suite, task, tool or set (one of another suite is not looked at), a suite without lines,
    an option's value that is none, a set that is missing or lacks what a line needs, a log without anything that the
    suite reads of it, and what `evaluate` raises.
    """
    suite = get_suite(suite) if isinstance(suite, str) else suite
    there = ", ".join(sets) or "none"
    if missing := [name for name in suite.sets if name not in sets]:
        raise ValueError(f"sets: suite {suite.name!r} needs {', '.join(missing)}, got {there}")
    if not (suite.measures or suite.tasks or suite.aggregates):
        raise ValueError(f"suite {suite.name!r} has no tasks of its own; name some (pyunlearn evaluate: --task)")
    alone = suite.tasks and not sets  # which need no data of ours
    if suite.known_sets and not alone and not any(name in sets for name in suite.known_sets):
        raise ValueError(f"sets: suite {suite.name!r} needs one of {', '.join(suite.known_sets)}, got {there}")
    known = [*suite.known_sets, *(name for each in SUITES.values() for name in each.known_sets)]
    for name in sets:
        check_known("sets", name, suite.known_sets if name not in known else known)
    check_tools(tools or {})
    for measure in suite.measures:
        if measure.metric in METRICS:
            METRICS[measure.metric].check_options(measure.options)
    for name, log in (logs or {}).items():
        suite.check_log(name, log, f"logs[{name!r}]")
    examinations = Examinations(model, tokenizer, sets, suite, batch_size, max_length, cache, progress, prompt_format)
    for measure in suite.measures:  # before anything takes time
        for name in measure.sets if measure.metric in METRICS else ():
            if name in examinations:
                with errors_of(name):
                    examinations[name].check(METRICS[measure.metric])
    tasks = Tasks(suite, task_folder, task_limit)
    numbers: list[Number] = []
    own: dict[str, Entry] = {}
    for measure in suite.measures:
        number, own[measure.name] = measured(measure, examinations, tools or {})
        numbers.append(number)
    numbers = [each.noted(examinations.other_prompt) for each in numbers]
    for task in suite.tasks:
        number = tasks.number(task, examinations)
        numbers.append(number)
        own[number.name] = Entry(number.value)
    combined, entries = aggregate(suite.aggregates, own, logs)
    combined = [each.noted(examinations.other_prompt) for each in combined]
    return SuiteResult(numbers + combined, own | entries, dict(examinations.kept.declined))


def aggregate(
    aggregates: Sequence[Aggregate], log: Log, logs: Logs | None = None
) -> tuple[list[Number], dict[str, Entry]]:
    """Aggregates of a log alone, each after the other: numbers, and their entries."""
    numbers: list[Number] = []
    entries: dict[str, Entry] = {}
    for each in aggregates:
        try:
            found = each.combine({**log, **entries}, logs or {})
        except ValueError as why:
            number = Number(each.name, None, "", each.variant, str(why))
        else:
            number = Number(each.name, found.value, found.count, found.variant or each.variant, found.note, found.more)
        numbers.append(number)
        entries[each.name] = Entry(number.value)
    return numbers, entries


@dataclass
class Examinations:
    """The examination of each set, made when it is first asked for."""

    model: nn.Module | CausalLM
    tokenizer: PreTrainedTokenizerBase
    sets: Mapping[str, Sequence[QA]]
    suite: Suite
    batch_size: int
    max_length: int | None
    cache: str | Path | None
    progress: bool
    prompt_format: PromptFormat | None = None
    made: dict[str, Examination] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lm = CausalLM.of(self.model)
        self.kept = Kept(self.cache, self.lm)

    def __contains__(self, name: str) -> bool:
        return name.partition(":")[0] in self.sets

    def __getitem__(self, name: str) -> Examination:
        if name not in self.made:
            metrics = [
                METRICS[each.metric] for each in self.suite.measures if name in each.sets and each.metric in METRICS
            ]
            form = self.suite.form(name)
            self.made[name] = Examination(
                self.lm,
                self.tokenizer,
                self.items(name),
                outputs=tuple(dict.fromkeys(output for metric in metrics for output in metric.outputs)),
                reads=reads_of(metrics),
                batch_size=self.batch_size,
                max_length=self.max_length,
                max_new_tokens=form.max_new_tokens,
                kept=self.kept,
                progress=self.progress,
                prompt_format=self.plain_format(form) if form.plain else self.prompt_format,
                stops=form.stops,
            )
        return self.made[name]

    @property
    def other_prompt(self) -> str:
        """That the suite's source puts its sets by another prompt; "" if not, or if nobody knows."""
        given = (self.prompt_format or PromptFormat(self.tokenizer)).given
        known = self.suite.prompts
        return f"asked by prompt={given.name}, not its source's" if known and not is_one_of(given, known) else ""

    def plain_format(self, form: Form) -> PlainFormat:
        limit = self.lm.context_length if self.max_length is None else self.max_length
        around = form.around.get(self.lm.config.model_type, form.around[""])
        return PlainFormat(self.tokenizer, form.longest, None if form.longest is None else limit, around)

    def items(self, name: str) -> list[QA]:
        """Raises ValueError for a set of paraphrased questions where some have none."""
        of, _, which = name.partition(":")
        items = list(self.sets[of])[: self.suite.rows]
        if not which:
            return items
        without = [i for i, item in enumerate(items) if item.paraphrased_question is None]
        if without:
            raise ValueError(f"{len(without)} of {len(items)} have no paraphrased_question (first: item {without[0]})")
        return [replace(item, question=item.paraphrased_question or "") for item in items]


def measured(measure: Measure, examinations: Examinations, tools: Mapping[str, Any]) -> tuple[Number, Entry]:
    """One line's number and its entry."""

    def none(why: str) -> tuple[Number, Entry]:
        return Number(measure.name, None, "", measure.variant, why), Entry(None)

    if measure.metric not in METRICS:
        return none(f"there is no metric {measure.metric!r}")
    if absent := [name for name in measure.sets if name not in examinations]:
        return none(f"no {' and no '.join(absent)} set")
    try:
        found = [examined(measure, examinations[name], name, tools) for name in measure.sets]
    except CannotMeasure as why:
        return none(str(why))
    values = [own for own, _ in found]
    if not all(values):
        return none("no sample has a value")
    counts = " / ".join(str(len(own)) for own in values)
    (own, samples), others = found[0], found[1:]
    if not measure.against:
        value = REDUCTIONS[measure.reduction](own)
        return Number(measure.name, value, counts, measure.variant), Entry(value, samples)
    held_out = [value for other, _ in others for value in other]
    function, sign = PAIRED[measure.reduction]
    value = function(own, held_out)
    parts = {
        "forget": Entry(mean(own), samples),
        "holdout": Entry(mean(held_out), dict(enumerate(sample for _, each in others for sample in each.values()))),
    }
    return Number(measure.name, value, counts, measure.variant, sign), Entry(value, {}, parts)


def split_task(task: str) -> tuple[str, str]:
    """Name and metric: acc, unless it stands after a stroke."""
    name, _, metric = task.partition("/")
    return name, metric or "acc"


@dataclass
class Tasks:
    """A suite's zero-shot tasks. why_not: there can be none here. Raises ValueError for an unknown one."""

    suite: Suite
    folder: str | Path | None
    limit: int | None
    manager: Any = None
    why_not: str = ""

    def __post_init__(self) -> None:
        try:
            if self.suite.tasks:
                self.manager = task_manager([split_task(task)[0] for task in self.suite.tasks], self.folder)
        except ImportError as why:
            self.why_not = str(why)

    def number(self, task: str, examinations: Examinations) -> Number:
        name, metric = split_task(task)
        variant = "lm-eval" if self.limit is None else f"lm-eval, limit={self.limit}"
        value, note = None, self.why_not
        if not note:
            try:
                lm, tokenizer, batch_size = examinations.lm, examinations.tokenizer, examinations.batch_size
                found = run_tasks(lm, tokenizer, [name], self.manager, batch_size, limit=self.limit)[name]
            except (OSError, ValueError, ImportError) as error:  # its data cannot be had
                note = f"{type(error).__name__}: {' '.join(str(error).split())}"
            else:
                value = found.get(metric)
                note = "" if metric in found else f"the task has no {metric}, but {', '.join(found) or 'no number'}"
        return Number(f"{name}/{metric}", value, "", variant, note)


def examined(
    measure: Measure, examination: Examination, name: str, tools: Mapping[str, Any]
) -> tuple[list[float], dict[int, dict[str, Any]]]:
    """Values of the samples that have one, and by index what logs have of them."""
    with errors_of(name):
        values = examination.measure(METRICS[measure.metric], measure.options, tools)
    there = {i: value for i, value in enumerate(values) if value is not None}
    return list(there.values()), {i: sample_of(measure, examination, i, value) for i, value in there.items()}


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Whose set an error is about."""
    try:
        yield
    except CannotMeasure:
        raise
    except ValueError as error:
        raise ValueError(f"set {name}: {error}") from None


def sample_of(measure: Measure, examination: Examination, i: int, value: float) -> dict[str, Any]:
    """As OpenUnlearning's logs have it, which also tell losses and texts."""
    if measure.metric in ("rouge_l", "rouge_1"):
        written = examination.written[i] or ""
        answer = first_tokens(examination.items[i].answer, examination.tokenizer, measure.options.get("longest"))
        texts = {"input": examination.prompts[i], "ground_truth": answer, "generation": written}
        return rouge_scores(written, answer, measure.options.get("stemmed", True)) | texts
    if measure.metric == "probability":
        return {"prob": value, "avg_loss": examination.answer[i].loss}
    if measure.metric == "paraphrase_probability":
        return {"prob": value, "avg_loss": examination.paraphrase[i].loss}
    if measure.metric == "perturbed_probability":
        wrong = examination.wrong[i]
        return {"prob": [probability_of(each) for each in wrong], "avg_loss": [each.loss for each in wrong]}
    return {"prob" if measure.metric == "probability_w_options" else "score": value}
