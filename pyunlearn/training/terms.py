"""The terms of a run's loss: what they need of every kind of sequence, and one scalar a term out of model and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import objectives as registry
from ..model.causal_lm import CausalLM
from ..model.fingerprint import dataset_fingerprint
from ..model.forward import POSITIONS, Layer, Supervised, select_positions, supervised_hidden
from ..model.head import head_stats
from ..model.reference import Cached, Reference, Source, as_references
from ..objectives import Objective, Samples, TokenInputs

Count = tuple[tuple[str, ...], str, str]  # kinds of sequence, positions, "tokens" | "sequences"
Place = tuple[str, Layer | None]  # positions, and layer where hidden states are meant


@dataclass(frozen=True)
class Term:
    """One objective with its weight; `kinds` maps the batches it names to kinds of sequence in the data set."""

    label: str
    objective: Objective
    coefficient: float
    kinds: Mapping[str, str]

    @property
    def count(self) -> Count:
        """What its mean divides by: tokens of its first kind, or sequences that have tokens in all of its kinds."""
        kinds = tuple(self.kinds[batch] for batch in self.objective.batches)
        unit = self.objective.unit
        return kinds if unit == "sequences" else kinds[:1], self.positions, unit

    @property
    def positions(self) -> str:
        return self.objective.positions

    @property
    def layer(self) -> Layer | None:
        return self.objective.layer


@dataclass
class Need:
    """What all terms together want of one kind of sequence."""

    outputs: set[str] = field(default_factory=set)
    places: set[Place] = field(default_factory=set)
    logp_reference: bool = False
    kl_reference: bool = False
    reference_layers: set[Layer] = field(default_factory=set)
    samples: Samples | None = None  # what a model has to write for it

    @property
    def positions(self) -> set[str]:
        return {positions for positions, _ in self.places}

    @property
    def layers(self) -> set[Layer]:
        return {layer for _, layer in self.places if layer is not None}

    @property
    def hidden_reference(self) -> bool:
        """Whether hidden states of the reference are needed, the last or another layer's."""
        return self.kl_reference or bool(self.reference_layers)

    @property
    def reference(self) -> bool:
        return self.logp_reference or self.hidden_reference

    @property
    def widest(self) -> Any:
        """The positions that hold all the others: `POSITIONS` are nested."""
        return max(self.positions, key=POSITIONS.index)


def make_terms(objectives: Sequence[Any]) -> tuple[Term, ...]:
    """Terms from objectives, each a name, an Objective, or a pair of either with its coefficient.

    Raises ValueError for an empty list, an unknown name or a coefficient that is not finite; TypeError otherwise.
    """
    if isinstance(objectives, str):
        raise TypeError(f"objectives={objectives!r}: needs a list, [{objectives!r}]")
    if not objectives:
        raise ValueError("objectives is empty: needs at least one objective")
    terms: list[Term] = []
    for objective, coefficient in [part for entry in objectives for part in parts_of(entry)]:
        if isinstance(objective, str):
            objective = registry.get(objective)
        if not isinstance(objective, Objective):
            raise TypeError(f"objectives: needs names, Objectives or (objective, coefficient), got {objective!r}")
        if not math.isfinite(coefficient):
            raise ValueError(f"objectives: the coefficient of {objective.name} needs to be finite, got {coefficient}")
        label = f"{objective.role}.{objective.name}" + ("" if objective.samples is None else ".samples")
        twins = sum(term.label.split("#")[0] == label for term in terms)
        kinds = {batch: objective.role + kind for batch, kind in objective.kinds.items()}
        terms.append(Term(f"{label}#{twins + 1}" if twins else label, objective, float(coefficient), kinds))
    return tuple(terms)


def parts_of(entry: Any) -> list[tuple[Any, float]]:
    """An entry of a list of objectives with its coefficient; of the name of a mixture its parts."""
    objective, coefficient = entry if isinstance(entry, tuple) else (entry, 1.0)
    if isinstance(objective, str) and objective in registry.MIXTURES:
        return [(part, coefficient * share) for part, share in registry.weighted(objective)]
    return [(objective, coefficient)]


def collect_needs(terms: Sequence[Term]) -> dict[str, Need]:
    """What to compute, by kind of sequence, for all terms at once."""
    needs: dict[str, Need] = {}
    for term in terms:
        for ending, samples in term.objective.written.items():
            need = needs.setdefault(kind := term.objective.role + ending, Need())
            if need.samples not in (None, samples):
                raise ValueError(
                    f"{kind}: two objectives want other texts, {need.samples} and {samples}; needs one kind"
                )
            need.samples = samples
        for kind in term.kinds.values():
            need = needs.setdefault(kind, Need())
            need.outputs.update(term.objective.outputs)
            need.places.add((term.positions, term.layer))
            need.logp_reference |= term.objective.reference == "logp"
            need.kl_reference |= term.objective.reference == "kl"
            if term.layer is not None and term.objective.reference == "hidden":
                need.reference_layers.add(term.layer)
    return needs


def check_kinds(needs: Mapping[str, Need], dataset: Any, name: str = "train_dataset") -> None:
    """Raises ValueError, which calls it `name`, if the data set's first item lacks a kind of sequence."""
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: needs at least one sample")
    first = dataset[0]
    kinds = list(first) if isinstance(first, Mapping) else [type(first).__name__]
    if absent := [kind for kind in needs if kind not in kinds]:
        refuse = [kind.removesuffix("_refusal") for kind in absent if kind.endswith("_refusal")]
        options = ["a retain QADataset"] if "retain" not in kinds and any("retain" in kind for kind in absent) else []
        options += [f"refusals=[texts], refuse={refuse}"] if refuse else []
        more = {"_sample": "together", "_generic": "together", "_alternate": "apart"}
        options += [f"{more[end]}={{{kind!r}: rows}}" for kind in absent for end in more if kind.endswith(end)]
        advice = f"; give them by ForgetRetainDataset(forget, {', '.join(options)})" if options else ""
        raise ValueError(f"{name}: the objectives need {absent}, its items have {kinds}{advice}")


def check_rows(references: Mapping[str, Reference], dataset: Any, name: str) -> None:
    """Raises ValueError for a cache of other rows than those of the data set, which it would take for its own."""
    for kind, reference in references.items():
        rows = getattr(dataset, kind, None)
        if not isinstance(reference, Cached) or rows is None:
            continue
        if dataset_fingerprint(rows) != reference.cache.metadata["dataset"]:
            raise ValueError(
                f"reference[{kind!r}]: {reference.cache.path} is of other rows than {name}.{kind}; build a cache on "
                "these, or give a live model"
            )


def assign_references(needs: Mapping[str, Need], sources: Source | Mapping[str, Source] | None) -> dict[str, Reference]:
    """Raises ValueError unless every kind that needs a reference has one that serves."""
    needy = {kind: need for kind, need in needs.items() if need.reference}
    references = as_references(sources, needy)
    if absent := [kind for kind in needy if kind not in references]:
        raise ValueError(
            f"reference: the objectives need one for {list(needy)}, missing: {absent}; give {{kind: ReferenceCache}}, "
            "each built on that kind's QADataset, or a live model"
        )
    for kind, need in needy.items():
        if need.hidden_reference:
            references[kind].check(f"reference[{kind!r}]", need.widest, need.kl_reference, need.reference_layers)
    return references


def count_items(batch: Mapping[str, Mapping[str, Tensor]], kinds: tuple[str, ...], positions: Any, unit: str) -> int:
    """Tokens that count, or sequences with such a token in every one of `kinds`."""
    selected = [select_positions(batch[kind], positions) for kind in kinds]
    if unit == "tokens":
        return selected[0][0].numel()
    return len(set.intersection(*(set(sequence_ids.tolist()) for _, _, sequence_ids in selected)))


class TermLosses:
    """What every term's loss is made of: model and batch in, one scalar a term out.

    Attributes: terms; needs (kind of sequence -> `Need`); references (kind -> what stands for the frozen reference).
    objectives, reference and what is raised: as `UnlearnTrainer`.
    """

    def __init__(self, objectives: Sequence[Any], reference: Source | Mapping[str, Source] | None = None):
        self.terms = make_terms(objectives)
        self.needs = collect_needs(self.terms)
        self.references = assign_references(self.needs, reference)

    def release(self) -> None:
        """Lets go of the references' heads on the device; they come back when needed."""
        for reference in self.references.values():
            reference.release()

    def term_losses(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Mapping[str, Tensor]],
        counts: Mapping[Count, Tensor | int],
        terms: Sequence[Term] | None = None,
    ) -> list[Tensor]:
        """The share of each term (None: all) in its mean over the optimiser step, before its coefficient: 0-d."""
        needs = self.needs if terms is None else collect_needs(terms)
        lm = CausalLM.of(model)
        stats: dict[tuple[str, Place], TokenInputs] = {}
        for kind, need in needs.items():
            for place, values in self.statistics(lm, kind, need, inputs[kind]).items():
                stats[kind, place] = values
        return [
            term.objective(
                {batch: stats[kind, (term.positions, term.layer)] for batch, kind in term.kinds.items()},
                count=counts[term.count],
            )
            for term in (self.terms if terms is None else terms)
        ]

    def statistics(self, lm: CausalLM, kind: str, need: Need, batch: Mapping[str, Tensor]) -> dict[Place, TokenInputs]:
        """Per-token statistics of one batch, by positions and layer: one run of the model, one `linear_token_stats`."""
        widest = need.widest
        if need.outputs:
            lm.check_head()
        supervised = supervised_hidden(lm, batch, widest, layers=need.layers, through_head=bool(need.outputs))
        outputs, vocab_size = self.head_outputs(lm, kind, need, batch, supervised) if need.outputs else ({}, None)
        ref_states = {layer: self.references[kind].hidden(batch, widest, layer) for layer in need.reference_layers}
        ref_logp = self.references[kind].logp(batch) if need.logp_reference else None
        rows = select_positions(batch, widest)[0]
        results = {}
        positions: Any
        for positions, layer in need.places:
            values: dict[str, Tensor] = outputs if layer is None else {"hidden": supervised.layers[layer]}
            ref_hidden = None if layer is None else ref_states.get(layer)
            sequence_ids = supervised.sequence_ids
            if positions != widest:
                chosen, _, sequence_ids = select_positions(batch, positions)
                at = torch.searchsorted(rows, chosen)
                values = {name: value.index_select(0, at) for name, value in values.items()}
                ref_hidden = None if ref_hidden is None else ref_hidden.index_select(0, at)
            results[positions, layer] = TokenInputs(
                values=values,
                ref_logp=ref_logp if positions == "supervised" else None,
                ref_hidden=ref_hidden,
                sequence_ids=sequence_ids,
                num_sequences=supervised.num_sequences,
                vocab_size=vocab_size,
            )
        return results

    def head_outputs(
        self, lm: CausalLM, kind: str, need: Need, batch: Mapping[str, Tensor], supervised: Supervised
    ) -> tuple[dict[str, Tensor], int]:
        """What `linear_token_stats` says of the last hidden states, by output, and V."""
        # After the forward: sharded models have gathered the head by then. In its dtype: under autocast the head
        # computes in half precision like the rest.
        head = lm.read_head().to(supervised.hidden)
        reference = None
        if need.kl_reference:
            source = self.references[kind]
            hidden = source.hidden(batch, need.widest)
            reference = hidden, source.head(head.weight)
        outputs = tuple(need.outputs)
        stats = head_stats(head, supervised.hidden, supervised.targets, outputs, reference=reference)
        return stats.as_dict(), head.weight.size(0)
