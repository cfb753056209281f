"""What to change after a run, read from its verdict: settings of the same command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from .config import RunConfig
from .request import RECIPE
from .verdict import CLEAN, COLLAPSED, KNOWS, LOST, NOTHING, REWORDS, UNSURE

FASTER, LONGER, HEAVIER = 3, 2, 3  # times the rate, the epochs, the coefficient


def next_changes(verdict: str, config: RunConfig, rate: float, kept: float | None = None) -> list[str]:
    """Overrides, `key=value`, that go against what was wrong. rate: the learning rate that was taken. kept: share of
    the forget probability that is left."""
    unlearn = config.unlearn
    names = [term.name for term in unlearn.forget]
    longer = (
        f"unlearn.epochs={LONGER * unlearn.epochs:g}"
        if unlearn.max_steps is None
        else f"unlearn.max_steps={LONGER * unlearn.max_steps}"
    )
    slower = f"unlearn.learning_rate={rate / FASTER:.3g}"
    if not unlearn.trains and unlearn.reinforce is not None:  # there is but its strength
        stronger, weaker = (f"unlearn.reinforce.strength={unlearn.reinforce.strength * by:.3g}" for by in (2, 0.5))
        known = {KNOWS: [stronger], REWORDS: [stronger], COLLAPSED: [weaker], LOST: [weaker]}
        if verdict in known:
            return known[verdict]
    if verdict == NOTHING:
        learnt = config.memorise
        return (
            ["memorise.epochs=5"] if learnt is None else [f"memorise.learning_rate={FASTER * learnt.learning_rate:g}"]
        )
    if verdict == KNOWS:
        far = kept is None or kept > 0.5
        return [f"unlearn.learning_rate={FASTER * rate:.3g}" if far else longer]
    if verdict == REWORDS:
        return ["unlearn.recipe=refuse"] if "idk" not in names else [longer]
    if verdict == COLLAPSED:
        return ["unlearn.recipe=refuse"] if "idk" not in names else [slower]
    if verdict == LOST:
        if not config.has_retain:
            return [slower]
        if not unlearn.retain:
            return ["unlearn.retain=kl"]
        if unlearn.dual is not None:  # moves the coefficient, which begins anywhere
            return [f"unlearn.dual.step={HEAVIER * unlearn.dual.step:g}"]
        heavy = unlearn.retain[0].coefficient >= HEAVIER
        return [slower] if heavy else [f"unlearn.retain.0.coefficient={HEAVIER * unlearn.retain[0].coefficient:g}"]
    if verdict == UNSURE:
        wanted = [name for name in ("rouge_l", "fluency") if name not in config.evaluate.metrics]
        metrics = [f"evaluate.metrics=[{', '.join([*config.evaluate.metrics, *wanted])}]"] if wanted else []
        term = ["unlearn.retain=kl"] if unlearn.trains else []
        return metrics + ([] if config.has_retain else ["data.retain=FILE", *term])
    return [f"seed={config.seed + 1}"] if verdict == CLEAN else []


def next_command(command: str, changes: Sequence[str], output: str) -> str:
    """The command with changes, into another folder."""
    keys = [change.partition("=")[0] for change in changes]
    if "unlearn.recipe" in keys:  # it takes the place of what is set beside it, and of a recipe that is the source
        keys += ["unlearn.forget", "unlearn.retain", "unlearn.dual", "unlearn.reinforce"]
        command = without_option(command, "--recipe")
        words = shlex.split(command)
        if any(word.startswith(RECIPE) for word in words):
            chosen = next(change.partition("=")[2] for change in changes if change.startswith("unlearn.recipe="))
            changes = [change for change in changes if not change.startswith("unlearn.recipe=")]
            command = shlex.join(RECIPE + chosen if word.startswith(RECIPE) else word for word in words)
    for key in (*keys, "output"):
        command = without(command, key)
    words = [word for change in changes for word in ("--set", change)]
    return f"{without_option(command, '--out')} {shlex.join([*words, '--out', output])}"


def without(command: str, key: str) -> str:
    """A command line without its `--set` of `key` and of what is below it."""
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        alone = word in ("--set", "-s")
        setting = next(words, "") if alone else re.sub(r"^(--set=|-s(?=\w))", "", word) if word.startswith("-") else ""
        if not re.match(rf"{re.escape(key)}[.=]", setting):
            kept += [word, setting] if alone else [word]
    return shlex.join(kept)


def without_option(command: str, option: str) -> str:
    """A command line without an option and its value."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return shlex.join(kept)
