"""Memorise and unlearn: the two trainings that settings describe in words, for runs and studies alike."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..data import QA, ForgetRetainDataset, QADataset, collate
from ..distributed import whole
from ..gradients.groups import assign_groups
from ..model.cache import ReferenceCache
from ..model.causal_lm import CausalLM
from ..model.forward import PADDED, layer_number, widest
from ..model.lora import count_parameters, does_nothing
from ..model.reference import AdapterOff, Source
from ..mrd import check_estimator
from ..objectives.representation import check_layers
from ..ops.parameters import canonical
from .callbacks import KeepCheckpoints
from .dual import Dual
from .folder import TrainingFolder
from .generic import generic_rows, read_anchors
from .method import UnlearnConfig
from .probe import GEffectCallback, Probe
from .rate import rate_for
from .sampling import ForgetSampler, Forgotten
from .selection import selected
from .settings import GEffectConfig, MemoriseConfig, ReinforceConfig
from .stage import Stage, train
from .terms import Need, TermLosses, check_top, collect_needs, make_terms
from .written import Resample, alternates_of, samples_of, texts_of


@dataclass(frozen=True)
class UnlearnData:
    """Questions and answers to forget and to retain, and refusals for the objectives that answer with them.

    holdout: what is to be retained, too, and only `memorise` takes: nothing of the unlearning has seen it.
    unknown: questions that have refusals for answers, which only `memorise` takes.
    """

    forget: list[QA]
    retain: list[QA]
    refusals: list[str]
    holdout: list[QA] = field(default_factory=list, kw_only=True)
    unknown: list[QA] = field(default_factory=list, kw_only=True)


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

    Raises ValueError for data that the objectives need and were not given, and what `train` raises.
    """
    if settings.learning_rate is None:
        settings = settings.model_copy(update={"learning_rate": rate_for(model)})
    with selected(model, settings):
        return unlearn_selected(stage, settings, model, tokenizer, data, probing, watching, merge_kept, reinforced)


def unlearn_selected(
    stage: Stage,
    settings: UnlearnConfig,
    model: Any,
    tokenizer: Any,
    data: UnlearnData,
    probing: GEffectConfig | None,
    watching: Sequence[TrainerCallback],
    merge_kept: bool,
    reinforced: Any,
) -> Unlearned:
    """`unlearn`, of the parameters that require gradients."""
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
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(model)}
    trained, parameters = count_parameters(model)
    dual = None if settings.dual is None else Dual(**settings.dual.arguments())
    done = train(stage, "unlearn", settings, model, pairs, objectives, references, callbacks, sampler, dual)
    return Unlearned(
        steps=done.steps,
        packing=done.packing,
        compiling=done.compiling,
        learning_rate=settings.learning_rate or 0.0,
        mean_absolute_change=mean_absolute_change(before, model),  # by all ranks: sharded weights are gathered
        trained=trained,
        parameters=parameters,
        limits=None if sampler is None else sampler.memory.limits,
        refreshed_at=[] if sampler is None else sampler.memory.refreshed_at,
        samples=[] if sampler is None else sampler.records(),
    )


def without_template(needs: Mapping[str, Need], role: str) -> bool:
    """Whether rows of this role have to tell which tokens are of the question and the answer."""
    return any("template_free" in need.positions for kind, need in needs.items() if kind.startswith(role))


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


def retain_used(stage: Stage, settings: UnlearnConfig, data: UnlearnData) -> list[QA]:
    """The retain rows this training will meet: all, or a seeded draw where fewer are used (no reference is wasted)."""
    forget = rows_trained(settings, data)
    used = math.ceil(settings.epochs * forget)
    a_step = settings.batch_size * settings.gradient_accumulation_steps * stage.processes.count
    if settings.max_steps is not None:
        used = settings.max_steps * a_step
    elif settings.sampling.by != "shuffle":  # full batches
        used = math.ceil(settings.epochs * math.ceil(forget / a_step)) * a_step
    if used >= len(data.retain):
        return data.retain
    return [data.retain[i] for i in sorted(random.Random(stage.seed).sample(range(len(data.retain)), used))]


def rows_trained(settings: UnlearnConfig, data: UnlearnData) -> int:
    """Items of an epoch: of alternate answers, one each."""
    if not settings.trains:
        return len(data.forget)
    needs = collect_needs(make_terms(settings.weighted_objectives()))
    alternates = needs["forget_alternate"].samples if "forget_alternate" in needs else None
    return len(data.forget) * (1 if alternates is None else alternates.count)


def write_rows(
    stage: Stage,
    settings: UnlearnConfig,
    model: Any,
    tokenizer: Any,
    forget: QADataset,
    needs: Mapping[str, Need],
    reinforced: Any,
) -> dict[str, Any]:
    """By kind, the rows of forget questions that a model has to write before training.

    Raises ValueError for labels without a reinforced model to make them of, and as what writes them.
    """
    rows: dict[str, Any] = {}
    if "forget_generic" in needs:
        if reinforced is None or settings.reinforce is None:
            raise ValueError("reinforced: whp needs the model that was trained further on the forget set, got None")
        anchors = read_anchors(settings.reinforce.anchors)
        batch_size, strength = stage.reference_batch_size, settings.reinforce.strength
        rows["forget_generic"] = generic_rows(model, reinforced, forget, tokenizer, strength, anchors, batch_size)
    for kind, write in (("forget_sample", samples_of), ("forget_alternate", alternates_of)):
        wanted = needs[kind].samples if kind in needs else None
        if wanted is not None:
            with stage.processes.first_first():
                rows[kind] = write(stage, model, tokenizer, forget, wanted, texts_of(stage, model))
    return rows


def make_pairs(
    forget: QADataset,
    retain: QADataset | None,
    refusals: list[str],
    needs: Mapping[str, Need],
    seed: int,
    pad_to: int | None,
    fixed: bool,
    written: Mapping[str, Any] | None = None,
) -> ForgetRetainDataset:
    """Forget and retain rows with the refusals that the objectives need; `fixed` ones do not change over epochs.
    written: `write_rows`."""
    apart = {kind: rows for kind, rows in (written or {}).items() if kind.endswith("_alternate")}
    return ForgetRetainDataset(
        forget,
        retain,
        refusals=refusals,
        refuse=[role for role in ("forget", "retain") if f"{role}_refusal" in needs],
        fixed_refusals=fixed,
        seed=seed,
        pad_to=pad_to,
        together={kind: rows for kind, rows in (written or {}).items() if kind not in apart},
        apart=apart,
    )


def make_references(
    stage: Stage, model: Any, tokenizer: Any, pairs: ForgetRetainDataset, needs: Mapping[str, Need]
) -> dict[str, Source]:
    """Of every kind of sequence that needs one: the model with its fresh adapter off, where it has one; else a cache on
    disk, or a frozen copy in memory where padding counts, or samples or refusals change, which no cache can know."""
    if does_nothing(model):
        off = AdapterOff(model)
        return {kind: off for kind, need in needs.items() if need.reference}
    references: dict[str, Source] = {}
    for kind, need in needs.items():
        changing = need.samples is not None and need.samples.refresh_epochs > 0
        changing |= kind.endswith("_refusal") and not pairs.fixed_refusals
        if (need.hidden_reference and need.widest in PADDED) or (need.reference and changing):
            references[kind] = copy.deepcopy(model).requires_grad_(False).eval()
        elif need.reference:
            with stage.processes.first_first():  # the others find a file that fits
                build = ReferenceCache.build if stage.references is None else ReferenceCache.shared
                references[kind] = build(
                    model,
                    rows_of(pairs, kind, tokenizer, stage.max_length),
                    stage.references or stage.folder.reference / f"{kind}.safetensors",
                    kl=need.kl_reference,
                    layers=need.reference_layers,
                    scalars=need.scalars,
                    positions=widest({need.widest, "supervised"}) if need.hidden_reference else "supervised",
                    batch_size=stage.reference_batch_size,
                    progress=stage.progress,
                )
    return references


def rows_of(pairs: ForgetRetainDataset, kind: str, tokenizer: Any, max_length: int | None) -> Any:
    """The rows of one kind of sequence, refusals as the data set draws them."""
    if kind in (written := {**pairs.together, **pairs.apart}):
        return written[kind]
    role = kind.removesuffix("_refusal")
    rows = pairs.forget if role == "forget" else pairs.retain
    if rows is None:
        raise ValueError(f"{kind}: there are no {role} rows")
    if kind == role:
        return rows
    answers = [pairs.refusal(role, index) for index in range(len(rows))]
    return QADataset(rows.items, tokenizer, max_length, answers, rows.prompt_format)


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


def make_probe(
    stage: Stage, settings: UnlearnConfig, probing: GEffectConfig, model: Any, tokenizer: Any, data: UnlearnData
) -> Probe:
    """The objectives on samples drawn from the seed; `model`, not yet unlearned, is their reference.

    Raises ValueError as `settings.check_probed`.
    """
    settings.check_probed()
    objectives = settings.weighted_objectives()
    needs = collect_needs(make_terms(objectives))
    drawn = {}
    for role, items in (("forget", data.forget), ("retain", data.retain)):
        count = min(len(items), getattr(probing, f"{role}_samples"))
        chosen = sorted(random.Random(f"{stage.seed}/probe/{role}").sample(range(len(items)), count))
        drawn[role] = stage.rows([items[i] for i in chosen], tokenizer, without_template(needs, role))
    pairs = make_pairs(drawn["forget"], drawn["retain"], data.refusals, needs, stage.seed, settings.pad_to, fixed=True)
    rows = {kind: rows_of(pairs, kind, tokenizer, stage.max_length) for kind in {**drawn, **needs}}
    own = replace(stage, folder=TrainingFolder(stage.folder.geffect))
    losses = TermLosses(objectives, make_references(own, model, tokenizer, pairs, needs))
    return Probe(losses, rows, probing, bf16=settings.bf16, pad_to=settings.pad_to)


def trainable(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def mean_absolute_change(before: Mapping[str, torch.Tensor], model: Any) -> float:
    """The mean over all trained weights of |now - before| (Figure 3 of arXiv:2504.06658)."""
    total = count = 0.0
    for name, weight in trainable(model):
        now = whole(weight)
        total += float((now.detach().cpu().float() - before[name].float()).abs().sum(dtype=torch.float64))
        count += now.numel()
    return total / count
