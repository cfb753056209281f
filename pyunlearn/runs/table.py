"""A run's outcome: every metric before and after, and whether the goals were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import GoalConfig

Summaries = Mapping[str, Mapping[str, float]]  # set name -> metric -> value


def make_table(before: Summaries, after: Summaries) -> list[dict[str, Any]]:
    """One row per set and metric: {"set", "metric", "before", "after", "change"}."""
    return [
        {"set": name, "metric": metric, "before": value, "after": after[name][metric],
         "change": after[name][metric] - value}
        for name, values in before.items()
        for metric, value in values.items()
        if metric in after.get(name, {})
    ]  # fmt: skip


def table_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| set | metric | before | after | change |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {row['set']} | {row['metric']} | {row['before']:.4f} | {row['after']:.4f} | {row['change']:+.4f} |"
        for row in table
    ]
    return "\n".join(lines) + "\n"


def check_goal(before: Summaries, after: Summaries, goal: GoalConfig) -> list[dict[str, Any]]:
    """What the run had to reach: {"text", "value", "met"} for the forget and the retain probability."""
    (forget_before, forget), (retain_before, retain) = (
        (before[name]["probability"], after[name]["probability"]) for name in ("forget", "retain")
    )
    share, limit = retain / max(retain_before, 1e-12), goal.forget_probability_below
    nothing = "; there was nothing to forget" if forget_before < limit else ""
    return [
        {
            "text": f"forget probability {forget_before:.3f} -> {forget:.3f}, wanted below {limit:g}{nothing}",
            "value": forget,
            "met": forget < limit <= forget_before,
        },
        {
            "text": f"retain probability {retain_before:.3f} -> {retain:.3f}, {share:.1%} of before, wanted at least "
            f"{goal.retain_probability_kept:.0%}",
            "value": share,
            "met": share >= goal.retain_probability_kept,
        },
    ]
