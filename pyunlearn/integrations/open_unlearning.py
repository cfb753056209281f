"""Every objective as a trainer that OpenUnlearning loads by name (Dorna et al., 2025; its trainers as of d3d7cf9).

Where it registers its own, at the end of src/trainer/__init__.py:

    from pyunlearn.integrations.open_unlearning import register_trainers
    register_trainers(TRAINER_REGISTRY, FinetuneTrainer)

Then `trainer.handler=pyunlearn_npo` takes the method_args of its NPO (gamma, alpha, retain_loss_type, beta), and every
other of our objectives its own options. Losses are OpenUnlearning's, batch by batch, from per-token statistics.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from .._hints import check_known
from ..model.forward import IGNORE_INDEX
from ..training.method import TermConfig
from ..training.terms import TermLosses, count_items

PREFIX = "pyunlearn_"
PRESET = "open_unlearning"
RETAIN = {"NLL": "gd", "KL": "kl", "EMBED_DIFF": "rr"}  # its retain_loss_type
SPELT = {"wga": {"beta": "alpha"}, "simnpo": {"delta": "margin"}, "rmu": {"steering_coeff": "c"}}  # its -> our option
BLOCK = re.compile(r"model\\?\.layers\\?\.(\d+)")


def terms_of(
    name: str,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    retain_loss_type: str | None = "NLL",
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    **method_args: Any,
) -> dict[str, TermConfig]:
    """A trainer's method_args as settings of a forget term and, unless retain_loss_type is None, a retain term.

    gamma, alpha: their weights. retain_loss_type: "NLL", "KL", "EMBED_DIFF", or a retain objective's name.
    preset: of both; None is "open_unlearning" where the objective has it. options: of the forget objective, by our
    names; method_args: the same by the names of its own trainers, such as beta (of WGA: the exponent) and delta.

    Raises ValueError that names what is not known, and for a module or parameters that are not the layer's alone.
    """
    own = dict(options or {})
    retained = None if retain_loss_type is None else RETAIN.get(retain_loss_type, retain_loss_type)
    if retained is not None:
        check_known("retain_loss_type", retain_loss_type, [*RETAIN, *objectives.names("retain")])
    if "module_regex" in method_args:
        own["layer"] = layer_of(method_args.pop("module_regex"))
    if (trained := method_args.pop("trainable_params_regex", None)) not in (None, [".*"], ".*"):
        raise ValueError(f"trainable_params_regex={trained!r}: needs '.*', all parameters; or freeze them beforehand")
    spelt = SPELT.get(name, {})
    own |= {spelt.get(key, key): value for key, value in method_args.items()}
    terms = {"forget": term(name, gamma, preset, own)}
    if retained is not None:
        shared = {"layer": own["layer"]} if retained == "rr" and "layer" in own else {}
        terms["retain"] = term(retained, alpha, preset, shared)
    return terms


def term(name: str, coefficient: float, preset: str | None, options: Mapping[str, Any]) -> TermConfig:
    own = objectives.get(name).definition.variants
    chosen = PRESET if preset is None and PRESET in own else preset
    objectives.get(name, preset=chosen, **options)  # its error, without a wrapping
    return TermConfig(name=name, coefficient=float(coefficient), preset=chosen, options=dict(options))


def layer_of(module_regex: str) -> int:
    r"""`model\.layers\.7` gives what our layer 8 is: layers count from the first block's output, 1."""
    match = BLOCK.fullmatch(module_regex)
    if match is None:
        raise ValueError(rf"module_regex={module_regex!r}: needs one block, such as 'model\.layers\.7'")
    return int(match[1]) + 1


def register_trainers(registry: MutableMapping[str, type], base: type) -> None:
    """Puts a trainer for each forget objective into OpenUnlearning's registry, "pyunlearn_" and its name.

    base: its FinetuneTrainer, or transformers' Trainer. A pair of objectives (dpo) takes "original" and "alternate" of
    its forget batches. Raises ValueError where a name is taken by another's trainer.
    """
    for name in objectives.names("forget"):
        handler = PREFIX + name
        if handler in registry and not issubclass(registry[handler], ObjectiveTrainer):
            raise ValueError(f"registry[{handler!r}]: is taken by {registry[handler].__name__}")
        registry[handler] = type(handler, (ObjectiveTrainer, base), {"objective": name})


METHOD_ARGS = ("gamma", "alpha", "retain_loss_type", "preset", "options", "module_regex", "trainable_params_regex")


class ObjectiveTrainer:
    """Goes before a Trainer: takes the method_args of `terms_of`, and gives the loss of OpenUnlearning's batches.

    A reference, where a term needs one, is a frozen copy of the model as it is at the start. Means are over a
    micro-batch, and of accumulated ones their mean, as there; `UnlearnTrainer` has those of the whole step.
    """

    objective: str

    def __init__(self, *args: Any, **named: Any):
        definition = objectives.get(self.objective).definition
        known = {option for variant in definition.variants.values() for option in variant.options}
        known |= {*METHOD_ARGS, *SPELT.get(self.objective, {})}
        method_args = {key: named.pop(key) for key in [*named] if key in known}
        terms = terms_of(self.objective, **method_args)
        if "tokenizer" in named:  # its name before transformers 5
            named["processing_class"] = named.pop("tokenizer")
        super().__init__(*args, **named)
        trainer: Any = self
        chosen = [(each.objective(), each.coefficient) for each in terms.values()]
        needs = any(objective.reference is not None for objective, _ in chosen)
        frozen = copy.deepcopy(trainer.model).requires_grad_(False) if needs else None
        self.losses = TermLosses(chosen, frozen)
        for reference in self.losses.references.values():
            reference.to(trainer.args.device)
        trainer.loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """gamma times the forget loss, plus alpha times the retain loss; of rows of one set, as in an evaluation, the
        model's own."""
        if "input_ids" in inputs:
            plain: Any = super()
            return plain.compute_loss(model, inputs, return_outputs)
        batch = kinds_of(inputs)
        if absent := [kind for kind in self.losses.needs if kind not in batch]:
            raise ValueError(f"inputs: {self.objective} needs {absent}, the data set gives {[*batch]}")
        of_states = [kind for each in self.losses.terms if each.layer for kind in each.kinds.values()]
        batch |= {kind: at_labels(batch[kind]) for kind in of_states}
        counts = {each.count: count_items(batch, *each.count) for each in self.losses.terms}
        losses = self.losses.term_losses(model, batch, counts)
        loss = sum(each.coefficient * value for each, value in zip(self.losses.terms, losses, strict=True))
        told = {each.label: value.detach() for each, value in zip(self.losses.terms, losses, strict=True)}
        return (loss, told) if return_outputs else loss


def at_labels(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows whose hidden states that count are those of the labelled tokens themselves, as of its RMU.

    Ours are those before them, one earlier: here labels move up by one, and every row has one token more, which the
    states before it do not see.
    """
    ids, mask, labels = rows["input_ids"], rows["attention_mask"], rows["labels"]
    none = torch.zeros_like(mask[:, :1])
    return {
        "input_ids": torch.cat([ids, ids[:, -1:]], 1),
        "attention_mask": torch.cat([mask, none], 1) | torch.cat([none, mask], 1),
        "labels": torch.cat([torch.full_like(labels[:, :1], IGNORE_INDEX), labels], 1),
    }


def kinds_of(inputs: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """OpenUnlearning's batches by our kinds: alternates of the forget rows are what to say instead."""
    batch: dict[str, Mapping[str, Tensor]] = {}
    for role, rows in inputs.items():
        if "original" in rows:
            batch |= {role: rows["original"], f"{role}_refusal": rows["alternate"]}
        else:
            batch[role] = rows
    return batch
