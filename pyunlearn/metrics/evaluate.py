"""Several metrics of one model on one set of questions, as records per sample and their means."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..data import QA, QADataset
from ..model.causal_lm import CausalLM
from .generation import greedy_generate, rouge_l_recall
from .teacher_forced import Variant, teacher_forced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEACHER_FORCED = ("probability", "memorization_accuracy", "extraction_strength")
METRICS = (*TEACHER_FORCED, "rouge_l")


@dataclass(frozen=True)
class EvaluationResult:
    """summary: metric -> mean over the samples that have it, NaN where none does. records: one dict a sample, in the
    items' order:

    index, question, answer; num_tokens, nll (summed, nats) and the teacher-forced metrics; for the samples
    drawn for ROUGE also generated (text) and rouge_l.
    """

    summary: dict[str, float]
    records: list[dict[str, Any]]


def evaluate(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[QA],
    *,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 16,
    max_length: int | None = None,
    rouge_samples: int | None = 50,
    max_new_tokens: int = 200,
    variant: Variant = "suffix",
    seed: int = 0,
    progress: bool = True,
) -> EvaluationResult:
    """What `model` still knows of `items`.

    metrics: of `METRICS`. The teacher-forced ones share one pass. rouge_l generates at most max_new_tokens
    for rouge_samples items drawn with `seed` (None: for all). max_length: longest sample allowed, in tokens
    (None: the model's context); a longer one is an error, never cut. variant: of memorization_accuracy and
    extraction_strength, see `pyunlearn.metrics.teacher_forced`.

    The model is in eval() meanwhile and as before afterwards. Raises ValueError for no items, an unknown or
    no metric, rouge_samples < 1, samples that are too long, or a model whose logits are not those of its
    output layer.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics or isinstance(metrics, str):
        raise ValueError(f"metrics={metrics!r}: needs one or more of {METRICS}")
    if rouge_samples is not None and rouge_samples < 1:
        raise ValueError(f"rouge_samples={rouge_samples}: needs a whole number >= 1, or None for all items")
    if not items:
        raise ValueError("items: is empty, needs at least one question and answer")
    lm = CausalLM.of(model)
    dataset = QADataset(items, tokenizer, lm.context_length if max_length is None else max_length)
    records: list[dict[str, Any]] = [
        {"index": i, "question": item.question, "answer": item.answer} for i, item in enumerate(items)
    ]
    if any(name in TEACHER_FORCED for name in metrics):
        read = teacher_forced(lm, dataset, batch_size=batch_size, variant=variant, progress=progress)
        for record, values in zip(records, read, strict=True):
            record |= {k: v for k, v in values.items() if k in metrics or k not in TEACHER_FORCED}
    if "rouge_l" in metrics:
        count = len(items) if rouge_samples is None else min(rouge_samples, len(items))
        drawn = sorted(random.Random(seed).sample(range(len(items)), count))
        texts = greedy_generate(
            lm,
            tokenizer,
            [dataset.prompt_format.prompt_ids(items[i].question) for i in drawn],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        for i, text in zip(drawn, texts, strict=True):
            records[i] |= {"generated": text, "rouge_l": rouge_l_recall(text, items[i].answer)}
    return EvaluationResult({name: _mean(r[name] for r in records if name in r) for name in metrics}, records)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
