"""The registry: `register` makes an objective of a function, `get` configures one, `table` lists all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from torch import Tensor

from .._hints import check_known
from ..ops.contract import TokenRule
from .closed_form import check_definition
from .definition import (
    BATCHES,
    GIVEN,
    KEPT,
    OF_A_BATCH,
    REFERENCE,
    WIDE,
    Definition,
    Options,
    Variant,
    context_of,
    docstring,
    is_finite,
    read_variant,
    signature,
)
from .objective import DEFINITIONS, Objective
from .reduction import TokenInputs

ROLES = ("forget", "retain")
LEVELS = ("token", "sequence")
POSITIONS = ("supervised", "template_free", "real", "followed", "all")  # as in pyunlearn.model.forward
OF_ANY = ("preset", "reduction", "temperature", "keep", "kept")  # what `get` takes of every objective
SHARED_ARGUMENTS = ("preset", "reduction", "count", "num_sequences", "keep", "kept")

Function = Callable[..., Tensor]
_PUBLIC: dict[str, Function] = {}


def get(
    name: str,
    *,
    preset: str | None = None,
    reduction: str | None = None,
    temperature: float = 1.0,
    keep: float = 1.0,
    kept: str = "smallest",
    **options: Any,
) -> Objective:
    """A configured objective. reduction: None for the preset's, "paper" for that of the paper's equation.

    temperature, keep, kept: for any objective, see `Objective`: temperature scaling (2 is typical) and likelihood
    selection (0.8) of Wang et al., Towards Effective Evaluations and Comparisons for LLM Unlearning Methods, ICLR 2025,
    whose code keeps the tokens with the smallest loss and whose tutorial names the largest.

    >>> get("wga", alpha=5.0).options
    {'alpha': 5.0}
    >>> get("wga").reduction, get("wga", reduction="paper").reduction
    ('token_mean', 'sequence_mean')

    Raises: ValueError on an unknown name, preset, reduction or option (with the nearest ones), or on a value
        out of range.
    """
    check_known("objective", name, DEFINITIONS)
    definition = DEFINITIONS[name]
    preset, variant = definition.variant(preset)
    for option in options:
        if option == "coefficient" and option not in variant.options:
            raise ValueError(
                f"{name}: coefficient={options[option]!r}: is no option of an objective, but stands beside it: the "
                "second of a pair (objective, coefficient), or a key of its own beside the name in a run's settings"
            )
        check_known(f"{name}: option", option, (*variant.options, *OF_ANY))
    if not is_finite(temperature) or temperature <= 0:
        raise ValueError(f"{name}: temperature={temperature!r}: needs a finite number > 0")
    if not is_finite(keep) or not 0 < keep <= 1:
        raise ValueError(f"{name}: keep={keep!r}: needs a number above 0, up to 1")
    check_known(f"{name}: kept", kept, KEPT)
    if kept != KEPT[0] and keep == 1:
        raise ValueError(f"{name}: kept={kept!r}: says which tokens keep leaves; needs keep below 1, e.g. keep=0.8")
    reduction = variant.reduction if reduction is None else reduction
    check_known(f"{name}: reduction", reduction, (*variant.reductions, "paper"))
    reduction = definition.paper_reduction if reduction == "paper" else reduction
    values = {key: option.check(name, options.get(key, option.default)) for key, option in variant.options.items()}
    chosen = Objective(name, preset, reduction, values, float(temperature), float(keep), kept)
    if temperature != 1 and not chosen.outputs and not chosen.reference_outputs:
        raise ValueError(f"{name}: temperature={temperature:g} divides logits, and {name} is of hidden states alone")
    if keep < 1 and chosen.positions in ("followed", "all"):
        raise ValueError(
            f"{name}: keep={keep} and preset={preset!r}, which counts padding too: of that nothing is likely; needs "
            "keep=1, or a preset of real tokens"
        )
    return chosen


def names(role: str | None = None) -> tuple[str, ...]:
    """Names of the registered objectives, forget ones first, or those of one role ("forget" or "retain")."""
    check_known("role", role, (*ROLES, None))
    return tuple(name for each in ROLES for name in DEFINITIONS if DEFINITIONS[name].role == each in (role or each))


class Row(NamedTuple):
    """One line of `table()`. `defaults` has preset and reduction too; `presets` says what each changes, and its
    reduction; `paper_reduction` is that of the paper's equation."""

    name: str
    role: str
    formula: str
    defaults: dict[str, Any]
    presets: dict[str, str]
    paper_reduction: str
    source: str
    summary: str


def table() -> list[Row]:
    """Every objective as a row, for the documentation."""
    rows = []
    for chosen in map(get, names()):
        defaults = {**chosen.options, "preset": chosen.preset, "reduction": chosen.reduction}
        presets = {name: variant.told for name, variant in chosen.definition.variants.items()}
        by = chosen.definition.paper_reduction
        rows.append(Row(chosen.name, chosen.role, chosen.formula, defaults, presets, by, chosen.source, chosen.summary))
    return rows


def register(
    name: str,
    *,
    role: str = "forget",
    level: str = "token",
    batch: str = "answer",
    positions: str = "supervised",
    reduction: str | None = None,
    paper_reduction: str | None = None,
    formula: str = "",
    source: str = "",
    preset: str = "paper",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    slope: float | None = None,
    rule: Callable[[Options], TokenRule] | None = None,
    each: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Function], Function]:
    """Decorator: makes an objective of a function of per-token statistics.

    Its positional parameters are named after the statistics it needs (`logp`, `ref_logp`, `entropy`, `kl_pq`,
    ...; with two batches `refusal_logp`, `answer_logp`), its keyword-only parameters are the options. It
    returns the loss per token. With `level="sequence"` it gets each statistic summed over the sequence,
    (S,), and returns the loss per sequence. Masks, reductions, counts, flat and (B, T) forms, presets and
    checks are added here.

    Args:
        name: under which `get` finds it.
        role: "forget" or "retain".
        level: "token" or "sequence".
        batch: which sequences an unprefixed statistic belongs to: "answer", "refusal", "alternate" or "generic".
        each: with level="sequence": of every token's statistic, what is summed; None: it itself.
        positions: "supervised", "real" (the prompt's tokens too), "template_free" (of these the question's and the
            answer's own), "followed" (padding too, but the last one) or "all".
        reduction: the default one; None: token_mean, or sequence_mean at sequence level.
        paper_reduction: what `reduction="paper"` is, that of the paper's equation; None: the default one.
        formula, source: for the documentation.
        preset: the name of the function's own defaults.
        presets: name -> option values, for other defaults of the same function.
        slope, rule: d(loss of a token)/d(its statistic) is slope * rule(options), for `pyunlearn.value_and_grad`; slope
            alone where that is a constant, neither where it is of another form. A rule is for `logp`; its sigmoid's
            floor is log(p°^beta + epsilon), by the option `epsilon` where there is one. Both are tried by forward-mode
            differentiation, which the function has to allow. See `one_pass`.

    Returns: the public function `(statistics..., mask=None, *, options..., preset, reduction, count,
        sequence_ids, num_sequences) -> loss`.
    Raises: ValueError on a taken name, a signature that cannot be read, a function that does not give a loss for each
        of four tokens (or sequences), and a slope and rule that are not its gradient there.
    """

    def decorate(function: Function) -> Function:
        taken = _PUBLIC.get(name)
        if taken and (taken.__module__, taken.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"name={name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another")
        usual = reduction or f"{level}_mean"
        check_known(f"{name}: role", role, ROLES)
        check_known(f"{name}: level", level, LEVELS)
        check_known(f"{name}: batch", batch, BATCHES)
        check_known(f"{name}: positions", positions, POSITIONS)
        variant = read_variant(function, batch, formula, positions, usual, "as above", slope, rule, each)
        check_level(name, level, variant)
        check_known(f"{name}: reduction", usual, variant.reductions)
        equation = paper_reduction or usual
        check_known(f"{name}: paper_reduction", equation, variant.reductions)
        variants = {preset: variant}
        for other, changed in (presets or {}).items():
            options = dict(variant.options)
            for key, value in changed.items():
                check_known(f"{name}: option of preset {other!r}", key, options)
                options[key] = replace(options[key], default=options[key].check(name, value))
            changes = ", ".join(f"{key} = {value}" for key, value in changed.items()) or f"as {preset}"
            variants[other] = replace(variant, options=options, changes=changes)
        for called, formulated in variants.items():
            check_definition(name, called, level, formulated)
        summary, _, body = inspect.cleandoc(function.__doc__ or name).partition("\n")
        DEFINITIONS[name] = Definition(name, role, level, equation, source, summary, body.strip(), preset, variants)

        def objective(*args: Any, **named: Any) -> Tensor:
            return _call(name, args, named)

        for attribute in ("__module__", "__qualname__", "__name__"):
            setattr(objective, attribute, getattr(function, attribute))
        _PUBLIC[name] = objective
        _document(name)
        return objective

    return decorate


def register_preset(
    name: str,
    *presets: str,
    formula: str,
    positions: str | None = None,
    reduction: str | None = None,
    slope: float | None = None,
    rule: Callable[[Options], TokenRule] | None = None,
) -> Callable[[Function], Function]:
    """Decorator: another formula for the objective `name`, under its own presets. Returns the function.

    positions, reduction: of this formula; None: as the objective's own. slope, rule: as in `register`; those of the
    other presets are not taken over.

    Raises: ValueError on an unknown objective, and as `register`.
    """

    def decorate(function: Function) -> Function:
        check_known("objective", name, DEFINITIONS)
        definition = DEFINITIONS[name]
        usual = definition.variant(None)[1]
        where, by = positions or usual.positions, reduction or usual.reduction
        variant = read_variant(function, usual.batches[0], formula, where, by, "", slope, rule, usual.each)
        defaults = {key: option.default for key, option in usual.options.items()}
        changed = [str(option) for key, option in variant.options.items() if option.default != defaults.get(key)]
        positioned = [f"positions = {positions}"] if positions else []
        variant = replace(variant, changes="; ".join([f"loss = {formula}", *positioned, *changed]))
        check_level(name, definition.level, variant)
        check_known(f"{name}: reduction", by, variant.reductions)
        check_definition(name, presets[0], definition.level, variant)
        definition.variants.update(dict.fromkeys(presets, variant))
        _document(name)
        return function

    return decorate


def check_level(name: str, level: str, variant: Variant) -> None:
    """Raises ValueError for what there is at the other level only, and for a slope where no token's gradient depends on
    that token's statistic alone."""
    if level == "token" and len(variant.batches) > 1:
        raise ValueError(f"{name}: statistics of {variant.batches} together need level='sequence'")
    if variant.each is not None and level == "token":
        raise ValueError(f"{name}: each, of what a sequence's sum is made, needs level='sequence'")
    for batch, told in variant.context:
        if told == "num_tokens" and level == "token":
            raise ValueError(f"{name}: num_tokens needs level='sequence'")
        fitting = [prefix + told for prefix in variant.prefixes.values()] if told in OF_A_BATCH else [told]
        if (called := f"{batch}_{told}" if batch else told) not in fitting:
            raise ValueError(f"{name}: {called} needs to be named {' or '.join(fitting)}: each batch has its own")
        if told in ("inverse_length", "labelled") and (level == "sequence" or variant.slope is not None):
            raise ValueError(f"{name}: {told} needs level='token' and no slope")
    used = {statistic.name for statistic in variant.statistics}
    if "topk" in used and ("k" not in variant.options or "max_logp" in used):
        raise ValueError(f"{name}: topk needs an option k, whose it is, and no max_logp beside it")
    if "lowered_kl_qp" in used and ("b" not in variant.options or used & {"kl_pq", "kl_qp"}):
        raise ValueError(f"{name}: lowered_kl_qp needs an option b, whose it is, and no kl_pq or kl_qp beside it")
    statistics = [statistic.name for statistic in variant.statistics if statistic.name not in REFERENCE]
    apart = (*WIDE, "lowered_kl_qp")  # value_and_grad reads neither
    if variant.slope is not None and (level != "token" or len(statistics) != 1 or statistics[0] in apart):
        raise ValueError(f"{name}: slope needs level='token' and one statistic a token, got {level}, {statistics}")


def _document(name: str) -> None:
    """Writes signature and docstring of the public function, with the presets known so far."""
    function, definition = cast(Any, _PUBLIC[name]), DEFINITIONS[name]
    preset, variant = definition.variant(None)
    function.__signature__ = signature(variant, preset)
    function.__doc__ = docstring(definition)


def _call(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The public function: sorts its arguments into statistics, layout and options."""
    variant = DEFINITIONS[name].variant(named.get("preset"))[1]
    by_position = (*variant.tensors, *variant.masks)
    tensors: dict[str, Any] = dict.fromkeys((*by_position, *variant.likelihoods, *variant.sequence_ids))
    for key in named:
        check_known(f"{name}: argument", key, (*tensors, *variant.sizes, *variant.options, *SHARED_ARGUMENTS))
    if len(args) > len(by_position):
        raise ValueError(f"{name}: only {by_position} go by position, got {len(args)} arguments")
    for key, value in zip(by_position, args, strict=False):
        if key in named:
            raise ValueError(f"{name}: {key} is given twice")
        tensors[key] = value
    for key in tensors.keys() & named.keys():
        tensors[key] = named.pop(key)
    count, size = (named.pop(key, None) for key in ("count", "num_sequences"))
    told = {context_of(key): named.pop(key, None) for key in variant.sizes}
    stats = {
        batch: TokenInputs(
            values={
                **{s.name: tensors[prefix + s.name] for s in variant.statistics if s.batch == batch},
                "logp": tensors[prefix + "logp"],
            },
            ref_logp=tensors.get(prefix + "ref_logp"),
            ref_hidden=tensors.get(prefix + "ref_hidden"),
            ref_entropy=tensors.get(prefix + "ref_entropy"),
            sequence_ids=tensors[prefix + "sequence_ids"],
            num_sequences=size,
            mask=tensors[prefix + "mask"],
            **{name: told.get((batch if prefix else None, name)) for name in GIVEN},
        )
        for batch, prefix in variant.prefixes.items()
    }
    return get(name, **named)(stats, count)
