"""Did the run forget, what did it cost, and can that be trusted: goals that were met or missed, and one verdict.

A low probability of the true answers is not forgetting yet. A model may say the same in other words; it may have lost
what it should have kept; or it may have lost its language, and says nothing at all any more (arXiv:2410.08109).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..metrics.utility import FEW, utility_set
from .evaluate_config import GoalConfig

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
NOTHING = "there was nothing to forget"
KNOWS = "still knows"
REWORDS = "still knows (says it in other words)"
LOST = "lost utility"
COLLAPSED = "forgot by collapsing"
CLEAN = "forgot cleanly"
UNSURE = "forgot; whether cleanly was not measured"
UNMEASURED = {  # goal -> why it is none
    "retain": "there are no rows to retain, so nobody knows what it cost",
    "words": "rouge_l is not among the metrics, so what the model writes was not read",
    "fluency": "fluency is not among the metrics, so it may have lost its language",
}
ADVICE = {
    NOTHING: "choose a model that knows the forget set, or have it learn that first",
    KNOWS: "a higher learning rate, or more steps",
    REWORDS: "more steps, or an objective that lowers all that is said of it",
    LOST: "more weight on what to keep, or a lower learning rate",
    COLLAPSED: "a method that says something instead, or a lower learning rate",
    CLEAN: "see whether it holds for another seed, and beside other runs (pyunlearn compare)",
    UNSURE: "measure what is missing",
}


@dataclass(frozen=True)
class Verdict:
    """name: one of the module's; clean: whether it is the one to wish for; reason: the numbers that decide it;
    advice: what to try."""

    name: str
    clean: bool
    reason: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_goals(before: Summaries, after: Summaries, goal: GoalConfig, rows: Mapping[str, int]) -> list[dict[str, Any]]:
    """What the run had to reach: {"name", "text", "value", "met"} for each goal that was measured.

    rows: how many each set has, by which `metrics.utility.utility_set` says what has to stay; the text tells where they
    are fewer than FEW.
    """
    forget_before, forget = before["forget"]["probability"], after["forget"]["probability"]
    limit = goal.forget_probability_below
    nothing = f"; {NOTHING}" if forget_before < limit else ""
    few = {
        name: f"; of {n} row{'s' if n > 1 else ''} only, too few to tell much" for name, n in rows.items() if n < FEW
    }
    goals: list[dict[str, Any]] = [
        {
            "name": "forget",
            "text": f"forget probability {forget_before:.3f} -> {forget:.3f}, wanted below {limit:g}{nothing}"
            f"{few.get('forget', '')}",
            "value": forget,
            "met": forget < limit <= forget_before,
        },
    ]
    if (kept := utility_set({name: n for name, n in rows.items() if name in before})) is not None:
        retain_before, retain = before[kept]["probability"], after[kept]["probability"]
        share = retain / max(retain_before, 1e-12)
        rehearsed = "retain probability, of rows that the unlearning itself may rehearse,"
        whose = "retain probability of held-out rows" if kept == "holdout" else rehearsed
        goals.append(
            {
                "name": "retain",
                "text": f"{whose} {retain_before:.3f} -> {retain:.3f}, {share:.1%} of before, wanted at least "
                f"{goal.retain_probability_kept:.0%}{few.get(kept, '')}",
                "value": share,
                "met": share >= goal.retain_probability_kept,
            }
        )
    if "rouge_l" in after["forget"]:
        recall, limit = after["forget"]["rouge_l"], goal.forget_rouge_below
        then = before["forget"]["rouge_l"]
        goals.append(
            {
                "name": "words",
                "text": f"written answers hold {then:.1%} -> {recall:.1%} of the forgotten ones' words (ROUGE-L "
                f"recall), wanted below {limit:.0%}",
                "value": recall,
                "met": recall < limit,
            }
        )
    if "fluency" in after["forget"]:
        fluent, limit, then = after["forget"]["fluency"], goal.fluent_share, before["forget"]["fluency"]
        goals.append(
            {
                "name": "fluency",
                "text": f"fluent answers to forget questions {then:.1%} -> {fluent:.1%}, wanted at least {limit:.0%}",
                "value": fluent,
                "met": fluent >= limit,
            }
        )
    return goals


def reach_verdict(before: Summaries, goal: GoalConfig, goals: list[dict[str, Any]]) -> Verdict:
    """The first thing that is wrong, the gravest first; `goals` as `check_goals` gives them."""
    by_name = {each["name"]: each for each in goals}
    if before["forget"]["probability"] < goal.forget_probability_below:
        name, reason = NOTHING, by_name["forget"]["text"]
    else:
        wrongs = {"forget": KNOWS, "words": REWORDS, "fluency": COLLAPSED, "retain": LOST}
        missed = [each for each in wrongs if each in by_name and not by_name[each]["met"]]
        unmeasured = [each for each in UNMEASURED if each not in by_name]
        if missed:
            name, reason = wrongs[missed[0]], "; ".join(by_name[each]["text"] for each in missed)
        elif unmeasured:
            name, reason = UNSURE, "; ".join(UNMEASURED[each] for each in unmeasured)
        else:
            name, reason = CLEAN, by_name["fluency"]["text"]
    return Verdict(name, name == CLEAN, reason, ADVICE[name])
