"""What an unlearning trains on: the rows of every kind that its objectives need, and what a reference says of them."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..data import QA, ForgetRetainDataset, QADataset
from ..model.cache import ReferenceCache
from ..model.forward import PADDED, widest
from ..model.lora import does_nothing
from ..model.reference import AdapterOff, Source
from .folder import TrainingFolder
from .generic import generic_rows, read_anchors
from .method import UnlearnConfig
from .probe import Probe
from .settings import GEffectConfig
from .stage import Stage
from .terms import Need, TermLosses, collect_needs, make_terms
from .written import alternates_of, samples_of, texts_of


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


def without_template(needs: Mapping[str, Need], role: str) -> bool:
    """Whether rows of this role have to tell which tokens are of the question and the answer."""
    return any("template_free" in need.positions for kind, need in needs.items() if kind.startswith(role))


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
