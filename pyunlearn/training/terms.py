"""The terms of a run's loss: what they need of every kind of sequence, and one scalar a term out of model and batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import objectives as registry
from ..model.causal_lm import CausalLM
from ..model.fingerprint import dataset_fingerprint
from ..model.forward import Layer, Supervised, select_positions, supervised_hidden, widest
from ..model.head import head_stats
from ..model.packing import Packing
from ..model.reference import Cached, Reference, Source, as_references
from ..objectives import Objective, Samples, TokenInputs
from ..objectives.reduction import Selection
from ..objectives.representation import check_scale
from ..ops.contract import NEEDS_REFERENCE

# kinds of sequence, positions, "tokens" | "sequences", which of a sequence's tokens count
Count = tuple[tuple[str, ...], str, str, Selection]
# an output of the head, the temperature of its logits, the k of top k, what a KL's reference is lowered by
Read = tuple[str, float, int | None, float]


class Place(NamedTuple):
    """Where and how an objective reads the model: positions, layer where hidden states are meant, temperature, k, and
    what the reference's logits of supervised targets are less by."""

    positions: str
    layer: Layer | None
    temperature: float
    k: int | None
    lowered: float = 0.0

    def read(self, output: str) -> Read:
        k, lowered = self.k if output == "topk" else None, self.lowered if output in NEEDS_REFERENCE else 0.0
        return output, self.temperature, k, lowered


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
        return kinds if unit == "sequences" else kinds[:1], self.positions, unit, self.objective.selection

    @property
    def positions(self) -> str:
        return self.objective.positions

    @property
    def layer(self) -> Layer | None:
        return self.objective.layer

    @property
    def place(self) -> Place:
        chosen = self.objective
        return Place(self.positions, self.layer, chosen.temperature, chosen.k, chosen.lowered)


@dataclass
class Need:
    """What all terms together want of one kind of sequence."""

    reads: set[Read] = field(default_factory=set)
    places: set[Place] = field(default_factory=set)
    reference_scalars: dict[tuple[str, float], set[str]] = field(default_factory=dict)  # by positions and temperature
    kl_reference: bool = False
    reference_layers: set[Layer] = field(default_factory=set)
    samples: Samples | None = None  # what a model has to write for it

    @property
    def positions(self) -> set[str]:
        return {place.positions for place in self.places}

    @property
    def layers(self) -> set[Layer]:
        return {place.layer for place in self.places if place.layer is not None}

    @property
    def calls(self) -> dict[tuple[float, int | None, float], list[str]]:
        """Outputs by temperature, k and lowered of one call: one a temperature, and one more for every other k, or
        whatever else a KL's reference is lowered by."""
        calls: dict[tuple[float, int | None, float], list[str]] = {}
        for temperature in sorted({read[1] for read in self.reads}):
            reads = sorted(read for read in self.reads if read[1] == temperature and read[0] != "topk")
            tops = sorted({read[2] for read in self.reads if read[1] == temperature and read[2] is not None})
            lowered = sorted({read[3] for read in reads if read[0] in NEEDS_REFERENCE})
            rest = [read[0] for read in reads if read[0] not in NEEDS_REFERENCE]
            for k, by in list(zip_longest(tops, lowered)) or [(None, None)]:
                names = [read[0] for read in reads if read[0] in NEEDS_REFERENCE and read[3] == by]
                calls[temperature, k, by or 0.0] = ["topk"] * (k is not None) + names + rest
                rest = []
        return calls

    @property
    def scalars(self) -> set[tuple[str, float]]:
        """Numbers of the reference per token, by output and temperature."""
        return {(name, temperature) for (_, temperature), names in self.reference_scalars.items() for name in names}

    @property
    def hidden_reference(self) -> bool:
        """Whether hidden states of the reference are needed, the last or another layer's."""
        return self.kl_reference or bool(self.reference_layers)

    @property
    def reference(self) -> bool:
        return bool(self.reference_scalars) or self.hidden_reference

    @property
    def widest(self) -> Any:
        """The positions that hold all the others."""
        return widest(self.positions)  # type: ignore[arg-type]


PARTS = "names, Objectives or pairs (objective, coefficient)"


def make_terms(objectives: Sequence[Any]) -> tuple[Term, ...]:
    """Terms from objectives, each a name, an Objective, or a pair of either with its coefficient.

    Raises ValueError for an empty list, an unknown name, a coefficient that is not finite, or an rmu and an rr on two
    scales; TypeError otherwise.
    """
    if isinstance(objectives, str):
        raise TypeError(f"objectives={objectives!r}: needs a list, [{objectives!r}]")
    if objectives is not None and not isinstance(objectives, Iterable):
        raise TypeError(f"objectives: needs a list of {PARTS}, got {type(objectives).__name__}")
    if not objectives:
        raise ValueError("objectives is empty: needs at least one objective")
    terms: list[Term] = []
    for objective, coefficient in [part for entry in objectives for part in parts_of(entry)]:
        if isinstance(objective, str):
            objective = registry.get(objective)
        if not isinstance(objective, Objective):
            raise TypeError(f"objectives: needs {PARTS}, got {objective!r}")
        if not math.isfinite(coefficient):
            raise ValueError(f"objectives: the coefficient of {objective.name} needs to be finite, got {coefficient}")
        label = f"{objective.role}.{objective.name}" + ("" if objective.samples is None else ".samples")
        twins = sum(term.label.split("#")[0] == label for term in terms)
        kinds = {batch: objective.role + kind for batch, kind in objective.kinds.items()}
        terms.append(Term(f"{label}#{twins + 1}" if twins else label, objective, float(coefficient), kinds))
    check_scale(term.objective for term in terms)
    return tuple(terms)


def parts_of(entry: Any) -> list[tuple[Any, float]]:
    """An entry of a list of objectives with its coefficient; of the name of a mixture its parts."""
    if isinstance(entry, list) and entry and all(isinstance(part, tuple) for part in entry):
        raise TypeError(
            f"objectives: needs {PARTS}, got a list of {len(entry)} pairs, such as bss() gives: put a * before it, "
            "[*bss()]"
        )
    if isinstance(entry, tuple) and len(entry) != 2:
        raise TypeError(f"objectives: needs {PARTS}, got a tuple of {len(entry)}: {entry!r}")
    objective, coefficient = entry if isinstance(entry, tuple) else (entry, 1.0)
    if isinstance(coefficient, Tensor) and coefficient.numel() == 1:
        coefficient = coefficient.item()
    if isinstance(coefficient, bool) or not isinstance(coefficient, Real):
        raise TypeError(f"objectives: the coefficient of {objective!r} needs to be a number, got {coefficient!r}")
    coefficient = float(coefficient)
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
            need.reads.update(map(term.place.read, term.objective.outputs))
            need.places.add(term.place)
            if names := term.objective.reference_outputs:
                need.reference_scalars.setdefault((term.positions, term.objective.temperature), set()).update(names)
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


def check_top(need: Need, model: Any) -> None:
    """Raises ValueError for a top k of more tokens than the model's vocabulary has."""
    size = CausalLM.of(model).vocab_size
    for _, _, k, _ in need.reads:
        if k is not None and k > size:
            raise ValueError(
                f"k={k}: the model's vocabulary has {size} tokens; of all of them the belief has no gradient"
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
        reference = references[kind]
        if isinstance(reference, Cached):
            reference.cache.check_scalars(need.scalars)
    return references


def count_items(
    batch: Mapping[str, Mapping[str, Tensor]],
    kinds: tuple[str, ...],
    positions: Any,
    unit: str,
    selection: Selection = Selection(),  # noqa: B008 (immutable)
) -> int:
    """Tokens that count, or sequences with such a token in every one of `kinds`."""
    counts = [
        selection.num_kept(
            torch.bincount(select_positions(batch[kind], positions)[2], minlength=len(batch[kind]["input_ids"]))
        )
        for kind in kinds
    ]
    return int(counts[0].sum()) if unit == "tokens" else int((torch.stack(counts) > 0).all(0).sum())


class TermLosses:
    """What every term's loss is made of: model and batch in, one scalar a term out.

    Attributes: terms; needs (kind of sequence -> `Need`); references (kind -> what stands for the frozen reference).
    objectives, reference and what is raised: as `UnlearnTrainer`.
    """

    def __init__(self, objectives: Sequence[Any], reference: Source | Mapping[str, Source] | None = None):
        self.terms = make_terms(objectives)
        self.needs = collect_needs(self.terms)
        self.references = assign_references(self.needs, reference)
        self.packing: Packing | None = None  # where it has been entered, batches go through the model together

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
        packed = self.packed_states(lm, needs, inputs)
        for kind, need in needs.items():
            for place, values in self.statistics(lm, kind, need, inputs[kind], packed.get(kind)).items():
                stats[kind, place] = values
        return [
            term.objective(
                {batch: stats[kind, term.place] for batch, kind in term.kinds.items()},
                count=counts[term.count],
            )
            for term in (self.terms if terms is None else terms)
        ]

    def packed_states(
        self, lm: CausalLM, needs: Mapping[str, Need], inputs: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Supervised]:
        """Hidden states of the kinds of sequence that go through the model together, out of one run of it."""
        through_head = any(need.reads for need in needs.values())
        if through_head:
            lm.check_head()
        if self.packing is None or not self.packing.entered:
            return {}
        positions = {kind: need.widest for kind, need in needs.items()}
        layers = {kind: need.layers for kind, need in needs.items()}
        batches = {kind: inputs[kind] for kind in needs}
        return self.packing.hidden(lm, batches, positions, layers, through_head)

    def statistics(
        self, lm: CausalLM, kind: str, need: Need, batch: Mapping[str, Tensor], packed: Supervised | None = None
    ) -> dict[Place, TokenInputs]:
        """Per-token statistics of one batch, by positions and layer: one run of the model, unless it was `packed`
        with others, and one `linear_token_stats`."""
        held = need.widest
        supervised = packed or supervised_hidden(lm, batch, held, layers=need.layers, through_head=bool(need.reads))
        outputs, vocab_size = self.head_outputs(lm, kind, need, batch, supervised) if need.reads else ({}, None)
        ref_states = {layer: self.references[kind].hidden(batch, held, layer) for layer in need.reference_layers}
        scalars: dict[tuple[str, float], dict[str, Tensor]] = {}
        for (where, temperature), names in need.reference_scalars.items():
            told = self.references[kind].scalars(batch, sorted(names), where, temperature)  # type: ignore[arg-type]
            scalars[where, temperature] = told
        rows = select_positions(batch, held)[0]
        results = {}
        for place in need.places:
            positions: Any = place.positions
            values = {read[0]: value for read, value in outputs.items() if read == place.read(read[0])}
            told, ref_hidden = scalars.get((positions, place.temperature), {}), None
            if place.layer is not None:
                values["hidden"] = supervised.layers[place.layer]
                ref_hidden = ref_states.get(place.layer)
            chosen, sequence_ids = rows, supervised.sequence_ids
            if positions != held:
                chosen, _, sequence_ids = select_positions(batch, positions)
                at = torch.searchsorted(rows, chosen)
                values = {name: value.index_select(0, at) for name, value in values.items()}
                ref_hidden = None if ref_hidden is None else ref_hidden.index_select(0, at)
            labelled = torch.ones_like(chosen, dtype=torch.bool)
            if positions != "supervised":
                labelled = torch.isin(chosen, select_positions(batch, "supervised")[0])
            results[place] = TokenInputs(
                values=values,
                ref_logp=told.get("logp"),
                ref_hidden=ref_hidden,
                ref_entropy=told.get("entropy"),
                sequence_ids=sequence_ids,
                num_sequences=supervised.num_sequences,
                vocab_size=vocab_size,
                labelled=labelled.to(sequence_ids.device),
                num_positions=batch["input_ids"].size(1) - 1,
            )
        return results

    def head_outputs(
        self, lm: CausalLM, kind: str, need: Need, batch: Mapping[str, Tensor], supervised: Supervised
    ) -> tuple[dict[Read, Tensor], int]:
        """What `linear_token_stats` says of the last hidden states, and V: one call for what it can give at once."""
        # After the forward: sharded models have gathered the head by then. In its dtype: under autocast the head
        # computes in half precision like the rest.
        head = lm.read_head().to(supervised.hidden)
        reference = None
        if need.kl_reference:
            source = self.references[kind]
            hidden = source.hidden(batch, need.widest)
            reference = hidden, source.head(head.weight)
        labelled: Any = 1.0
        if need.positions != {"supervised"} and any(read[3] for read in need.reads):
            at = (select_positions(batch, positions)[0] for positions in (need.widest, "supervised"))
            labelled = torch.isin(*at).to(supervised.hidden.device, torch.float32)
        outputs: dict[Read, Tensor] = {}
        for (temperature, k, lowered), names in need.calls.items():
            frozen = reference if NEEDS_REFERENCE & {*names} else None
            how: dict[str, Any] = {"temperature": temperature} | ({} if k is None else {"k": k})
            how |= {"lowered": lowered * labelled} if lowered else {}
            stats = head_stats(head, supervised.hidden, supervised.targets, names, reference=frozen, **how).as_dict()
            place = Place("", None, temperature, k, lowered)
            outputs |= {place.read(name): stats[name] for name in names}
        return outputs, head.weight.size(0)
