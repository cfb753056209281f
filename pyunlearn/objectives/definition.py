"""What the registry knows of an objective, read from the signature of its function and told in its docstring.

Positional parameters name the statistics it works on, keyword-only parameters with a default are its options.
`Positive` and `NonNegative` annotate an option's range, `Layer`, `Masked` and `Seed` what else it may be.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from torch import Tensor

from .._hints import check_known
from ..ops.contract import MAX_K, TokenRule
from .reduction import REDUCTIONS, Count


class Domain(NamedTuple):
    """What an option may be, as it is told and as it is checked."""

    text: str
    holds: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


FINITE = Domain("a finite number", is_finite)
POSITIVE = Domain("a finite number > 0", lambda value: is_finite(value) and value > 0)
NON_NEGATIVE = Domain("a finite number >= 0", lambda value: is_finite(value) and value >= 0)
SHARE = Domain("a number from 0 to 1", lambda value: is_finite(value) and 0 <= value <= 1)
NUMBERS = (FINITE, POSITIVE, NON_NEGATIVE, SHARE)  # stored as float
DEPTHS = ("shallow", "middle", "deep")

Positive = Annotated[float, POSITIVE]
NonNegative = Annotated[float, NON_NEGATIVE]
Layer = Annotated[
    int | str,
    Domain(
        f"one of {DEPTHS}, or a whole number other than 0: 1 is the first block's output, -1 what the head gets",
        lambda value: value in DEPTHS if isinstance(value, str) else is_whole(value) and value != 0,
    ),
]
WITHOUT_PADDING = ("real", "template_free", "supervised")
Masked = Annotated[str, Domain("one of " + ", ".join(WITHOUT_PADDING), lambda value: value in WITHOUT_PADDING)]
Share = Annotated[float, SHARE]
Whole = Annotated[int, Domain("a whole number >= 0", lambda value: is_whole(value) and value >= 0)]
TopK = Annotated[
    int, Domain(f"a whole number from 1 to {MAX_K}", lambda value: is_whole(value) and 1 <= value <= MAX_K)
]
Seed = Annotated[
    int, Domain("a whole number from 0 to 2**63 - 1", lambda value: is_whole(value) and 0 <= value < 2**63)
]

KEPT = ("smallest", "largest")
BATCHES = ("refusal", "alternate", "generic", "answer")
OF_A_BATCH = ("num_tokens", "num_positions")  # of pairs, one each: answer_num_tokens
CONTEXT = ("vocab_size", "labelled", "inverse_length", *OF_A_BATCH)
GIVEN: dict[str, tuple[Any, str]] = {  # arguments that are neither statistics nor options
    "vocab_size": (int, "V, the number of tokens of the vocabulary"),
    "labelled": (Tensor, "bool, (B, T) or (N,): which of the positions are supervised"),
    "num_positions": (int, "what a row is padded to, less the last: T - 1 of input_ids (B, T)"),
}
STATISTICS = {
    "logp": "log-probability of each target under the model",
    "ref_logp": "the same of the frozen reference; never differentiated",
    "log_nll": "log(-logp)",
    "entropy": "entropy in nats of the model's distribution at each position",
    "variance": "variance of the log-probability at each position",
    "kl_pq": "KL(model || reference) at each position, in nats",
    "kl_qp": "KL(reference || model) at each position, in nats",
    "lowered_kl_qp": "the same of the reference with its logit of the target less by b: token_stats' kl_qp, lowered=b",
    "uniform_ce": "cross-entropy of the uniform distribution to the model's at each position, in nats",
    "lse": "log of the sum of e^z over the vocabulary at each position",
    "topk": "the mean of the log-probabilities of the k likeliest tokens, by their own shares of what these k have",
    "max_logp": "largest log-probability at each position: token_stats' topk with k = 1",
    "hidden": "hidden states of one layer",
    "ref_hidden": "the same of the frozen reference; never differentiated",
    "ref_entropy": "entropy in nats of the frozen reference's distribution at each position",
}
WIDE = ("hidden", "ref_hidden")  # H numbers a token instead of one
OUTPUT_OF = {"max_logp": "topk", "lowered_kl_qp": "kl_qp"}  # where it has another name
REFERENCE = ("ref_logp", "ref_hidden", "ref_entropy")


class Statistic(NamedTuple):
    """One positional parameter: which statistic of which batch."""

    batch: str
    name: str


@dataclass(frozen=True)
class Option:
    name: str
    default: Any
    domain: Domain
    kind: Any

    @classmethod
    def of(cls, name: str, default: Any, hint: Any) -> Option:
        """The option as annotated; without a `Domain` it is a finite number, or of the default's type."""
        domain = next((extra for extra in get_args(hint) if isinstance(extra, Domain)), None)
        if domain is not None:
            return cls(name, default, domain, get_args(hint)[0])
        if is_number(default):
            return cls(name, default, FINITE, float)
        kind = type(default)
        return cls(name, default, Domain(f"a {kind.__name__}", lambda value: isinstance(value, kind)), kind)

    def check(self, objective: str, value: Any) -> Any:
        """The value, of a number's domain as float. Raises ValueError."""
        if not self.domain.holds(value):
            raise ValueError(f"{objective}: {self.name}={value!r}: needs {self.domain.text}")
        return float(value) if self.domain in NUMBERS else value

    def __str__(self) -> str:
        return f"{self.name} = {self.default}"


Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Variant:
    """One preset: a formula, its defaults, and its gradient per token where that is known in closed form."""

    function: Callable[..., Tensor]
    statistics: tuple[Statistic, ...]
    options: Mapping[str, Option]
    context: tuple[tuple[str | None, str], ...]  # batch, where it is of one of several, and name
    formula: str
    positions: str
    reduction: str
    changes: str = ""
    slope: float | None = None
    rule: Callable[[Options], TokenRule] | None = None
    each: Callable[[Tensor], Tensor] | None = None

    @property
    def batches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(statistic.batch for statistic in self.statistics))

    @property
    def told(self) -> str:
        """What the preset changes and divides by, and whether a step's split into batches matters to it."""
        split = "depends on how a step is split into batches"
        matters = self.positions in ("followed", "all") or {"inverse_length", "num_positions"} & {
            name for _, name in self.context
        }
        return "; ".join([self.changes, f"reduction = {self.reduction}", *([split] if matters else [])])

    @property
    def reductions(self) -> tuple[str, ...]:
        """A pair of sequences has no one number of tokens to divide by."""
        return REDUCTIONS if len(self.batches) == 1 else ("sequence_mean", "sum")

    @property
    def prefixes(self) -> dict[str, str]:
        """What goes before an argument's name for each batch: nothing for a single one."""
        return {batch: f"{batch}_" if len(self.batches) > 1 else "" for batch in self.batches}

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(self.prefixes[statistic.batch] + statistic.name for statistic in self.statistics)

    @property
    def likelihoods(self) -> tuple[str, ...]:
        """What `keep` goes by, for each batch that has no logp among its statistics."""
        return tuple(
            prefix + "logp"
            for batch, prefix in self.prefixes.items()
            if Statistic(batch, "logp") not in self.statistics
        )

    @property
    def masks(self) -> tuple[str, ...]:
        return tuple(prefix + "mask" for prefix in self.prefixes.values())

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        return tuple(prefix + "sequence_ids" for prefix in self.prefixes.values())

    def token_rule(self, options: Options) -> TokenRule:
        """What the slope is multiplied by at each token."""
        return self.rule(options) if self.rule else TokenRule()

    @property
    def sizes(self) -> tuple[str, ...]:
        """Arguments that are needed besides statistics: those of `GIVEN`."""
        return tuple(self.prefix(batch) + name for batch, name in self.context if name in GIVEN)

    def prefix(self, batch: str | None) -> str:
        return "" if batch is None else self.prefixes[batch]


@dataclass(frozen=True)
class Definition:
    """One registered objective, with every preset. paper_reduction: what its paper's equation does."""

    name: str
    role: str
    level: str
    paper_reduction: str
    source: str
    summary: str
    body: str
    default_preset: str
    variants: dict[str, Variant] = field(default_factory=dict)

    def variant(self, preset: str | None) -> tuple[str, Variant]:
        """The preset's name and variant (None: the default). Raises ValueError with the nearest name."""
        preset = self.default_preset if preset is None else preset
        check_known(f"{self.name}: preset", preset, self.variants)
        return preset, self.variants[preset]


def read_variant(
    function: Callable[..., Tensor],
    batch: str,
    formula: str,
    positions: str,
    reduction: str,
    changes: str,
    slope: float | None,
    rule: Callable[[Options], TokenRule] | None,
    each: Callable[[Tensor], Tensor] | None = None,
) -> Variant:
    """Reads a signature. Raises ValueError on a parameter that is neither statistic nor option."""
    statistics, options = [], {}
    context: list[tuple[str | None, str]] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty:
            statistics.append(read_statistic(name, batch))
        elif parameter.kind is parameter.KEYWORD_ONLY and (known := context_of(name)) is not None:
            context.append(known)
        elif parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
            options[name] = Option.of(name, parameter.default, hints.get(name))
        else:
            raise ValueError(
                f"{function.__name__}: parameter {name!r} needs to be a statistic (positional, no default), "
                f"an option (keyword-only, with a default) or one of {CONTEXT} (keyword-only)"
            )
    if not statistics:
        raise ValueError(f"{function.__name__}: needs a positional parameter named after a statistic, such as logp")
    if slope is not None and not is_finite(slope):
        raise ValueError(f"{function.__name__}: slope={slope!r}: needs a finite number")
    if rule is not None and (isinstance(rule, TokenRule) or not callable(rule)):
        raise ValueError(f"{function.__name__}: rule={rule!r}: needs a function of the options that gives a TokenRule")
    if rule is not None and slope is None:
        raise ValueError(f"{function.__name__}: rule needs a slope, d(loss of a token)/d(statistic) apart from it")
    return Variant(
        function, tuple(statistics), options, tuple(context), formula, positions, reduction, changes, slope, rule, each
    )


def context_of(name: str) -> tuple[str | None, str] | None:
    """(batch or None, name) of what an objective is told besides statistics and options; None for anything else."""
    if name in CONTEXT:
        return None, name
    batch = next((known for known in BATCHES if name.startswith(known + "_")), None)
    rest = name.removeprefix(f"{batch}_")
    return (batch, rest) if batch is not None and rest in OF_A_BATCH else None


def read_statistic(name: str, batch: str) -> Statistic:
    prefix = next((known for known in BATCHES if name.startswith(known + "_")), None)
    statistic = Statistic(prefix, name.removeprefix(prefix + "_")) if prefix else Statistic(batch, name)
    check_known("parameter", statistic.name, STATISTICS)
    return statistic


def signature(variant: Variant, preset: str) -> inspect.Signature:
    """The signature of the public function: statistics, masks, options, then what all objectives take."""
    either, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    keywords: list[Any] = [(option.name, option.default, option.kind) for option in variant.options.values()]
    keywords += [("preset", preset, str), ("reduction", variant.reduction, str), ("count", None, Count | None)]
    keywords += [("keep", 1.0, float), ("kept", KEPT[0], str)]
    keywords += [(name, None, Tensor | None) for name in variant.likelihoods]
    keywords += [*((name, None, Tensor | None) for name in variant.sequence_ids), ("num_sequences", None, int | None)]
    parameters = [inspect.Parameter(name, either, annotation=Tensor) for name in variant.tensors]
    parameters += [inspect.Parameter(name, either, default=None, annotation=Tensor | None) for name in variant.masks]
    parameters += [
        inspect.Parameter(name, keyword, annotation=GIVEN[context_of(name)[1]][0])  # type: ignore[index]
        for name in variant.sizes
    ]
    parameters += [inspect.Parameter(name, keyword, default=value, annotation=kind) for name, value, kind in keywords]
    return inspect.Signature(parameters, return_annotation=Tensor)


def docstring(definition: Definition) -> str:
    """The public function's docstring: the author's words, formula, arguments, defaults, presets, source."""
    _, variant = definition.variant(None)
    arguments = {}
    for name, (_, statistic) in zip(variant.tensors, variant.statistics, strict=True):
        shape = "(B, T, H) or flat (N, H)" if statistic in WIDE else "(B, T) or flat (N,)"
        arguments[name] = f"{shape}, float32 or float64: {STATISTICS[statistic]}"
    arguments |= dict.fromkeys(variant.masks, "bool, (B, T) or (N,): the tokens that count; None: all")
    arguments |= {variant.prefix(batch) + name: GIVEN[name][1] for batch, name in variant.context if name in GIVEN}
    arguments |= {name: option.domain.text for name, option in variant.options.items()}
    arguments |= {
        "preset": "which formula and defaults, see below",
        "reduction": " or ".join(variant.reductions) + f'; "paper": as in the equation, {definition.paper_reduction}',
        "count": "denominator in place of the batch's own number of supervised tokens (token_mean) or of "
        "sequences that hold one (sequence_*); a number or 0-d tensor, say of the whole optimiser step",
        "keep": "likelihood selection: the share of a sequence's tokens that count, int(keep n) and at least one; "
        "below 1 it needs logp",
        "kept": 'the tokens with the "smallest" loss -logp, or with the "largest"',
    }
    arguments |= dict.fromkeys(variant.likelihoods, f"{STATISTICS['logp']}, which keep below 1 goes by")
    arguments |= dict.fromkeys(variant.sequence_ids, "(N,) int64, the sequence of each flat token")
    arguments["num_sequences"] = "how many sequences the flat form has; None waits for the device to find out"
    defaults = [*map(str, variant.options.values()), f"preset = {definition.default_preset}"]
    parts = [
        definition.summary,
        f"    loss = {variant.formula}",
        definition.body,
        "\n".join(["Args:", *(wrap(f"{name}: {what}", 4) for name, what in arguments.items())]),
        "Returns: 0-d loss to be minimised; 0 with zero gradients if no token is supervised.\n"
        "Raises: ValueError, TypeError or IndexError naming the argument that does not fit.",
        f"Defaults: {', '.join(defaults)}, reduction = {variant.reduction}.",
        "\n".join(["Presets:", *(f"    {name}: {each.told}" for name, each in definition.variants.items())]),
        wrap(f"Source: {definition.source}"),
    ]
    return "\n\n".join(part for part in parts if part)


def wrap(text: str, indent: int = 0) -> str:
    first, then = " " * indent, " " * (indent + 4)
    return textwrap.fill(text, 106, initial_indent=first, subsequent_indent=then, break_on_hyphens=False)
