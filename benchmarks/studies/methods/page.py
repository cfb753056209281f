"""The page of one world: a table of all methods, and what the papers conclude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyunlearn.metrics import Interval

from ...measure import machine
from ..closer_look.page import ABOUT, table, told_training
from .claims import claims, group, text
from .numbers import BEFORE, BY_NAME, CRU, GROUPS, NUMBERS, UWC, Study

ARROWS = {1: "↑", -1: "↓"}
PAGE = """# Every method: {name}

{about}

`before` has learnt all rows; `retrained` was trained in the same way without the forget set. Methods are recipes
(`pyunlearn recipes`), all else is alike: {training}. The held-out rows were memorised, and no unlearning has seen them.
{intervals}

*Forget efficacy*: 1 - mean of probability, ROUGE-L and truth ratio on the forget set. *Model utility*: harmonic mean of
these and token entropy on retain and held-out rows. *Forget quality*: ln p of the KS test of truth ratios against the
retrained model's. *Fluency*: the share of texts that are language by counting alone (`pyunlearn.metrics.fluency`).
*{uwc}*: the mixture with the model before that keeps 95 % of its extraction strength on held-out rows, by
`pyunlearn calibrate uwc`, where that is another model. *{cru}*: the layers of the unlearned model that forget at little
cost, in the model before, by `pyunlearn calibrate cru` on a fifth of the rows, which are among those counted here.

    python -m benchmarks.studies.methods {name}

{machine}

## What the papers conclude, here

Methods are compared by their differences seed by seed, with the interval of that.

{claims}

Which share of the held-out questions is refused, word for word: {refused}.

How much of its unlearning each method may keep (a of UWC, the mean over seeds): {mixed}.

What CRU takes from the unlearned model{by_seed}: {layered}.

## In the form of the tutorial's table

{groups}

## Which metrics say the same after an attack

{reliability}

## All numbers

{numbers}

## What is said to the first forgotten questions{of_seed}

{answers}
"""


def page(study: Study, name: str) -> str:
    seeds = len(study.worlds)
    over = (
        f"In brackets: 95 % intervals of the mean over {seeds} seeds (Student's t), a world and a model each."
        if seeds > 1
        else "In brackets: 95 % bootstrap intervals over such samples, where a number has one. One seed: they do not "
        "hold the chance of another training."
    )
    refused = {method: study.over_seeds(own) for method, own in study.refused.items()}
    return PAGE.format(
        name=name,
        about=ABOUT[name],
        training=told_training(study.config),
        intervals=over,
        machine=machine()["name"],
        claims="\n".join(f"- {each}" for each in claims(study)),
        uwc=UWC.strip(),
        mixed=", ".join(f"{method} {study.over_seeds(own).mean:.2f}" for method, own in study.mixed.items()) or "none",
        cru=CRU.strip(),
        by_seed=", seed by seed" if seeds > 1 else "",
        layered="; ".join(f"{method}: {' / '.join(own)}" for method, own in study.layered.items()) or "nothing",
        reliability=reliability(study),
        groups=groups(study),
        refused=", ".join(f"{method} {text(own)}" for method, own in refused.items() if own.mean > 0) or "none by any",
        numbers=numbers(study),
        of_seed=f", seed {study.config.seed}" if seeds > 1 else "",
        answers=answers(study),
    )


def numbers(study: Study) -> str:
    head = ["", *(f"{number.name} {ARROWS[number.better]}" for number in NUMBERS)]
    rows = [[model, *(text(number.get(study, model)) for number in NUMBERS)] for model in study.models]
    return table(head, rows)


def groups(study: Study) -> str:
    """What CRU is made of, and what it is held against."""
    columns = [BY_NAME[name] for name in ("held-out extraction strength", "forget extraction strength", "model utility",
                                          "forget quality, ln p", "mean of both")]  # fmt: skip
    head = ["", *(f"{number.name} {ARROWS[number.better]}" for number in columns)]
    tables = [
        table(head, [[model, *(text(each.get(study, model)) for each in columns)] for model in [BEFORE, *own]])
        for own in (group(study, name) for name in GROUPS if name in study.methods)
    ]
    return "\n\n".join(tables) or "What CRU starts from is not among the methods here."


def reliability(study: Study) -> str:
    """A row a metric, its r of forget and of retain rows by attack."""
    if not study.reliability:
        return "Not measured: no attacks were asked for, or there are fewer than three models of the first seed."
    cells = {(row["metric"], row["set"], row["attack"]): row for row in study.reliability}
    attacks = [*dict.fromkeys(attack for _, _, attack in cells)]
    rows = [
        [f"{metric.replace('_', ' ')}, {which}", *(correlation(cells[metric, which, attack]) for attack in attacks)]
        for metric, which in dict.fromkeys((metric, which) for metric, which, _ in cells)
    ]
    count = max(row["count"] for row in study.reliability)
    about = (
        f"Pearson's r of a metric's means over the {count} models of the first seed before and after an attack, with "
        "Fisher's 95 % interval (`pyunlearn reliability`): near 1, a metric tells what a model knows, and not what it "
        "happens to say."
    )
    return f"{about}\n\n{table(['', *attacks], rows)}"


def correlation(row: Mapping[str, Any]) -> str:
    return "–" if row["r"] is None else text(Interval(row["r"], row["low"], row["high"], row["count"]))


def answers(study: Study) -> str:
    def shortened(said: str, longest: int = 90) -> str:
        plain = " ".join(said.replace("|", "\\|").split())
        return plain if len(plain) <= longest else f"{plain[:longest]}..."

    first = study.worlds[0]
    rows = [[model, *map(shortened, first.cells[model][0].said)] for model in study.models]
    return table(["", *first.asked], rows, align="---")
