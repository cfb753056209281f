"""Suites: the numbers that a paper's table, or a benchmark, has of one model, each a line: a metric on a set.

A `Measure` is a metric of samples and how they become one number; an `Aggregate` is made of other numbers, and of the
logs of reference models. Names are those of OpenUnlearning's logs where it has them.

Sets are forget, retain, real_authors, world_facts, and holdout for attacks (questions of the forget set's kind that no
model has seen); "forget:paraphrased" is a set with its paraphrased questions. A line whose tool, metric or holdout set
is not there has no value, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._hints import check_known
from .logs import Log
from .privacy import auc, privacy, privleak
from .utility import forget_efficacy, forget_quality, harmonic_mean, memorization, model_utility

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
OPTIONAL = ("holdout",)


@dataclass(frozen=True)
class Measure:
    """A metric on a set. name: in logs. reduction: of REDUCTIONS; of PAIRED where the set is held against others."""

    name: str
    metric: str
    set: str = "forget"
    options: Mapping[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    against: tuple[str, ...] = ()
    source: str = "OpenUnlearning"

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
    """Of an aggregate. count: samples, as told; more: further numbers, by name."""

    value: float
    count: str = ""
    note: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """combine(log, logs of reference models) raises ValueError where it has no value."""

    name: str
    combine: Callable[[Log, Logs], Outcome]
    source: str = "OpenUnlearning"

    @property
    def variant(self) -> str:
        return self.source


@dataclass(frozen=True)
class Suite:
    """summary: one line. rows: of each set, the first that count; None is all. max_new_tokens: of a written answer.
    log_name: how OpenUnlearning's files begin."""

    name: str
    summary: str
    measures: tuple[Measure, ...]
    aggregates: tuple[Aggregate, ...] = ()
    rows: int | None = None
    max_new_tokens: int = 200
    log_name: str = "TOFU"

    @property
    def sets(self) -> list[str]:
        """Those that have to be there, without what is made of them."""
        names = dict.fromkeys(name.partition(":")[0] for measure in self.measures for name in measure.sets)
        return [name for name in names if name not in OPTIONAL]


# ---- aggregates ------------------------------------------------------------------------------------------------------


def values_of(log: Log, names: Iterable[str]) -> dict[str, float]:
    """Raises Unavailable for those that have none."""
    found = {name: log[name].value if name in log else None for name in names}
    missing = [name for name, value in found.items() if value is None or math.isnan(value)]
    if missing:
        raise Unavailable(f"needs {', '.join(missing)}, without a value here")
    return {name: value for name, value in found.items() if value is not None}


def combined(function: Callable[..., float], *names: str) -> Callable[[Log, Logs], Outcome]:
    """Of a function of those numbers, in that order."""
    return lambda log, logs: Outcome(function(*values_of(log, names).values()))


def utility(log: Log, logs: Logs) -> Outcome:
    return Outcome(model_utility(values_of(log, UTILITY)))


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
    more = {"ln p": found.ln_p, "log10 p": found.log10_p, "D": found.statistic}
    return Outcome(found.p_value, f"{found.num_forget} / {found.num_retain}", "; ".join(found.warnings), more)


def leak(epsilon: float) -> Callable[[Log, Logs], Outcome]:
    def combine(log: Log, logs: Logs) -> Outcome:
        own = values_of(log, ["mia_min_k"])["mia_min_k"]
        entry = logs.get("retain", {}).get("mia_min_k")
        known = entry.value if entry is not None else None
        note = "" if known is not None else "against an AUC of 0.5, as no retain log has mia_min_k"
        return Outcome(privleak(own, 0.5 if known is None else known, epsilon=epsilon), "", note)

    return combine


def scaled_privacy(log: Log, logs: Logs) -> Outcome:
    if missing := [name for name in ("retain", "full") if name not in logs]:
        raise Unavailable(f"no {' and no '.join(missing)} log to scale by")
    return Outcome(privacy(*(values_of(each, ATTACKS) for each in (log, logs["retain"], logs["full"]))))


def harmonic(*values: float) -> float:
    return harmonic_mean(values)


def middle(*values: float) -> float:
    return sum(values) / len(values)


# ---- suites ----------------------------------------------------------------------------------------------------------

PREFIXES = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}  # in logs -> set
UTILITY = [
    f"{prefix}_{name}"
    for prefix in PREFIXES
    for name in ("Q_A_Prob" if prefix == "retain" else "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
]
MODEL_UTILITY, FORGET_QUALITY = (
    Aggregate("model_utility", utility, "TOFU"),
    Aggregate("forget_quality", quality, "TOFU"),
)


def tofu(source: str, epsilon: float) -> tuple[Measure, ...]:
    """Probability, ROUGE-L recall and truth ratio of the four sets."""
    own = {"epsilon": epsilon}
    lines = [
        Measure("forget_Q_A_Prob", "probability", source=source),
        Measure("forget_Q_A_ROUGE", "rouge_l", source=source),
        Measure("forget_truth_ratio", "truth_ratio", "forget", own, "closer_to_1_better", source=source),
    ]
    for prefix, name in PREFIXES.items():
        lines.append(Measure(f"{prefix}_Q_A_Prob", "probability", name, source=source))
        if prefix != "retain":
            lines.append(Measure(f"{prefix}_Q_A_Prob_normalised", "probability_w_options", name, own, source=source))
        lines.append(Measure(f"{prefix}_Q_A_ROUGE", "rouge_l", name, source=source))
        lines.append(Measure(f"{prefix}_Truth_Ratio", "truth_ratio", name, own, "true_better", source=source))
    return tuple(lines)


def attack(name: str, metric: str, **options: Any) -> Measure:
    return Measure(name, metric, "forget", options, "auc", ("holdout",))


def attacks(variant: str) -> tuple[Measure, ...]:
    return (
        attack("mia_loss", "mia_loss"),
        attack("mia_zlib", "mia_zlib"),
        attack("mia_reference", "mia_reference"),
        attack("mia_min_k", "min_k", k=0.4, variant=variant),
        attack("mia_min_k_plus_plus", "min_k_plus_plus", k=0.4, variant=variant),
        attack("mia_gradnorm", "mia_gradnorm", variant=variant),
    )


def memorised(variant: str) -> tuple[Measure, ...]:
    """What Mem is made of."""
    return (
        Measure("extraction_strength", "extraction_strength", "forget", {"variant": variant}),
        Measure("exact_memorization", "memorization_accuracy", "forget", {"variant": variant}),
        Measure("forget_Q_A_PARA_Prob", "paraphrase_probability"),
        Measure("forget_truth_ratio_prob_mean", "truth_ratio", "forget", {"variant": "prob_mean", "epsilon": 1e-10}),
    )


def strengths() -> tuple[Measure, ...]:
    """ES-exact and ES-perturb, of the questions and of their paraphrases (Wang et al., 2025)."""
    return tuple(
        Measure(f"{name}_ES_{kind}", "extraction_strength", name + which, {"variant": "suffix"}, source="Wang et al.")
        for name in ("forget", "retain")
        for kind, which in (("exact", ""), ("perturb", ":paraphrased"))
    )


def closer_look() -> tuple[Measure, ...]:
    """R, P, TR, TE, CS and ES (entailment) of the four sets."""
    lines = []
    for prefix, name in {"forget": "forget", **PREFIXES}.items():
        reduction = "closer_to_1_worse" if name == "forget" else "true_better"
        p = "probability_w_options" if prefix in ("ra", "wf") else "probability"
        against = {"against": "before" if prefix in ("ra", "wf") else "answer"}
        premise = {"premise": "written" if name == "forget" else "answer"}
        for letters, metric, options, reduced in (
            ("R", "rouge_l", {}, "mean"),
            ("P", p, {}, "mean"),
            ("TR", "truth_ratio", {}, reduction),
            ("TE", "token_entropy", {}, "mean"),
            ("CS", "cosine_similarity", against, "mean"),
            ("ES", "entailment_score", premise, "mean"),
        ):
            lines.append(Measure(f"{prefix}_{letters}", metric, name, options, reduced, source="Yuan et al."))
    return tuple(lines)


MEM = ("extraction_strength", "exact_memorization", "forget_Q_A_PARA_Prob", "forget_truth_ratio_prob_mean")
CLOSER_UTILITY = [f"{prefix}_{letters}" for prefix in PREFIXES for letters in ("R", "P", "TR", "TE", "CS", "ES")]
CLOSER_EFFICACY = [f"forget_{letters}" for letters in ("R", "P", "TR", "CS", "ES")]
MIA = Measure("forget_MIA", "min_k", "forget", {"k": 0.4}, "auc_forgotten", ("real_authors", "world_facts"), "SOUL")
FLUENCY = Measure("forget_fluency", "fluency")
MIN_K = attack("mia_min_k", "min_k", k=0.4, variant="suffix")

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "tofu",
            "TOFU (Maini et al., 2024): model utility and forget quality, of the first 300 rows of each set",
            (*tofu("TOFU", 0.0), Measure("extraction_strength", "extraction_strength", source="Carlini et al."), MIN_K),
            (MODEL_UTILITY, FORGET_QUALITY, Aggregate("privleak", leak(0.0), "MUSE")),
            rows=300,
        ),
        Suite(
            "open_unlearning",
            "TOFU as OpenUnlearning (Dorna et al., 2025) has it: all rows, memorization, utility and privacy",
            (*tofu("OpenUnlearning", 1e-10), *memorised("open_unlearning"), *attacks("open_unlearning"), FLUENCY),
            (
                MODEL_UTILITY,
                FORGET_QUALITY,
                Aggregate("privleak", leak(1e-10)),
                Aggregate("memorization", combined(memorization, *MEM)),
                Aggregate("utility", combined(harmonic, "model_utility", FLUENCY.name)),
                Aggregate("privacy", scaled_privacy),
                Aggregate("agg", combined(harmonic, "memorization", "utility")),
            ),
        ),
        Suite(
            "closer_look",
            "A Closer Look (Yuan et al., 2025): model utility of 18 and forget efficacy, of the first 300 rows",
            closer_look(),
            (
                Aggregate("model_utility", combined(harmonic, *CLOSER_UTILITY), "Yuan et al."),
                Aggregate("forget_efficacy", combined(forget_efficacy, *CLOSER_EFFICACY), "Yuan et al."),
                Aggregate("avg", combined(middle, "model_utility", "forget_efficacy"), "Yuan et al."),
            ),
            rows=300,
        ),
        Suite(
            "mrd_paper",
            "arXiv:2504.06658 on TOFU, but for accuracies by the nearest answer: MIA, RR, and what is kept",
            (
                MIA,
                Measure("forget_RR", "rouge_l", "forget", {}, "complement", source="SOUL"),
                *(Measure(f"{prefix}_RR", "rouge_l", name, source="SOUL") for prefix, name in PREFIXES.items()),
                *(Measure(f"{p}_Acc", "answer_accuracy", PREFIXES[p], source="SOUL") for p in ("ra", "wf")),
                Measure("forget_MA", "memorization_accuracy", source="Tirumala et al."),
            ),
        ),
        Suite(
            "g_effect_paper",
            "Wang et al. (2025), Rethinking LLM Unlearning Objectives, on TOFU: ES exact and perturbed, FQ and MU",
            (*strengths(), *tofu("TOFU", 0.0)),
            (MODEL_UTILITY, FORGET_QUALITY),
        ),
        Suite(
            "tutorial",
            "What to tell of any method: ES exact and perturbed, Mem, Util and Agg, forget quality",
            (*strengths(), *memorised("suffix"), *tofu("TOFU", 0.0), FLUENCY),
            (
                MODEL_UTILITY,
                FORGET_QUALITY,
                Aggregate("memorization", combined(memorization, *MEM)),
                Aggregate("utility", combined(harmonic, "model_utility", FLUENCY.name)),
                Aggregate("agg", combined(harmonic, "memorization", "utility")),
            ),
        ),
    )
}


def get_suite(name: str) -> Suite:
    """Raises ValueError that names the nearest known ones."""
    check_known("suite", name, list(SUITES))
    return SUITES[name]
