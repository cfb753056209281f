"""The terms of a run's loss: what they need of every kind of sequence, and one scalar a term out of model and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import objectives as registry
from ..model.forward import (
    POSITIONS,
    Layer,
    Supervised,
    layer_number,
    select_positions,
    supervised_hidden,
    token_stats_of,
)
from ..model.head import Head, output_head
from ..model.reference import ReferenceCache
from ..objectives import Objective, TokenInputs
from ..ops import linear_token_stats

Count = tuple[tuple[str, ...], str, str]  # kinds of sequence, positions, "tokens" | "sequences"
Place = tuple[str, Layer | None]  # positions, and layer where hidden states are meant
Reference = ReferenceCache | torch.nn.Module


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
    if not objectives:
        raise ValueError("objectives is empty: needs at least one objective")
    terms: list[Term] = []
    for given in objectives:
        objective, coefficient = given if isinstance(given, tuple) else (given, 1.0)
        if isinstance(objective, str):
            objective = registry.get(objective)
        if not isinstance(objective, Objective):
            raise TypeError(f"objectives: needs names, Objectives or (objective, coefficient), got {given!r}")
        if not math.isfinite(coefficient):
            raise ValueError(f"objectives: the coefficient of {objective.name} needs to be finite, got {coefficient}")
        label = f"{objective.role}.{objective.name}"
        twins = sum(term.label.split("#")[0] == label for term in terms)
        suffixes = {batch: "" if batch == "answer" else f"_{batch}" for batch in objective.batches}
        kinds = {batch: objective.role + suffix for batch, suffix in suffixes.items()}
        terms.append(Term(f"{label}#{twins + 1}" if twins else label, objective, float(coefficient), kinds))
    return tuple(terms)


def collect_needs(terms: Sequence[Term]) -> dict[str, Need]:
    """What to compute, by kind of sequence, for all terms at once."""
    needs: dict[str, Need] = {}
    for term in terms:
        for kind in term.kinds.values():
            need = needs.setdefault(kind, Need())
            need.outputs.update(term.objective.outputs)
            need.places.add((term.positions, term.layer))
            need.logp_reference |= term.objective.reference == "logp"
            need.kl_reference |= term.objective.reference == "kl"
            if term.layer is not None and term.objective.reference == "hidden":
                need.reference_layers.add(term.layer)
    return needs


def check_kinds(needs: Mapping[str, Need], dataset: Any) -> None:
    """Raises ValueError if the data set's first item lacks a kind of sequence."""
    if len(dataset) == 0:
        raise ValueError("train_dataset is empty: needs at least one sample")
    first = dataset[0]
    given = list(first) if isinstance(first, Mapping) else [type(first).__name__]
    if absent := [kind for kind in needs if kind not in given]:
        raise ValueError(f"train_dataset: the objectives need {absent}, its items have {given}")


def assign_references(needs: Mapping[str, Need], given: Any) -> dict[str, Reference]:
    """Raises ValueError unless every kind that needs a reference has one that serves."""
    needy = {kind: need for kind, need in needs.items() if need.reference}
    if isinstance(given, torch.nn.Module):
        given = dict.fromkeys(needy, given.eval())
    if isinstance(given, ReferenceCache):
        given = dict.fromkeys(needy, given) if len(needy) <= 1 else {}
    given = dict(given or {})
    if absent := [kind for kind in needy if kind not in given]:
        raise ValueError(
            f"reference: the objectives need one for {list(needy)}, missing: {absent}; give {{kind: ReferenceCache}}, "
            "each built on that kind's QADataset, or a live model"
        )
    for kind, need in needy.items():
        cache = given[kind]
        if not isinstance(cache, ReferenceCache) or not need.hidden_reference:
            continue
        has = cache.metadata["kl" if need.kl_reference else "layers"]
        kept = cache.metadata["positions"] if has else None
        if kept is None or POSITIONS.index(kept) < POSITIONS.index(need.widest):
            wanted = "kl=True" if need.kl_reference else f"layers={sorted(need.reference_layers, key=str)}"
            raise ValueError(
                f"reference[{kind!r}]: the objectives need hidden states at {need.widest!r} positions, the cache has "
                f"{'none' if kept is None else repr(kept)}; build it with {wanted}, "
                f"positions={need.widest!r}"
                + (" (padding is never cached: give a live model)" if need.widest in ("followed", "all") else "")
            )
    return {kind: given[kind] for kind in needy}


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

    def __init__(self, objectives: Sequence[Any], reference: Reference | Mapping[str, Reference] | None = None):
        self.terms = make_terms(objectives)
        self.needs = collect_needs(self.terms)
        self.references = assign_references(self.needs, reference)
        self._heads: dict[str, Head] = {}

    def release(self) -> None:
        """Lets go of the references' heads on the device; they come back when needed."""
        self._heads.clear()

    def term_losses(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Mapping[str, Tensor]],
        counts: Mapping[Count, Tensor | int],
        terms: Sequence[Term] | None = None,
    ) -> list[Tensor]:
        """The share of each term (None: all) in its mean over the optimiser step, before its coefficient: 0-d."""
        needs = self.needs if terms is None else collect_needs(terms)
        stats: dict[tuple[str, Place], TokenInputs] = {}
        for kind, need in needs.items():
            for place, values in self.statistics(model, kind, need, inputs[kind]).items():
                stats[kind, place] = values
        return [
            term.objective(
                {batch: stats[kind, (term.positions, term.layer)] for batch, kind in term.kinds.items()},
                count=counts[term.count],
            )
            for term in (self.terms if terms is None else terms)
        ]

    def statistics(
        self, model: torch.nn.Module, kind: str, need: Need, batch: Mapping[str, Tensor]
    ) -> dict[Place, TokenInputs]:
        """Per-token statistics of one batch, by positions and layer: one run of the model, one `linear_token_stats`."""
        widest = need.widest
        found = supervised_hidden(model, batch, widest, layers=need.layers, through_head=bool(need.outputs))
        values, vocab_size = self.head_statistics(model, kind, need, batch, found) if need.outputs else ({}, None)
        references = {
            layer: self.hidden_reference(kind, batch, widest, layer, layer_number(model, layer))
            for layer in need.reference_layers
        }
        ref_logp = self.logp_reference(kind, batch) if need.logp_reference else None
        rows = select_positions(batch, widest)[0]
        results = {}
        positions: Any
        for positions, layer in need.places:
            given: dict[str, Tensor] = values if layer is None else {"hidden": found.layers[layer]}
            ref_hidden = None if layer is None else references.get(layer)
            sequence_ids = found.sequence_ids
            if positions != widest:
                chosen, _, sequence_ids = select_positions(batch, positions)
                at = torch.searchsorted(rows, chosen)
                given = {name: value.index_select(0, at) for name, value in given.items()}
                ref_hidden = None if ref_hidden is None else ref_hidden.index_select(0, at)
            results[positions, layer] = TokenInputs(
                values=given,
                ref_logp=ref_logp if positions == "supervised" else None,
                ref_hidden=ref_hidden,
                sequence_ids=sequence_ids,
                num_sequences=found.num_sequences,
                vocab_size=vocab_size,
            )
        return results

    def head_statistics(
        self, model: torch.nn.Module, kind: str, need: Need, batch: Mapping[str, Tensor], found: Supervised
    ) -> tuple[dict[str, Tensor], int]:
        """What `linear_token_stats` says of the last hidden states, by output, and V."""
        head = output_head(model)  # after the forward: sharded models have gathered it by then
        dtype = found.hidden.dtype  # under autocast the head computes in half precision like the rest
        head = head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
        stats = linear_token_stats(
            found.hidden,
            head.weight,
            found.targets,
            bias=head.bias,
            outputs=tuple(need.outputs),
            reference=self.kl_reference(kind, batch, need.widest, head) if need.kl_reference else None,
            temperature=head.temperature,
            softcap=head.softcap,
            ignore_index=None,
            adapter=head.adapter(found.hidden),
        )
        return stats.as_dict(), head.weight.size(0)

    def logp_reference(self, kind: str, batch: Mapping[str, Tensor]) -> Tensor:
        """(N,) float32: the reference's logp of the supervised tokens."""
        source = self.references[kind]
        if isinstance(source, ReferenceCache):
            return source.logp(batch["index"])
        with torch.no_grad():
            return token_stats_of(source, batch)[0].logp

    def kl_reference(self, kind: str, batch: Mapping[str, Tensor], positions: Any, head: Head) -> tuple[Tensor, ...]:
        """The reference: hidden states (N, H), head (V, H), its bias (V,) if any; with dtype and device of the head."""
        source = self.references[kind]
        if isinstance(source, ReferenceCache):
            hidden = self.cached_hidden(source, batch, positions)
            if kind not in self._heads:
                self._heads[kind] = source.head
            reference = self._heads[kind]
        else:
            with torch.no_grad():
                hidden, reference = supervised_hidden(source, batch, positions).hidden, output_head(source).merged()
        if reference.weight.dtype != head.weight.dtype or reference.weight.device != head.weight.device:
            bias = None if reference.bias is None else reference.bias.to(head.weight)
            reference = reference._replace(weight=reference.weight.to(head.weight), bias=bias)
            self._heads[kind] = reference  # moved once, not in every step
        tensors = (hidden.to(head.weight), reference.weight, reference.bias)
        return tuple(tensor for tensor in tensors if tensor is not None)

    def hidden_reference(
        self, kind: str, batch: Mapping[str, Tensor], positions: Any, layer: Layer, number: int
    ) -> Tensor:
        """(N, H): the reference's hidden states of a layer, without gradients."""
        source = self.references[kind]
        if isinstance(source, ReferenceCache):
            return self.cached_hidden(source, batch, positions, number)
        with torch.no_grad():
            return supervised_hidden(source, batch, positions, layers=[layer], through_head=False).layers[layer]

    def cached_hidden(
        self, cache: ReferenceCache, batch: Mapping[str, Tensor], positions: Any, layer: int | None = None
    ) -> Tensor:
        hidden, kept = cache.hidden(batch["index"], layer), cache.metadata["positions"]
        if kept == positions:
            return hidden
        at = torch.searchsorted(select_positions(batch, kept)[0], select_positions(batch, positions)[0])
        return hidden.index_select(0, at)
