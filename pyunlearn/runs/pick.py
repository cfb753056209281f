"""Which of the models on the way a run ends with: early stopping (Towards Effective Evaluations and Comparisons for LLM
Unlearning Methods, ICLR 2025, where it is done by hand)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._files import write_folder
from ..metrics.utility import utility_set
from .evaluate_config import PickConfig
from .table import Summaries


def pick_step(
    before: Summaries, on_the_way: Mapping[int, Summaries], settings: PickConfig, rows: Mapping[str, int]
) -> dict[str, Any]:
    """Of the steps that keep their share of `before` on rows to retain, the one where the least is left of the forget
    set; where none keeps it, the one that keeps the most; of equal ones the first.

    rows: how many each set has, by which `metrics.utility.utility_set` says what is to stay. {"step", "reached":
    whether it keeps its share, "by", "kept", "set": of the rows to retain, "before" and "steps": {"forget", "retain"}
    before and by step; the last is among them}.

    Raises ValueError where nothing was measured by that.
    """
    kept_on = utility_set(rows)
    if kept_on is None:
        raise ValueError("evaluate.pick: needs rows to retain: set data.retain=FILE, or evaluate.pick=null")
    curve = {
        step: {"forget": means["forget"][settings.by], "retain": means[kept_on][settings.by]}
        for step, means in on_the_way.items()
        if settings.by in means["forget"] and settings.by in means[kept_on]
    }
    start = {name: before[own].get(settings.by) for name, own in (("forget", "forget"), ("retain", kept_on))}
    if not curve or start["retain"] is None:
        raise ValueError(f"evaluate.pick: {settings.by} has no finite mean to pick a step by; choose another")
    keeping = [step for step, own in curve.items() if own["retain"] >= settings.kept * start["retain"]]
    if keeping:
        step = min(keeping, key=lambda step: (curve[step]["forget"], step))
    else:
        step = min(curve, key=lambda step: (-curve[step]["retain"], step))
    told = {"step": step, "reached": bool(keeping), "by": settings.by, "kept": settings.kept, "set": kept_on}
    return {**told, "before": start, "steps": {str(each): curve[each] for each in sorted(curve)}}


def told_pick(picked: Mapping[str, Any]) -> str:
    """In one line, with what its numbers are of."""
    step, by, before = picked["step"], picked["by"].replace("_", " "), picked["before"]
    own = picked["steps"][str(step)]
    whose = "held-out rows" if picked["set"] == "holdout" else "retain rows, which the unlearning itself may rehearse,"
    share = own["retain"] / max(before["retain"], 1e-12)
    why = "forgets most of those that keep" if picked["reached"] else "keeps the most, none keeps"
    forget = "-" if before["forget"] is None else f"{before['forget']:.3f}"
    return (
        f"step {step} of {', '.join(picked['steps'])}: it {why} {picked['kept']:.0%} of {by}; forget {forget} -> "
        f"{own['forget']:.3f}, {whose} {before['retain']:.3f} -> {own['retain']:.3f} ({share:.1%})"
    )


def copy_model(source: Path, target: Path) -> None:
    """A model's folder, as it is sealed, in another place: there whole or not at all."""
    write_folder(target, lambda new: shutil.copytree(source, new, dirs_exist_ok=True))
