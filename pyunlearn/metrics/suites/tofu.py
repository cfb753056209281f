"""Suites on TOFU's sets: forget, retain, real_authors, world_facts, and holdout for attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data.prompts import OF_OPEN_UNLEARNING
from ..logs import Log
from ..utility import forget_efficacy, memorization, model_utility
from .parts import (
    FORGET_QUALITY,
    OPEN_UNLEARNING,
    OURS,
    PRIVACY,
    Aggregate,
    Logs,
    Measure,
    Outcome,
    Suite,
    combined,
    harmonic,
    leak,
    middle,
    outcome,
    values_of,
)

PREFIXES = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}  # in logs -> set
UTILITY = [
    f"{prefix}_{name}"
    for prefix in PREFIXES
    for name in ("Q_A_Prob" if prefix == "retain" else "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
]


def utility(log: Log, logs: Logs) -> Outcome:
    values = values_of(log, UTILITY)
    return outcome(model_utility(values), values)


MODEL_UTILITY = Aggregate("model_utility", utility, "TOFU")


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


def attack(name: str, metric: str, source: str = OPEN_UNLEARNING, **options: Any) -> Measure:
    return Measure(name, metric, "forget", options, "auc", ("holdout",), source)


def attacks(variant: str) -> tuple[Measure, ...]:
    return (
        attack("mia_loss", "mia_loss"),
        attack("mia_zlib", "mia_zlib"),
        attack("mia_reference", "mia_reference"),
        attack("mia_min_k", "min_k", k=0.4, variant=variant),
        attack("mia_min_k_plus_plus", "min_k_plus_plus", k=0.4, variant=variant),
        attack("mia_gradnorm", "mia_gradnorm", variant=variant),
    )


def memorised(variant: str, strength: str, accuracy: str) -> tuple[Measure, ...]:
    """What Mem is made of. strength, accuracy: whose ES and EM these are."""
    own, mean = {"variant": variant}, {"variant": "prob_mean", "epsilon": 1e-10}
    return (
        Measure("extraction_strength", "extraction_strength", "forget", own, source=strength),
        Measure("exact_memorization", "memorization_accuracy", "forget", own, source=accuracy),
        Measure("forget_Q_A_PARA_Prob", "paraphrase_probability", source=OPEN_UNLEARNING),
        Measure("forget_truth_ratio_prob_mean", "truth_ratio", "forget", mean, source=OPEN_UNLEARNING),
    )


def strengths() -> tuple[Measure, ...]:
    """ES-exact and ES-perturb, of the questions and of their paraphrases (Wang et al., 2025)."""
    return tuple(
        Measure(f"{name}_ES_{kind}", "extraction_strength", name + which, {"variant": "suffix"}, source="Wang et al.")
        for name in ("forget", "retain")
        for kind, which in (("exact", ""), ("perturb", ":paraphrased"))
    )


def judged() -> tuple[Measure, ...]:
    names = ("naturalness", "similarity")
    return tuple(Measure(f"forget_{name}", name, source="arXiv:2510.19422") for name in names)


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
MIA = Measure(
    "forget_MIA", "text_min_k", "forget", {"k": 0.4}, "auc_forgotten", ("real_authors", "world_facts"), "SOUL"
)
UC = ("forget_UA", "forget_MIA", "forget_RR")
UT = [f"{prefix}_{name}" for prefix in PREFIXES for name in ("Acc", "RR")]
MIN_K = attack("mia_min_k", "min_k", "MUSE", k=0.4, variant="suffix")
GIBBERISH = Measure("forget_Q_A_gibberish", "clean", "forget", {"max_length": 32}, source=OPEN_UNLEARNING)
FLUENCY = Measure("forget_fluency", "fluency")
COUNTED = f"{OURS}, fluency by counting instead of a classifier"


def by_fluency(name: str, source: str, *others: str) -> Aggregate:
    """A harmonic mean of other numbers; and of fluency, or of what is made of it: P(clean) of a classifier where one
    was given, else what is counted offline, which is told."""

    def combine(log: Log, logs: Logs) -> Outcome:
        judged = GIBBERISH.name in log and log[GIBBERISH.name].value is not None
        names = [(GIBBERISH if judged else FLUENCY).name if each == FLUENCY.name else each for each in others]
        found = combined(harmonic, *names)(log, logs)
        return found if judged else replace(found, variant=COUNTED)

    return Aggregate(name, combine, source)


def ends(mem: str, util: str) -> tuple[Aggregate, ...]:
    """Mem, Util and Agg. mem, util: whose the first is, and the others are with a classifier."""
    return (
        Aggregate("memorization", combined(memorization, *MEM), mem),
        by_fluency("utility", util, "model_utility", FLUENCY.name),
        by_fluency("agg", util, "memorization", "utility"),
    )


TOFU_SUITES = (
    Suite(
        "tofu",
        "TOFU (Maini et al., 2024): model utility and forget quality, of the first 300 rows of each set",
        (*tofu("TOFU", 0.0), Measure("extraction_strength", "extraction_strength", source="Carlini et al."), MIN_K),
        (MODEL_UTILITY, FORGET_QUALITY, leak("privleak", 0.0, source="MUSE")),
        rows=300,
    ),
    Suite(
        "open_unlearning",
        "TOFU as OpenUnlearning (Dorna et al., 2025) has it: all rows, memorization, utility and privacy",
        (
            *tofu(OPEN_UNLEARNING, 1e-10),
            Measure("forget_Q_A_PERT_Prob", "perturbed_probability", source=OPEN_UNLEARNING),
            *memorised("open_unlearning", OPEN_UNLEARNING, OPEN_UNLEARNING),
            *attacks("open_unlearning"),
            GIBBERISH,
            FLUENCY,
        ),
        (
            MODEL_UTILITY,
            FORGET_QUALITY,
            leak("privleak", 1e-10),
            PRIVACY,
            *ends(OPEN_UNLEARNING, OPEN_UNLEARNING),
        ),
        prompts=OF_OPEN_UNLEARNING,
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
        "arXiv:2504.06658 on TOFU: UA, MIA and RR, and their mean UC; of what is kept, accuracy, ROUGE-L, and UT",
        (
            Measure("forget_UA", "nearest_answer", "forget:paraphrased", {}, "complement", source="SOUL"),
            MIA,
            Measure("forget_RR", "rouge_l", "forget", {}, "complement", source="SOUL"),
            *(Measure(f"{prefix}_RR", "rouge_l", name, source="SOUL") for prefix, name in PREFIXES.items()),
            Measure("retain_Acc", "nearest_answer", "retain:paraphrased", source="SOUL"),
            *(Measure(f"{p}_Acc", "answer_accuracy", PREFIXES[p], source="SOUL") for p in ("ra", "wf")),
            # Both below their means before unlearning is where the paper stops (Appendix C.4).
            Measure("forget_EL", "extraction_likelihood", source="Jang et al."),
            Measure("forget_MA", "memorization_accuracy", source="Tirumala et al."),
        ),
        tuple(Aggregate(name, combined(middle, *of), "MRD") for name, of in (("UC", UC), ("UT", UT))),
    ),
    Suite(
        "g_effect_paper",
        "Wang et al. (2025), Rethinking LLM Unlearning Objectives, on TOFU: ES exact and perturbed, FQ and MU",
        (*strengths(), *tofu("TOFU", 0.0)),
        (MODEL_UTILITY, FORGET_QUALITY),
    ),
    Suite(
        "tutorial",
        "What to tell of any method: ES exact and perturbed, Mem, Util and Agg, forget quality, what a judge says",
        (
            *strengths(),
            *memorised("suffix", "Wang et al.", "Tirumala et al."),
            *tofu("TOFU", 0.0),
            GIBBERISH,
            FLUENCY,
            *judged(),
        ),
        (MODEL_UTILITY, FORGET_QUALITY, *ends(f"{OURS}, ES and EM to the last token", f"{OURS}, by a classifier")),
    ),
)
