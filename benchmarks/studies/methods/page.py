"""The page of one world: a table of all methods, and which of the papers' conclusions hold here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyunlearn.metrics import Interval

from ...measure import machine
from ..closer_look.page import ABOUT, table, told_training
from .numbers import BEFORE, BY_NAME, CRU, GROUPS, NUMBERS, RETRAINED, UWC, Study

TRICKED, TS, LS = ("ga_kl", "npo_kl"), "-temperature-2", "-keep-0.8"  # as grid:embedded calls them
ARROWS = {1: "↑", -1: "↓"}
KEPT, OVER_REFUSED, BABBLE, GONE = 0.9, 0.05, 0.2, 0.5
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


@dataclass(frozen=True)
class Claim:
    """What a paper concludes. of: the recipes it is about; holds: whether it does here, and by which numbers."""

    text: str
    of: tuple[str, ...]
    holds: Callable[..., tuple[bool, str]]  # of the study and the methods of these recipes


def value(study: Study, name: str, model: str) -> float:
    return BY_NAME[name].get(study, model).mean


def told(study: Study, name: str, *models: str) -> str:
    return f"{name}: " + ", ".join(f"{model} {text(BY_NAME[name].get(study, model))}" for model in models)


def keeps_utility(study: Study, me: str) -> tuple[bool, str]:
    kept = value(study, "model utility", me) >= KEPT * value(study, "model utility", BEFORE)
    forgets = value(study, "forget efficacy", me) > value(study, "forget efficacy", BEFORE)
    both = (told(study, name, BEFORE, me, RETRAINED) for name in ("model utility", "forget efficacy"))
    return kept and forgets, "; ".join(both)


def refuses_little(study: Study, ap: str, gd: str) -> tuple[bool, str]:
    share = {name: study.over_seeds(study.refused[name]) for name in (ap, gd)}
    numbers = ", ".join(f"{name} {text(own)}" for name, own in share.items())
    return share[ap].mean <= OVER_REFUSED, f"held-out questions refused: {numbers}"


def collapses(study: Study, ga: str) -> tuple[bool, str]:
    lost = value(study, "held-out probability", ga) < (1 - KEPT) * value(study, "held-out probability", BEFORE)
    both = (told(study, name, BEFORE, ga) for name in ("forget fluency", "held-out probability"))
    return value(study, "forget fluency", ga) < BABBLE and lost, "; ".join(both)


def weights_win(study: Study, *methods: str) -> tuple[bool, str]:
    order = BY_NAME["mean of both"].order(study, methods)
    newer = max(order.index(name) for name in methods[:3])
    return newer < min(order.index(name) for name in methods[3:]), told(study, "mean of both", *order)


def steadiest(study: Study) -> tuple[bool, str]:
    """By the smallest r over attacks and sets."""
    least: dict[str, float] = {}
    for row in study.reliability:
        r = -1.0 if row["r"] is None else row["r"]
        least[row["metric"]] = min(r, least.get(row["metric"], 1.0))
    order = sorted(least, key=least.__getitem__, reverse=True)
    return order[0] == "extraction_strength", "the least r: " + ", ".join(f"{n} {least[n]:.2f}" for n in order)


def does_not_remove(study: Study, po: str) -> tuple[bool, str]:
    name = "forget extraction strength"
    left = value(study, name, po) >= GONE * value(study, name, BEFORE)
    return left, told(study, name, BEFORE, po, RETRAINED)


def curbs_rephrasing(study: Study, bst: str, npo: str) -> tuple[bool, str]:
    names = ("forget paraphrase probability", "model utility")
    left, kept = ([value(study, name, method) for method in (bst, npo)] for name in names)
    return left[0] < left[1] and kept[0] >= kept[1], "; ".join(told(study, name, bst, npo) for name in names)


def layers_win(study: Study, *plain: str) -> tuple[bool, str]:
    """Of both groups: CRU is above all that it is held against."""
    orders = [BY_NAME["mean of both"].order(study, group(study, name)) for name in plain]
    first = [order[0] == name + CRU for name, order in zip(plain, orders, strict=True)]
    return all(first), "; ".join(told(study, "mean of both", *order) for order in orders)


def group(study: Study, plain: str) -> list[str]:
    own = [plain, *(name for name in GROUPS[plain] if name in study.methods)]
    return own + ([plain + CRU] if plain in study.layered else [])


def trick_helps(study: Study, *methods: str) -> tuple[bool, str]:
    """The first half of the methods with the trick, the others without."""
    name, half = "mean of both", len(methods) // 2
    pairs = [*zip(methods[:half], methods[half:], strict=True)]
    helps = all(value(study, name, tricked) > value(study, name, plain) for tricked, plain in pairs)
    return helps, told(study, name, *(each for pair in pairs for each in pair))


def trick_does_not_help(study: Study, *methods: str) -> tuple[bool, str]:
    helps, numbers = trick_helps(study, *methods)
    return not helps, numbers


CLAIMS = (
    Claim("ME+GD forgets, and keeps 90 % of utility (Yuan et al., Section 5)", ("me_gd",), keeps_utility),
    Claim("IDK+AP refuses at most 5 % of held-out questions (Yuan et al., Section 4)", ("idk_ap", "idk_gd"),
          refuses_little),
    Claim("GA collapses: neither language nor knowledge is left (both papers)", ("ga",), collapses),
    Claim("WGA, TNPO and WTNPO are above GA and NPO, all with KL (Wang et al., Table 1)",
          ("wga_kl", "tnpo_kl", "wtnpo_kl", "ga_kl", "npo_kl"), weights_win),
    Claim("PO does not remove: half of the extraction strength is left (Wang et al., Table 1)", ("idk_gd",),
          does_not_remove),
    Claim("Temperature scaling helps, by 2 (Wang et al., UWC)", (*(f"{name}{TS}" for name in TRICKED), *TRICKED),
          trick_helps),
    Claim("Likelihood selection, of 0.8 of the tokens, does not (Wang et al., UWC)",
          (*(f"{name}{LS}" for name in TRICKED), *TRICKED), trick_does_not_help),
    Claim("CRU of NPO and of GA trades better than what each is held against (the tutorial's main result)",
          tuple(GROUPS), layers_win),
    Claim("Of all metrics, extraction strength says most surely the same after every attack (Wang et al., UWC)",
          (), steadiest),
    Claim("BS-T leaves less of rephrased answers than NPO, at no less utility (LLM Beliefs, Section 5)", ("bst", "npo"),
          curbs_rephrasing),
)  # fmt: skip


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


def claims(study: Study) -> list[str]:
    lines = []
    for claim in CLAIMS:
        found = [method_of(study, name) for name in claim.of]
        if None not in found and (found or study.reliability):
            holds, why = claim.holds(study, *found)
            lines.append(f"**{'Holds' if holds else 'Does not hold'}.** {claim.text}. {why}.")
    return lines or ["None of the methods that they are about is here."]


def method_of(study: Study, recipe: str) -> str | None:
    """The first of a recipe, as it is or with options."""
    if recipe in study.methods:
        return recipe
    return next((name for name in study.methods if name.startswith(f"{recipe}-")), None)


def text(interval: Interval) -> str:
    bounds = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.mean:.3f}{bounds}"


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
