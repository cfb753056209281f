"""What suites are made of: measures, which are a metric on a set, and aggregates of other numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ..logs import LOGS_READ, Entry, Log
from ..privacy import auc, privacy, privleak
from ..utility import forget_quality, harmonic_mean

OURS, OPEN_UNLEARNING = "ours", "OpenUnlearning"  # of lines: whose definition it is
Logs = Mapping[str, Log]  # of reference models: retain, full
# Of scores of the forget set and of others: one number, and what its sign says.
PAIRED: dict[str, tuple[Callable[[Any, Any], float], str]] = {
    "auc": (auc, "1: memorised, 0.5: not told apart, 0: unlearned too far"),
    "auc_forgotten": (
        lambda forget, others: 1 - auc(forget, others),
        "1: forgotten, 0.5: not told apart, 0: memorised",
    ),
}
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")


@dataclass(frozen=True)
class Measure:
    """A metric on a set. name: in logs. reduction: of REDUCTIONS; of PAIRED where the set is held against others."""

    name: str
    metric: str
    set: str = "forget"
    options: Mapping[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    against: tuple[str, ...] = ()
    source: str = OURS

    @property
    def sets(self) -> tuple[str, ...]:
        return (self.set, *self.against)

    @property
    def variant(self) -> str:
        """What tells it from others of the metric: source, reduction and options."""
        options = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.options.items()
        ]
        return ", ".join([self.source, *([self.reduction] if self.reduction != "mean" else []), *options])


class Unavailable(ValueError):
    """Why an aggregate has no value: something that it needs is not there."""


@dataclass(frozen=True)
class Outcome:
    """Of an aggregate. count: samples, as told; more: further numbers, by name; variant: in the aggregate's place."""

    value: float
    count: str = ""
    note: str = ""
    more: Mapping[str, float] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class Read:
    """What is read of a reference model's log: an entry's samples, or its number."""

    log: str
    entry: str
    samples: bool = False

    def __str__(self) -> str:
        return f"samples of {self.entry}" if self.samples else self.entry

    def is_in(self, log: Log) -> bool:
        """Raises ValueError for an entry that is damaged."""
        entry = log.get(self.entry)
        if entry is not None:
            entry.check()
        return entry is not None and (bool(entry.column()) if self.samples else entry.value is not None)


@dataclass(frozen=True)
class Aggregate:
    """combine(log, logs of reference models) raises ValueError where it has no value. reads: what it looks for in
    logs."""

    name: str
    combine: Callable[[Log, Logs], Outcome]
    source: str = OURS
    reads: tuple[Read, ...] = ()

    @property
    def variant(self) -> str:
        return self.source


@dataclass(frozen=True)
class Form:
    """How a set is put to the model. plain: a question is the whole prompt, an answer has no end token (`PlainFormat`).
    max_new_tokens: of what it writes, which ends before any of stops. longest: tokens of an answer that are read, the
    rest of it, or of what the model's context has no room for, is cut off; None: whole, or an error. around: what a
    plain question stands in, at "{}", by the model_type of the model's configuration; "": of all others."""

    max_new_tokens: int = 200
    plain: bool = False
    stops: tuple[str, ...] = ()
    longest: int | None = None
    around: Mapping[str, str] = field(default_factory=lambda: {"": "{}"})


@dataclass(frozen=True)
class Suite:
    """summary: one line. rows: of each set, the first that count; None is all. max_new_tokens: of a written answer.
    log_name: how OpenUnlearning's files begin. forms: of sets that are not put by the usual prompt. optional: sets
    whose lines have no value where they are not there. tasks: of lm-eval, each with the metric of it that counts after
    a stroke, acc unless told. prompts: those that its source puts the sets without a form by; numbers of another tell
    it. None: not told."""

    name: str
    summary: str
    measures: tuple[Measure, ...]
    aggregates: tuple[Aggregate, ...] = ()
    rows: int | None = None
    max_new_tokens: int = 200
    log_name: str = "TOFU"
    forms: Mapping[str, Form] = field(default_factory=dict)
    optional: tuple[str, ...] = ("holdout",)
    tasks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def known_sets(self) -> list[str]:
        """All, without what is made of them."""
        return list(dict.fromkeys(name.partition(":")[0] for measure in self.measures for name in measure.sets))

    @property
    def sets(self) -> list[str]:
        """Those that have to be there."""
        return [name for name in self.known_sets if name not in self.optional]

    def form(self, name: str) -> Form:
        """Of a set, or what is made of it."""
        return self.forms.get(name.partition(":")[0], Form(self.max_new_tokens))

    def check_log(self, name: str, log: Log, what: str) -> None:
        """Raises ValueError for a reference model's log that the aggregates do not read, or that has nothing they read,
        and that names an entry they read which is damaged.

        name: retain or full. what: the argument that the error names.
        """
        reads = dict.fromkeys(read for each in self.aggregates for read in each.reads if read.log == name)
        if not reads:
            raise ValueError(f"{what}: no line of suite {self.name!r} reads a {name} log")
        try:
            found = [read.is_in(log) for read in reads]
        except ValueError as damage:
            raise ValueError(f"{what}: {damage}") from None
        if not any(found):
            has = ", ".join(islice(log, 4)) + (f" and {len(log) - 4} more" if len(log) > 4 else "")
            raise ValueError(
                f"{what}: suite {self.name!r} reads {', '.join(map(str, reads))} of it, and it has none of them, but "
                f"{has or 'nothing'}; needs {LOGS_READ}"
            )


# ---- aggregates ------------------------------------------------------------------------------------------------------


def values_of(log: Log, names: Iterable[str]) -> dict[str, float]:
    """Raises Unavailable for those that have none."""
    names = list(names)
    for name in names:
        if name in log:
            log[name].check()
    found = {name: log[name].value if name in log else None for name in names}
    missing = [name for name, value in found.items() if value is None or math.isnan(value)]
    if missing:
        raise Unavailable(f"needs {', '.join(missing)}, without a value here")
    return {name: value for name, value in found.items() if value is not None}


def combined(function: Callable[..., float], *names: str) -> Callable[[Log, Logs], Outcome]:
    """Of a function of those numbers, in that order."""

    def combine(log: Log, logs: Logs) -> Outcome:
        values = values_of(log, names)
        return outcome(function(*values.values()), values if function is harmonic else {})

    return combine


def outcome(value: float, values: Mapping[str, float]) -> Outcome:
    """Of a harmonic mean of values, which one of them at 0 brings to 0: the note names it."""
    zero = [name for name, each in values.items() if each <= 0]
    return Outcome(value, note=f"0, as {', '.join(zero)} {'is' if len(zero) == 1 else 'are'}" if zero else "")


def quality(log: Log, logs: Logs) -> Outcome:
    name = "forget_truth_ratio"
    if "retain" not in logs:
        raise Unavailable("no retain log, which has the truth ratios of a model that never saw the forget set")
    columns = [each[name].column() if name in each else [] for each in (log, logs["retain"])]
    if not columns[1]:
        raise Unavailable(f"the retain log has no samples of {name}")
    if not columns[0]:
        raise Unavailable(f"needs {name}, without samples here")
    found = forget_quality(*columns)
    own, retained = found.num_forget, found.num_retain
    other = [] if own == retained else [f"the log has {retained} forget samples, here {own}: other rows"]
    more = {"ln p": found.ln_p, "log10 p": found.log10_p, "D": found.statistic}
    return Outcome(found.p_value, f"{own} / {retained}", "; ".join([*other, *found.warnings]), more)


FORGET_QUALITY = Aggregate("forget_quality", quality, "TOFU", (Read("retain", "forget_truth_ratio", samples=True),))


def leak(name: str, epsilon: float, attack: str = "mia_min_k", source: str = OPEN_UNLEARNING) -> Aggregate:
    """attack: whose AUC it is made of."""

    def combine(log: Log, logs: Logs) -> Outcome:
        own = values_of(log, [attack])[attack]
        entry = logs.get("retain", {}).get(attack, Entry(None))
        entry.check()
        known = entry.value
        if known is not None and not 0 <= known <= 1:
            raise Unavailable(f"the retain log has {known} as the AUC of {attack}, needs a number from 0 to 1")
        note = "" if known is not None else f"against an AUC of 0.5, as no retain log has {attack}"
        return Outcome(privleak(own, 0.5 if known is None else known, epsilon=epsilon), "", note)

    return Aggregate(name, combine, source, (Read("retain", attack),))


def scaled_privacy(log: Log, logs: Logs) -> Outcome:
    if missing := [name for name in ("retain", "full") if name not in logs]:
        raise Unavailable(f"no {' and no '.join(missing)} log to scale by")
    return Outcome(privacy(*(values_of(each, ATTACKS) for each in (log, logs["retain"], logs["full"]))))


PRIVACY = Aggregate(
    "privacy",
    scaled_privacy,
    OPEN_UNLEARNING,
    reads=tuple(Read(log, attack) for log in ("retain", "full") for attack in ATTACKS),
)


def harmonic(*values: float) -> float:
    return harmonic_mean(values)


def middle(*values: float) -> float:
    return sum(values) / len(values)


def accuracy_of_tasks(log: Log, logs: Logs) -> Outcome:
    """Mean over the zero-shot tasks."""
    names = [name for name in log if "/acc" in name]
    if not names:
        raise Unavailable("no zero-shot task has an accuracy")
    return Outcome(middle(*values_of(log, names).values()), str(len(names)))
