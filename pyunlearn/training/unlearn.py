"""Memorise and unlearn: the two trainings that settings describe in words, for runs and studies alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..data import QA, QADataset, collate
from ..gradients.groups import assign_groups
from ..model.causal_lm import CausalLM
from ..model.forward import layer_number
from ..model.lora import count_parameters
from ..mrd import check_estimator
from ..objectives.representation import check_layers
from ..ops.parameters import canonical
from .callbacks import KeepCheckpoints
from .dual import Dual
from .method import UnlearnConfig
from .probe import GEffectCallback
from .rate import rate_for
from .rows import UnlearnData, make_pairs, make_probe, make_references, retain_used, without_template, write_rows
from .sampling import ForgetSampler, Forgotten
from .selection import selected, trainable
from .settings import GEffectConfig, MemoriseConfig, ReinforceConfig
from .stage import Stage, train
from .start import started
from .terms import check_top, collect_needs, make_terms
from .written import Resample, texts_of


@dataclass(frozen=True)
class Unlearned:
    """How an unlearning went.

    steps: optimiser steps. packing: whether the rows of a step went through the model together, and why not, or not
    wholly (`pyunlearn.model.packing.Packing.as_dict`); None: it was switched off. compiling: the same, of compiled
    blocks (`pyunlearn.model.compiled.Compiling.as_dict`). learning_rate: at its highest.
    mean_absolute_change: of a trained weight (Figure 3 of arXiv:2504.06658). trained: how many weights were, of how
    many `parameters` (those of adapters too). With a sampler:
    limits, what EL and MA had to fall below; refreshed_at, the steps at which MRD was computed; samples, one record a
    forget sample (`ForgetSampler.records`).
    """

    steps: int
    packing: dict[str, Any] | None
    compiling: dict[str, Any] | None
    learning_rate: float
    mean_absolute_change: float
    trained: int
    parameters: int
    limits: dict[str, float] | None
    refreshed_at: list[int]
    samples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def memorise(
    stage: Stage, settings: MemoriseConfig, model: Any, tokenizer: Any, data: UnlearnData, name: str = "memorise"
) -> None:
    """Fine-tunes `model` in place on the forget set, `retain_limit` retain rows, those held out and the unknown
    ones, by `gd` alone.

    name: of the stage, in the folder and in the metrics.
    """
    rows = AnswerRows(stage.rows(to_memorise(settings, data), tokenizer))
    with selected(model, settings):
        train(stage, name, settings, model, rows, ["gd"])


def reinforce(stage: Stage, settings: ReinforceConfig, model: Any, tokenizer: Any, data: UnlearnData) -> None:
    """Fine-tunes `model` in place on the forget set alone, by `gd`."""
    if settings.learning_rate is None:
        settings = settings.model_copy(update={"learning_rate": rate_for(model)})
    rows = AnswerRows(stage.rows(data.forget, tokenizer))
    with selected(model, settings):
        train(stage, "reinforce", settings, model, rows, ["gd"])


def to_memorise(settings: MemoriseConfig, data: UnlearnData) -> list[QA]:
    return data.forget + data.retain[: settings.retain_limit] + data.holdout + data.unknown


class AnswerRows(Dataset):
    """Question-answer rows alone, as the retain rows that `gd` trains on."""

    def __init__(self, rows: QADataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"retain": self.rows[index]}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        return {"retain": collate([item["retain"] for item in items], self.rows.pad_token_id)}


def unlearn(
    stage: Stage,
    settings: UnlearnConfig,
    model: Any,
    tokenizer: Any,
    data: UnlearnData,
    probing: GEffectConfig | None = None,
    watching: Sequence[TrainerCallback] = (),
    merge_kept: bool = False,
    reinforced: Any = None,
) -> Unlearned:
    """Unlearns `model` in place; what it says before is the frozen reference, cached in the stage's folder, or, with a
    fresh LoRA adapter on it, told by the model with its adapter off.

    probing: also measures the G-effect on the way, into the metrics. watching: further callbacks of the training.
    merge_kept: of a model under peft, those of keep_steps are plain models and not adapters. reinforced: the model of
    `settings.reinforce`, of which whp's labels are made.

    Raises ValueError for data that the objectives need and were not given, and what `train` and `Start.keep` raise.
    """
    if settings.learning_rate is None:
        settings = settings.model_copy(update={"learning_rate": rate_for(model)})
    with selected(model, settings):
        objectives = settings.weighted_objectives()
        needs = collect_needs(make_terms(objectives))
        forget = stage.rows(data.forget, tokenizer, without_template(needs, "forget"))
        retain = None
        if any(kind.startswith("retain") for kind in needs):
            retain = stage.rows(retain_used(stage, settings, data), tokenizer, without_template(needs, "retain"))
        written = write_rows(stage, settings, model, tokenizer, forget, needs, reinforced)
        kept = settings.keeps_refusals
        pairs = make_pairs(forget, retain, data.refusals, needs, stage.seed, settings.pad_to, kept, written)
        references = make_references(stage, model, tokenizer, pairs, needs)
        callbacks = [*watching]
        samples = needs["forget_sample"].samples if "forget_sample" in needs else None
        if samples is not None and samples.refresh_epochs:
            callbacks.append(Resample(stage, tokenizer, pairs, samples, texts_of(stage, model)))
        if probing is not None:
            probe = make_probe(stage, settings, probing, model, tokenizer, data)
            callbacks.append(GEffectCallback(probe, stage.folder.metrics, "unlearn", probing.every))
        if settings.keep_steps is not None:
            callbacks.append(KeepCheckpoints(stage.folder, tokenizer, settings.keep_steps, merge_kept))
        sampler = make_sampler(settings, forget, stage.seed)
        trained, parameters = count_parameters(model)
        dual = None if settings.dual is None else Dual(**settings.dual.arguments())
        with started(stage, "unlearn", model) as start:
            done = train(stage, "unlearn", settings, model, pairs, objectives, references, callbacks, sampler, dual)
            change = start.mean_absolute_change(model)
        return Unlearned(
            steps=done.steps,
            packing=done.packing,
            compiling=done.compiling,
            learning_rate=settings.learning_rate or 0.0,
            mean_absolute_change=change,
            trained=trained,
            parameters=parameters,
            limits=None if sampler is None else sampler.memory.limits,
            refreshed_at=[] if sampler is None else sampler.memory.refreshed_at,
            samples=[] if sampler is None else sampler.records(),
        )


def check_model(settings: UnlearnConfig, probing: GEffectConfig | None, model: Any) -> None:
    """Raises ValueError for a layer of an objective, parameters to train or to freeze, or a group of the G-effect, that
    the model does not have, for an rr that is at no layer of rmu's, and for rows longer than its context; TypeError for
    an estimator of MRD that it does not have."""
    context = CausalLM.of(model).context_length
    if settings.pad_to is not None and context is not None and settings.pad_to > context:
        raise ValueError(f"unlearn.pad_to={settings.pad_to}: the model's context is {context} tokens")
    if probing is not None:
        settings.check_probed()
    if not settings.trains:
        return
    terms = make_terms(settings.weighted_objectives())
    for need in collect_needs(terms).values():
        for layer in need.layers:
            layer_number(model, layer)
        check_top(need, model)
    check_layers((term.objective for term in terms), partial(layer_number, model))
    if settings.sampling.by == "mrd":
        check_estimator(settings.sampling.estimator, model)
    with selected(model, settings):
        if probing is not None:
            assign_groups(model, [canonical(name) for name, _ in trainable(model)], probing.groups)


def make_sampler(settings: UnlearnConfig, rows: QADataset, seed: int) -> ForgetSampler | None:
    """None where the trainer's own shuffles serve."""
    sampling, stop = settings.sampling, settings.early_stop
    if sampling.by == "shuffle":
        return None
    return ForgetSampler(
        rows,
        sampling.weighting if sampling.by == "mrd" else None,
        refresh_steps=sampling.refresh_steps,
        seed=seed,
        forgotten=None if stop is None else Forgotten(stop.ngram, stop.share, stop.every_steps),
        scores={name: getattr(sampling, name) for name in ("estimator", "num_draws", "sigma")},
        labels=sampling.labels,
    )
