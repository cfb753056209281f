"""Several metrics of one model on one set of questions, as records per sample and their means."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .._hints import check_known
from ..data import QA, PromptFormat, QADataset
from ..data.tokenise import token_texts
from ..model.causal_lm import CausalLM
from .endpoint import Endpoint
from .generation import before_stops, greedy_generate
from .metric import READ, CannotMeasure, Metric, Told, check_tools, get_metric
from .reading import Kept, Reading, read_rows
from .teacher_forced import VARIANTS, Variant
from .utility import mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("pyunlearn")
DEFAULT_METRICS = ("probability", "memorization_accuracy", "extraction_strength", "rouge_l", "fluency")
Values = list[float | None]


@dataclass(frozen=True)
class EvaluationResult:
    """summary: metric -> mean over the samples that have it, NaN where none does. records: one dict a sample, in the
    items' order:

    index, question, answer; num_tokens and nll (summed, nats) where the answer was read; generated, the text, for the
    samples that were asked; every metric that the sample has a value of, with what it tells beside it (`Told`); and
    last, where the answer was read, tokens, their texts (`token_texts`), and token_logp, of each its log-probability in
    nats, to four digits. declined: by optimisation that was not used, why.
    """

    summary: dict[str, float]
    records: list[dict[str, Any]]
    declined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Examination:
    """One model and one set of questions: what metrics need of them is made when it is first asked for, and once.

    outputs: of `token_stats`, that readings hold beside logp and greedy. reads: of `metric.READ`, those that will be
    asked for, so that all texts of a question go through the model together; another costs a pass of its own.
    asked: how many items the model writes answers to, drawn with `seed`; None is all. max_length: longest sample
    allowed, in tokens (None: the model's context); a longer one is an error, never cut. kept: where finished batches
    are. writer: a server that writes in the place of the model, which may then be None if nothing is to be read.
    told: by item, what metrics have told beside their values (`measure`). prompt_format: how questions are put, None is
    `PromptFormat`. stops: before any of which a written answer ends.
    """

    lm: CausalLM | None
    tokenizer: PreTrainedTokenizerBase
    items: Sequence[QA]
    outputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    batch_size: int = 16
    max_length: int | None = None
    asked: int | None = None
    max_new_tokens: int = 200
    seed: int = 0
    kept: Kept | None = None
    progress: bool = True
    writer: Endpoint | None = None
    told: dict[int, dict[str, Any]] = field(default_factory=dict)
    prompt_format: PromptFormat | None = None
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("items: is empty, needs at least one question and answer")
        if self.asked is not None and self.asked < 1:
            raise ValueError(f"rouge_samples={self.asked}: needs a whole number >= 1, or None for all items")

    @cached_property
    def item(self) -> list[QA]:
        return list(self.items)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Questions and answers."""
        return tuple(text for item in self.items for text in (item.question, item.answer))

    @cached_property
    def answer(self) -> list[Reading]:
        return [readings[0] for readings in self._read("answer")]

    @cached_property
    def paraphrase(self) -> list[Reading]:
        return [readings[0] for readings in self._read("paraphrase")]

    @cached_property
    def wrong(self) -> list[tuple[Reading, ...]]:
        return self._read("wrong")

    @cached_property
    def format(self) -> PromptFormat:
        return PromptFormat(self.tokenizer) if self.prompt_format is None else self.prompt_format

    @cached_property
    def prompts(self) -> list[str]:
        """The text before each item's answer."""
        return [self.format.prompt(item.question) for item in self.items]

    @cached_property
    def written(self) -> list[str | None]:
        """None for items that were not asked, as texts without a question are not."""
        questions = [i for i, item in enumerate(self.items) if item.question]
        count = len(questions) if self.asked is None else min(self.asked, len(questions))
        drawn = sorted(random.Random(self.seed).sample(questions, count))
        asked = [self.items[i].question for i in drawn]
        texts = self._write(asked) if self.writer is None else self._have_written(self.writer, asked)
        by_item = dict(zip(drawn, texts, strict=True))
        return [by_item.get(i) for i in range(len(self.items))]

    def check(self, metric: Metric) -> None:
        """Raises ValueError for items that lack what the metric needs."""
        without = [i for i, item in enumerate(self.items) if not item.perturbed_answers]
        if "wrong" in metric.needs and without:
            raise ValueError(
                f"metric {metric.name!r}: items: {len(without)} of {len(self.items)} have no perturbed_answer (first: "
                f"item {without[0]}), wrong answers in the form of the right one"
            )

    def measure(
        self, metric: Metric, options: Mapping[str, Any] | None = None, tools: Mapping[str, Any] | None = None
    ) -> Values:
        """The metric of every item, None where it has none.

        Raises ValueError for an unknown option, or items that lack what the metric needs; CannotMeasure for a tool that
        is not there.
        """
        options = options or {}
        given = {name: tool for name, tool in (tools or {}).items() if tool is not None}
        tools = {"tokenizer": self.tokenizer, "texts": self.texts, "examination": self, **given}
        metric.check_options(options)
        missing = [name for name in metric.required_tools if name not in tools]
        if missing:
            raise CannotMeasure(f"metric {metric.name!r}: needs {' and '.join(missing)}, which was not given")
        self.check(metric)
        materials = [getattr(self, name) for name in metric.needs]
        samples = list(zip(*materials, strict=True))
        there = [i for i, sample in enumerate(samples) if all(part is not None for part in sample)]
        named = {name: tools[name] for name in metric.tools if name in tools}
        if metric.batched:
            lists = {name: [samples[i][place] for i in there] for place, name in enumerate(metric.needs)}
            results = metric.function(**lists, **named, **options)
        else:
            results = [
                metric.function(**dict(zip(metric.needs, samples[i], strict=True)), **named, **options) for i in there
            ]
        values: Values = [None] * len(samples)
        for i, result in zip(there, results, strict=True):
            if isinstance(result, Told):
                self.told.setdefault(i, {}).update(result.more)
            values[i] = result.value if isinstance(result, Told) else result
        return values

    def reader(self) -> CausalLM:
        """The model. Raises ValueError where there is none."""
        if self.lm is None:
            raise ValueError("needs a model; an endpoint alone writes answers, and reads none")
        return self.lm

    @property
    def limit(self) -> int | None:
        """Of a sample, in tokens."""
        return self.reader().context_length if self.max_length is None else self.max_length

    def rows(self, items: Sequence[QA], answers: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """input_ids and labels of each item and its answer, or the one given."""
        dataset = QADataset(items, self.tokenizer, self.limit, answers=answers, prompt_format=self.format)
        if dataset.num_cut:
            logger.warning("%d of %d texts are longer than what is read of them: cut off", dataset.num_cut, len(items))
        return [dataset[i] for i in range(len(dataset))]

    def _write(self, questions: Sequence[str]) -> list[str]:
        return greedy_generate(
            self.reader(),
            self.tokenizer,
            [self.format.prompt_ids(question) for question in questions],
            max_new_tokens=self.max_new_tokens,
            stops=self.stops,
            batch_size=self.batch_size,
            kept=self.kept,
            progress=self.progress,
        )

    def _have_written(self, writer: Endpoint, questions: Sequence[str]) -> list[str]:
        """By the server's own chat template where the tokenizer has one, else after the same prompt as here."""
        prompt, limit = self.format, self.max_new_tokens
        if prompt.chat:
            texts = writer.chat(
                [prompt.turns(question) for question in questions], description="writing", max_tokens=limit
            )
        else:
            texts = writer.complete([prompt.prompt(question) for question in questions], max_tokens=limit)
        return [before_stops(text, self.stops).strip() for text in texts]

    def _read(self, need: str) -> list[tuple[Reading, ...]]:
        """Of each item, the readings of its texts of that kind (`texts_of`)."""
        return self._together[need] if need in self.reads else self._read_all([need])[need]

    @cached_property
    def _together(self) -> dict[str, list[tuple[Reading, ...]]]:
        return self._read_all(self.reads)

    def _read_all(self, needs: Sequence[str]) -> dict[str, list[tuple[Reading, ...]]]:
        """All of them go through in the same batches, and a text that an item has twice goes once."""
        texts = [{text: None for need in needs for text in texts_of(item, need)} for item in self.items]
        owners = [item for item, own in zip(self.items, texts, strict=True) for _ in own]
        readings = iter(
            read_rows(
                self.reader(),
                self.rows(owners, [text for own in texts for text in own]),
                outputs=self.outputs,
                batch_size=self.batch_size,
                kept=self.kept,
                progress=self.progress,
            )
        )
        found = [{text: next(readings) for text in own} for own in texts]
        return {
            need: [
                tuple(own[text] for text in texts_of(item, need)) for item, own in zip(self.items, found, strict=True)
            ]
            for need in needs
        }


def texts_of(item: QA, need: str) -> tuple[str, ...]:
    """What is read of an item for a need of `metric.READ`."""
    if need == "wrong":
        return item.perturbed_answers
    return (item.answer if need == "answer" or item.paraphrased_answer is None else item.paraphrased_answer,)


def reads_of(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """Of READ, what they need, and the answer with it: records tell its length and likelihood."""
    needs = {need for metric in metrics for need in metric.needs if need in READ}
    return tuple(need for need in READ if need in needs or (needs and need == "answer"))


def readings_by(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Callable[[Sequence[QA]], list[Reading]]:
    """The tool `reference`: how a second model reads the answers of items. Arguments as `evaluate`."""
    lm = CausalLM.of(model)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    kept = Kept(cache, lm)
    return lambda items: Examination(lm, tokenizer, items, kept=kept, **options).answer


def evaluate(
    model: nn.Module | CausalLM | None,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[QA],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    tools: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    rouge_samples: int | None = 50,
    max_new_tokens: int = 200,
    variant: Variant = "suffix",
    seed: int = 0,
    cache: str | Path | Kept | None = None,
    writer: Endpoint | None = None,
    prompt_format: PromptFormat | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """What `model` still knows of `items`.

    metrics: names of `pyunlearn.metrics.METRICS`; options: of each, by its name; tools: what some need, by theirs. The
    teacher-forced ones share one pass. Those of written answers generate at most max_new_tokens for rouge_samples items
    drawn with `seed` (None: for all). max_length: longest sample allowed, in tokens (None: the model's context); a
    longer one is an error, never cut. variant: of memorization_accuracy and extraction_strength, see
    `pyunlearn.metrics.teacher_forced`. cache: a folder where every finished batch is kept, or the model's `Kept` there,
    for who evaluates one model on several sets (a folder takes a fingerprint of the weights each time).
    writer: a server that writes the answers in the place of the model, which may be None if no metric reads any.
    prompt_format: how questions are put, None is `PromptFormat`.

    The model is in eval() meanwhile and as before afterwards. Raises ValueError for no items, an unknown or
    no metric, option or tool, an option's value that is none, rouge_samples < 1, samples that are too long, or a model
    whose logits are not those of its output layer.
    """
    if not metrics or isinstance(metrics, str):
        raise ValueError(f"metrics={metrics!r}: needs one or more names of metrics")
    chosen = [get_metric(name) for name in dict.fromkeys(metrics)]
    check_known("variant", variant, VARIANTS)
    told = {metric.name: dict((options or {}).get(metric.name, {})) for metric in chosen}
    for name in options or {}:
        check_known("options", name, list(told))
    for name in ("memorization_accuracy", "extraction_strength"):
        if name in told:
            told[name].setdefault("variant", variant)
    for metric in chosen:
        metric.check_options(told[metric.name])
    check_tools(tools or {})
    lm = None if model is None else CausalLM.of(model)
    examination = Examination(
        lm,
        tokenizer,
        items,
        outputs=tuple(dict.fromkeys(output for metric in chosen for output in metric.outputs)),
        reads=reads_of(chosen),
        batch_size=batch_size,
        max_length=max_length,
        asked=rouge_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        kept=cache if isinstance(cache, Kept) else None if lm is None else Kept(cache, lm),
        progress=progress,
        writer=writer,
        prompt_format=prompt_format,
    )
    values = {metric.name: examination.measure(metric, told[metric.name], tools) for metric in chosen}
    records: list[dict[str, Any]] = [
        {"index": i, "question": item.question, "answer": item.answer} for i, item in enumerate(items)
    ]
    needed = {need for metric in chosen for need in metric.needs}
    for i, record in enumerate(records):
        if needed & {*READ}:
            record |= {"num_tokens": examination.answer[i].num_tokens, "nll": examination.answer[i].nll}
        if "written" in needed and examination.written[i] is not None:
            record["generated"] = examination.written[i]
        record |= examination.told.get(i, {})
        record |= {name: own[i] for name, own in values.items() if own[i] is not None}
        if needed & {*READ}:
            reading = examination.answer[i]
            record["tokens"] = token_texts(tokenizer, reading.tokens.tolist())
            record["token_logp"] = [round(logp, 4) for logp in reading.logp.tolist()]
    summary = {name: mean(value for value in own if value is not None) for name, own in values.items()}
    declined = {} if examination.kept is None else dict(examination.kept.declined)
    return EvaluationResult(summary, records, declined)
