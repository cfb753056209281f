"""Did the run forget, what did it cost, and can that be trusted: goals that were met or missed, and one verdict.

A low probability of the true answers is not forgetting yet. A model may say the same in other words; it may have lost
what it should have kept; or it may have lost its language, and says nothing at all any more (arXiv:2410.08109).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .sections import GoalConfig

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value
NOTHING = "there was nothing to forget"
KNOWS = "still knows"
REWORDS = "still knows (says it in other words)"
LOST = "lost utility"
COLLAPSED = "forgot by collapsing"
CLEAN = "forgot cleanly"
UNSURE = "forgot; whether cleanly was not measured"
FEW = 10  # rows, on which a mean says little
ADVICE = {
    NOTHING: "train on the forget set first (memorise), or choose a model that knows it",
    KNOWS: "more steps or a higher learning rate: --set unlearn.epochs=..., --set unlearn.learning_rate=...",
    REWORDS: "more steps, or an objective that lowers all that is said of it: --set unlearn.forget=npo",
    LOST: "a lower learning rate, or more weight on what to keep: --set unlearn.retain.0.coefficient=...",
    COLLAPSED: "give it something to say instead, --set 'unlearn.forget=[idk, dpo]', or a lower learning rate",
    CLEAN: "see whether it holds for other seeds (--set seed=1), and beside other runs (pyunlearn compare)",
    UNSURE: "add fluency and rouge_l to evaluate.metrics",
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


def utility_set(means: Summaries) -> str:
    """Whose answers have to stay: rows held out, where there are any, since those that were trained on flatter."""
    return "holdout" if "holdout" in means else "retain"


def check_goals(
    before: Summaries, after: Summaries, goal: GoalConfig, rows: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """What the run had to reach: {"name", "text", "value", "met"} for each goal that was measured.

    rows: how many each set has; the text tells where they are fewer than FEW.
    """
    kept = utility_set(before)
    forget_before, forget = before["forget"]["probability"], after["forget"]["probability"]
    retain_before, retain = before[kept]["probability"], after[kept]["probability"]
    share, limit = retain / max(retain_before, 1e-12), goal.forget_probability_below
    nothing = f"; {NOTHING}" if forget_before < limit else ""
    rehearsed = "retain probability, of rows that the unlearning itself may rehearse,"
    whose = "retain probability of held-out rows" if kept == "holdout" else rehearsed
    few = {name: f"; of {n} rows only, too few to tell much" for name, n in (rows or {}).items() if n < FEW}
    goals = [
        {
            "name": "forget",
            "text": f"forget probability {forget_before:.3f} -> {forget:.3f}, wanted below {limit:g}{nothing}"
            f"{few.get('forget', '')}",
            "value": forget,
            "met": forget < limit <= forget_before,
        },
        {
            "name": "retain",
            "text": f"{whose} {retain_before:.3f} -> {retain:.3f}, {share:.1%} of before, wanted at least "
            f"{goal.retain_probability_kept:.0%}{few.get(kept, '')}",
            "value": share,
            "met": share >= goal.retain_probability_kept,
        },
    ]
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
        wrongs = {"forget": KNOWS, "words": REWORDS, "retain": LOST, "fluency": COLLAPSED}
        missed = [each for each in wrongs if each in by_name and not by_name[each]["met"]]
        unmeasured = [each for each in ("words", "fluency") if each not in by_name]
        if missed:
            name, reason = wrongs[missed[0]], by_name[missed[0]]["text"]
        elif unmeasured:
            name, reason = (
                UNSURE,
                "no answers were looked at: "
                + " and ".join({"words": "rouge_l", "fluency": "fluency"}[each] for each in unmeasured),
            )
        else:
            name, reason = CLEAN, by_name["fluency"]["text"]
    return Verdict(name, name == CLEAN, reason, ADVICE[name])
