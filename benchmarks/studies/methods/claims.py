"""Which of the papers' conclusions hold on one world, and by which numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyunlearn.metrics import Interval
from pyunlearn.recipes import names
from pyunlearn.recipes import recipe as settings

from .numbers import BEFORE, BY_NAME, CRU, GROUPS, RETRAINED, Study

TRICKED, TS, LS = ("ga_kl", "npo_kl"), "-temperature-2", "-keep-0.8"  # as grid:embedded calls them
KEPT, OVER_REFUSED, BABBLE, GONE = 0.9, 0.05, 0.2, 0.5
BOTH, STRENGTH = "mean of both", "extraction_strength"
Found = tuple[bool | None, str]  # whether it holds, None where seeds leave that open; and by which numbers
WORDS = {True: "Holds", False: "Does not hold"}
OPEN = "Open, the interval of what decides it includes 0"
ONE_SEED = "Open, of what decides it one seed gives no interval"


@dataclass(frozen=True)
class Claim:
    """What a paper concludes. of: the recipes it is about; holds: of the study and the methods of these recipes."""

    text: str
    of: tuple[str, ...]
    holds: Callable[..., Found]


def value(study: Study, name: str, model: str) -> float:
    return BY_NAME[name].get(study, model).mean


def text(interval: Interval) -> str:
    bounds = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.mean:.3f}{bounds}"


def told(study: Study, name: str, *models: str) -> str:
    return f"{name}: " + ", ".join(f"{model} {text(BY_NAME[name].get(study, model))}" for model in models)


def above(study: Study, name: str, one: str, other: str) -> Found:
    """Whether one model has more than another, by the difference in each seed."""
    number = BY_NAME[name]
    found = study.over_seeds([number.value(world, one) - number.value(world, other) for world in study.worlds])
    numbers = f"{one} - {other} {text(found)}"
    if found.low is None or found.high is None:
        return None, numbers
    return True if found.low > 0 else False if found.high < 0 else None, numbers


def both(*found: bool | None) -> bool | None:
    """Whether all hold."""
    return False if False in found else None if None in found else True


def keeps_utility(study: Study, me: str) -> Found:
    kept = value(study, "model utility", me) >= KEPT * value(study, "model utility", BEFORE)
    forgets = value(study, "forget efficacy", me) > value(study, "forget efficacy", BEFORE)
    numbers = (told(study, name, BEFORE, me, RETRAINED) for name in ("model utility", "forget efficacy"))
    return kept and forgets, "; ".join(numbers)


def refuses_little(study: Study, ap: str, gd: str) -> Found:
    share = {name: study.over_seeds(study.refused[name]) for name in (ap, gd)}
    numbers = ", ".join(f"{name} {text(own)}" for name, own in share.items())
    return share[ap].mean <= OVER_REFUSED, f"held-out questions refused: {numbers}"


def collapses(study: Study, ga: str) -> Found:
    lost = value(study, "held-out probability", ga) < (1 - KEPT) * value(study, "held-out probability", BEFORE)
    numbers = (told(study, name, BEFORE, ga) for name in ("forget fluency", "held-out probability"))
    return value(study, "forget fluency", ga) < BABBLE and lost, "; ".join(numbers)


def weights_win(study: Study, *methods: str) -> Found:
    """The last of the first three, against the first of the others."""
    order = BY_NAME[BOTH].order(study, methods)
    newer, older = ([name for name in order if name in own] for own in (methods[:3], methods[3:]))
    holds, margin = above(study, BOTH, newer[-1], older[0])
    return holds, f"{told(study, BOTH, *order)}; {margin}"


def does_not_remove(study: Study, po: str) -> Found:
    name = "forget extraction strength"
    left = value(study, name, po) >= GONE * value(study, name, BEFORE)
    return left, told(study, name, BEFORE, po, RETRAINED)


def trick_helps(study: Study, *methods: str) -> Found:
    """The first half of the methods with the trick, the others without."""
    half = len(methods) // 2
    found = [above(study, BOTH, *pair) for pair in zip(methods[:half], methods[half:], strict=True)]
    return both(*(helps for helps, _ in found)), f"{BOTH}: {', '.join(margin for _, margin in found)}"


def trick_does_not_help(study: Study, *methods: str) -> Found:
    helps, numbers = trick_helps(study, *methods)
    return None if helps is None else not helps, numbers


def layers_win(study: Study, *plain: str) -> Found:
    """Of both groups: CRU is above all that it is held against."""
    found = []
    for name in plain:
        order = BY_NAME[BOTH].order(study, group(study, name))
        others = [each for each in order if each != name + CRU]
        holds, margin = above(study, BOTH, name + CRU, others[0]) if name + CRU in order else (False, "CRU chose none")
        found.append((holds, f"{told(study, BOTH, *order)}; {margin}"))
    return both(*(holds for holds, _ in found)), "; ".join(numbers for _, numbers in found)


def group(study: Study, plain: str) -> list[str]:
    own = [plain, *(name for name in GROUPS[plain] if name in study.methods)]
    return own + ([plain + CRU] if plain in study.layered else [])


def steadiest(study: Study) -> Found:
    """By the smallest r over attacks and sets."""
    least: dict[str, Interval] = {}
    for row in study.reliability:
        own = Interval(-1.0 if row["r"] is None else row["r"], row["low"], row["high"], row["count"])
        least[row["metric"]] = min(own, least.get(row["metric"], own), key=lambda each: each.mean)
    order = sorted(least, key=lambda metric: least[metric].mean, reverse=True)
    rival = order[1] if order[0] == STRENGTH else order[0]
    one, other = sorted((least[STRENGTH], least[rival]), key=lambda each: each.mean)
    apart = one.high is None or other.low is None or one.high < other.low
    numbers = ", ".join(f"{metric} {text(least[metric])}" for metric in order)
    return (order[0] == STRENGTH if apart else None), f"the least r: {numbers}"


def curbs_rephrasing(study: Study, bst: str, npo: str) -> Found:
    less, first = above(study, "forget paraphrase probability", npo, bst)
    more, second = above(study, "model utility", bst, npo)
    return both(less, more), f"forget paraphrase probability: {first}; model utility: {second}"


CLAIMS = (
    Claim("ME+GD forgets, and keeps 90 % of utility (Yuan et al., Section 5)", ("me_gd",), keeps_utility),
    Claim("IDK+AP refuses at most 5 % of held-out questions (Yuan et al., Section 4)", ("idk_ap", "idk_gd"),
          refuses_little),
    Claim("GA collapses: neither language nor knowledge is left (both papers)", ("ga",), collapses),
    Claim("WGA, TNPO and WTNPO are above GA and NPO, all with KL (Wang et al., Table 1)",
          ("wga_kl", "tnpo_kl", "wtnpo_kl", "ga_kl", "npo_kl"), weights_win),
    Claim("PO does not remove: half of the extraction strength is left (Wang et al., Table 1)", ("po",),
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


def claims(study: Study) -> list[str]:
    lines = []
    for claim in CLAIMS:
        found = [method_of(study, name) for name in claim.of]
        if None not in found and (found or study.reliability):
            holds, why = claim.holds(study, *found)
            word = WORDS[holds] if holds is not None else OPEN if len(study.worlds) > 1 or not found else ONE_SEED
            lines.append(f"**{word}.** {claim.text}. {why}.")
    return lines or ["None of the methods that they are about is here."]


def method_of(study: Study, recipe: str) -> str | None:
    """The first of a recipe, as it is, by the name of another of the same settings (a grid has them once), or with
    options."""
    alike = [name for name in names() if settings(name) == settings(recipe)] if recipe in names() else []
    own = [name for name in (recipe, *alike) if name in study.methods]
    return next(iter([*own, *(name for name in study.methods if name.startswith(f"{recipe}-"))]), None)
