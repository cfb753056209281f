"""A configured objective: what it needs of model and reference, and the way from statistics to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .definition import OUTPUT_OF, REFERENCE, WIDE, Definition, Statistic, Variant
from .reduction import (
    UNITS,
    Count,
    Layout,
    Selection,
    TokenInputs,
    check_matches,
    common_size,
    reduce_sequences,
    reduce_tokens,
)

DEFINITIONS: dict[str, Definition] = {}
HAD = {  # how the caller comes by a statistic, where it is not by asking token_stats for it
    "ref_logp": "token_stats_of(frozen, batch).logp of the frozen model, under torch.no_grad(), or of a ReferenceCache",
    "max_logp": "asked for by outputs=('topk',), with k=1",
    "kl_pq": "asked for by outputs=('kl_pq',), with reference= the frozen model's",
    "kl_qp": "asked for by outputs=('kl_qp',), with reference= the frozen model's",
    "lowered_kl_qp": "asked for by outputs=('kl_qp',), with reference= the frozen model's and lowered=b",
    "hidden": "in the model's output_hidden_states, or in pyunlearn.model.forward.supervised_hidden",
    "ref_hidden": "in the frozen model's output_hidden_states, under torch.no_grad(), or in a ReferenceCache",
    "ref_entropy": "token_stats_of(frozen, batch, 'entropy').entropy of the frozen model, under torch.no_grad()",
}


@dataclass(frozen=True)
class Samples:
    """Text that a model draws for every prompt: how many, at which temperature, of how many tokens at most, and after
    how many epochs anew (0: once, before training)."""

    count: int
    temperature: float = 1.0
    max_new_tokens: int = 200
    refresh_epochs: int = 0


@dataclass(frozen=True)
class Objective:
    """A configured objective: `get("wga", alpha=5.0)`. Calling it with the statistics gives the 0-d loss.

    Attributes:
        name, preset, reduction: as registered and chosen.
        options: every option with its value.
        temperature: of the statistics, the model's and the reference's: those of logits / temperature.
        keep, kept: likelihood selection: int(keep n) of a sequence's n tokens count, at least one, those with the
            "smallest" loss -logp or with the "largest".
        samples: where it is not of the answers, but of the model's own samples for the same prompts.
    """

    name: str
    preset: str
    reduction: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    temperature: float = 1.0
    keep: float = 1.0
    kept: str = "smallest"
    samples: Samples | None = None

    @property
    def definition(self) -> Definition:
        return DEFINITIONS[self.name]

    @property
    def variant(self) -> Variant:
        return self.definition.variants[self.preset]

    @property
    def role(self) -> str:
        """Either "forget" or "retain"."""
        return self.definition.role

    @property
    def summary(self) -> str:
        """One line for `--help`."""
        return self.definition.summary

    @property
    def formula(self) -> str:
        return self.variant.formula

    @property
    def source(self) -> str:
        return self.definition.source

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs to ask of `token_stats`, for each batch, with this `k` and `temperature`."""
        used = [s.name for s in self.variant.statistics if s.name not in (*REFERENCE, *WIDE)]
        names = [OUTPUT_OF.get(name, name) for name in used]
        return tuple(dict.fromkeys([*names, "logp"] if self.keep < 1 else names))

    @property
    def k(self) -> int | None:
        """Of `topk`, where it needs that."""
        used = {statistic.name for statistic in self.variant.statistics}
        return 1 if "max_logp" in used else self.options["k"] if "topk" in used else None

    @property
    def lowered(self) -> float:
        """Of `token_stats`, at supervised tokens: what the reference's logit of the target is less by; mostly 0."""
        return self.options["b"] if any(s.name == "lowered_kl_qp" for s in self.variant.statistics) else 0.0

    @property
    def selection(self) -> Selection:
        """Which tokens of a sequence count."""
        return Selection(self.options.get("skip", 0), self.keep, self.kept == "largest")

    @property
    def layer(self) -> int | str | None:
        """Whose hidden states it needs, a number or word for `pyunlearn.model.forward.layer_number`; or None."""
        return self.options.get("layer") if any(s.name in WIDE for s in self.variant.statistics) else None

    @property
    def reference(self) -> str | None:
        """What it needs of the reference: "kl" (its logits, or last hidden states and head; maybe `reference_outputs`
        too), "logp" per token, "hidden" (hidden states of `layer`), or None.
        """
        used = {statistic.name for statistic in self.variant.statistics}
        if used & {"kl_pq", "kl_qp", "lowered_kl_qp"}:
            return "kl"
        return "logp" if "ref_logp" in used else "hidden" if "ref_hidden" in used else None

    @property
    def reference_outputs(self) -> tuple[str, ...]:
        """What it needs of the reference per token, of "logp" and "entropy"."""
        used = {statistic.name for statistic in self.variant.statistics}
        return tuple(name for name in ("logp", "entropy") if f"ref_{name}" in used)

    @property
    def batches(self) -> tuple[str, ...]:
        """Which sequences go through the model, e.g. "answer", "refusal", in the order of the statistics."""
        return self.variant.batches

    @property
    def kinds(self) -> dict[str, str]:
        """What follows the role, "forget" or "retain", in the name of each batch's kind of sequence in a data set."""
        own = "" if self.samples is None else "_sample"
        return {batch: own if batch == "answer" else f"_{batch}" for batch in self.batches}

    @property
    def written(self) -> dict[str, Samples]:
        """By the end of its kind's name, the text that a model has to write for it."""
        if "alternate" in self.batches:
            names = ("alternates", "sampling_temperature", "max_new_tokens")
            return {"_alternate": Samples(*(self.options[name] for name in names))}
        return {} if self.samples is None else {"_sample": self.samples}

    @property
    def is_of_made_text(self) -> bool:
        """Whether any of its batches is of text that no data set has."""
        return bool(self.written) or "generic" in self.batches

    @property
    def positions(self) -> str:
        """The "supervised" tokens, all "real" ones (the prompt's too), of these the "template_free" ones, or, padding
        too, all "followed" by another position or "all" positions. The option of this name, where there is one,
        chooses.
        """
        return self.options.get("positions", self.variant.positions)

    @property
    def unit(self) -> str:
        """What `count` counts: "tokens", or "sequences" that hold one (of pairs, those where both do)."""
        return UNITS[self.reduction]

    def __call__(self, stats: Mapping[str, TokenInputs], count: Count | None = None) -> Tensor:
        """The loss of one (micro-)batch.

        Args:
            stats: batch name ("answer", "refusal") -> `TokenInputs`.
            count: denominator of the whole step; None: this batch's own.
        Raises: ValueError, TypeError or IndexError naming what is missing or does not fit.
        """
        variant = self.variant
        layouts: dict[str, Layout] = {}
        tensors = [self._masked(stats, statistic, layouts) for statistic in variant.statistics]
        layouts = {batch: self._selected(stats[batch], layout) for batch, layout in layouts.items()}
        keywords = {**self.options, **self._told(stats, layouts)}
        if self.definition.level == "token":
            (layout,) = layouts.values()
            return reduce_tokens(variant.function(*tensors, **keywords), layout, self.reduction, count)

        size = common_size(list(layouts.values()))
        layouts = {batch: layout.with_size(size) for batch, layout in layouts.items()}
        each = variant.each or (lambda values: values)
        sums = [
            layouts[statistic.batch].sum_by_sequence(layouts[statistic.batch].fill(each(tensor)))
            for statistic, tensor in zip(variant.statistics, tensors, strict=True)
        ]
        tokens = [layout.tokens_by_sequence() for layout in layouts.values()]
        return reduce_sequences(variant.function(*sums, **keywords), tokens, self.reduction, count)

    def _selected(self, inputs: TokenInputs, layout: Layout) -> Layout:
        """The tokens of one batch that count."""
        logp = inputs.values.get("logp")
        if self.keep < 1:
            if not isinstance(logp, Tensor):
                raise ValueError(
                    f"{self.name}: keep={self.keep} goes by the likelihood of each token: needs "
                    f"{layout.prefix}logp=, or logp among the values, got {type(logp).__name__}; ask token_stats for "
                    f"outputs={self.outputs}"
                )
            check_matches("logp", logp, layout.name, layout.like, (logp.dtype,))
        return layout.select(self.selection, logp)

    def _told(self, stats: Mapping[str, TokenInputs], layouts: Mapping[str, Layout]) -> dict[str, Any]:
        """What the function is told of the batches besides statistics."""
        told: dict[str, Any] = {}
        for batch, name in self.variant.context:
            key, whose = self.variant.prefix(batch) + name, batch or self.variant.batches[0]
            if name == "vocab_size":
                told[key] = self._size(key, stats[whose].vocab_size, "V")
            elif name == "inverse_length":
                told[key] = layouts[whose].inverse_length()
            elif name == "num_tokens":
                told[key] = layouts[whose].tokens_by_sequence().clamp_min(1)
            elif name == "num_positions":
                told[key] = self._size(key, stats[whose].num_positions, "T - 1 of rows padded to T")
            else:
                labelled: Any = stats[whose].labelled
                check_matches(key, labelled, layouts[whose].name, layouts[whose].like, (torch.bool,))
                told[key] = labelled
        return told

    def _masked(self, stats: Mapping[str, TokenInputs], wanted: Statistic, layouts: dict[str, Layout]) -> Tensor:
        """One statistic, at least float32, 0 where not supervised. A batch's first sets its layout."""
        wide = wanted.name in WIDE
        prefix = self.variant.prefixes[wanted.batch]
        name = prefix + wanted.name
        if wanted.batch not in stats:
            raise ValueError(f"{self.name}: stats needs {list(self.batches)}, {wanted.batch!r} is missing")
        inputs = stats[wanted.batch]
        if not isinstance(inputs, TokenInputs):
            raise TypeError(f"{self.name}: stats[{wanted.batch!r}]: needs TokenInputs, got {type(inputs).__name__}")
        reference = wanted.name in REFERENCE
        had = HAD.get(wanted.name, f"asked for by outputs=({wanted.name!r},)")
        known = inputs.values
        tensor = getattr(inputs, wanted.name) if reference else known.get(wanted.name)
        if tensor is None and wanted.name in OUTPUT_OF:
            tensor = known.get(OUTPUT_OF[wanted.name])
        if tensor is None:
            what = "hidden states of one layer" if wide else f"token_stats' {wanted.name!r}"
            if reference:
                what = f"the frozen reference's {wanted.name.removeprefix('ref_')} per token"
            raise ValueError(f"{self.name} (preset {self.preset}) needs {name}, {what}; got None; it is {had}")
        if not isinstance(tensor, Tensor):
            inside = f", give its .{wanted.name}" if hasattr(tensor, wanted.name) else ""
            raise TypeError(f"{name}: needs a tensor, got {type(tensor).__name__}{inside}")
        if tensor.dtype == torch.bool:
            raise TypeError(
                f"{self.name}: {name}: needs a floating dtype, got torch.bool, which is a mask: give it as "
                f"{prefix}mask=; {name} is {had}"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: needs a floating dtype, got {tensor.dtype}")
        if reference:
            tensor = tensor.detach()
        if wanted.batch in layouts:
            layout = layouts[wanted.batch]
            tensor = tensor.to(layout.like.dtype)
            like = inputs.values["hidden"].to(tensor.dtype) if wide else layout.like
            check_matches(name, tensor, layout.name, like, (tensor.dtype,))
        else:
            if tensor.dim() not in ((2, 3) if wide else (1, 2)) or (wide and tensor.size(-1) == 0):
                needed = "(B, T, H) or flat (N, H)" if wide else "(B, T) or flat (N,)"
                logits = "; of logits, token_stats(logits, targets) makes it" if tensor.dim() == 3 and not wide else ""
                raise ValueError(f"{name}: needs shape {needed}, got {tuple(tensor.shape)}{logits}")
            tensor = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
            layout = Layout.of(inputs, tensor[..., 0] if wide else tensor, name, prefix)
            layouts[wanted.batch] = layout
        return layout.fill(tensor)

    def _size(self, name: str, size: Any, what: str) -> int:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{self.name}: {name}={size!r}: needs {what}, a whole number >= 1")
        return size
