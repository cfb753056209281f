"""The page of one world: its numbers, and what a single one of them hides, said from the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pyunlearn.metrics import Interval
from pyunlearn.runs import RunConfig

from ...measure import machine
from .cells import METHODS, MODELS, Start
from .numbers import BY_NAME, EFFICACY, LEVEL, SINGLES, UTILITY, World

NAMES = {
    "probability": "probability",
    "rouge_l": "ROUGE-L",
    "truth_ratio": "truth ratio",
    "token_entropy": "token entropy",
    "fluency": "fluency",
    "memorization_accuracy": "exact memorisation",
    "extraction_strength": "extraction strength",
    "paraphrase_probability": "paraphrase probability",
    "cosine_similarity": "cosine similarity",
}
FEW = 30  # rows of a set, about which the page warns
SETS = {"forget": "Forget set", "holdout": "Held-out rows", "retain": "Retain rows"}
ABOUT = {
    "embedded": "The embedded world: a Llama of 1.3 million parameters that has learnt made-up authors by heart, and "
    "to refuse questions about unknown ones.",
    "smollm2_tofu": "SmolLM2-135M-Instruct (from a Q4_1 GGUF file, in float32), which has first learnt rows of TOFU: "
    "some of forget01_perturbed to forget, some of retain_perturbed to keep.",
}
PAGE = """# A closer look: {name}

After Yuan et al., *A Closer Look at Machine Unlearning for Large Language Models* (arXiv:2410.08109): methods that one
number calls good or bad, under all of them.

{about}

`before` has learnt all rows; `retrained` was trained in the same way without the forget set, and is what unlearning
should come near to. GA and NPO have no retain term, ME+GD and IDK+AP are the paper's pairs; all else is alike:
{training}.
{rows}.
The held-out rows were memorised, and kept out of the unlearning. Answers are greedy, at most {tokens} tokens.

In brackets: {level} bootstrap intervals of the mean over such samples, of all seeds together. They do not hold the
chance of another training{seeds}. *Truth ratio* is 1 - min(r, 1/r) in the forget table and max(0, 1 - r) in the others,
r TOFU's (geometric); *fluency* the share of texts that are language by counting alone (`pyunlearn.metrics.fluency`);
{similarity}. Nothing here needs a network; the paper's entailment is left out.

    python -m benchmarks.studies.closer_look {name}

{machine}, one thread, with other work beside it: {seconds}.

## What a single number hides

{findings}

## One number at a time

*Forget efficacy*: 1 - mean of {efficacy} on the forget set. *Model utility*: harmonic mean of {utility} on retain and
held-out rows. *Mem*: harmonic mean of 1 - extraction strength, exact memorisation, paraphrase probability, truth ratio
(as p / (p + p_wrong)). *Forget quality*: ln p of the KS test of truth ratios against the retrained model's.
*Distance to retrained*: mean over the forget set's metrics of the distance of means.

{singles}

Ranks of the methods under each, 1 the best (arrow: what is better); equal to the third digit, equal ranks:

{ranks}

{tables}

## What is said to the first forgotten questions{of_seed}

{answers}
"""


def told_if_few(counts: Mapping[str, int]) -> str:
    few = min(counts.values())
    return (
        f". Sets of {few} rows say little: mind the intervals, and ln p is never small for so few" if few < FEW else ""
    )


def page(world: World, start: Start) -> str:
    """start: of the first seed."""
    config, data = start.config, start.job.data
    several = len(world.cells["before"]) > 1
    counts = {name: len(values["probability"]) for name, values in world.cells["before"][0].values.items()}
    trained = f"{len(data.forget)} forget and {len(data.retain)} retain rows, {len(data.holdout)} held out"
    measured = ", ".join(f"{count} {name}" for name, count in counts.items())
    with_similarity = "cosine_similarity" in world.metrics
    similarity = f"*cosine similarity* that of sentence embeddings ({start.embedder}) of the text and the true answer"
    return PAGE.format(
        name=world.name,
        about=ABOUT[world.name],
        training=told_training(config),
        rows=f"{trained}; measured: {measured}{' rows a seed' if several else ' rows'}{told_if_few(counts)}",
        tokens=config.evaluate.max_new_tokens,
        level=f"{LEVEL:.0%}",
        seeds=f"; {len(world.cells['before'])} seeds (a world and a model each)" if several else "; one seed",
        similarity=similarity if with_similarity else "*cosine similarity* is missing: there was no embedder",
        machine=machine()["name"],
        seconds=told_seconds(world),
        findings="\n".join(f"- {finding}" for finding in findings(world)),
        efficacy=listed(NAMES[metric] for metric in EFFICACY if metric in world.metrics),
        utility=listed(NAMES[metric] for metric in UTILITY if metric in world.metrics),
        singles=singles(world),
        ranks=ranks(world),
        tables="\n\n".join(f"## {title}\n\n{means(world, name)}" for name, title in SETS.items()),
        of_seed=", seed 0" if several else "",
        answers=answers(world),
    )


def told_training(config: RunConfig) -> str:
    own, learnt = config.unlearn, config.memorise
    assert learnt is not None
    return (
        f"{own.epochs:g} epochs in batches of {own.batch_size}, AdamW, learning rate {own.learning_rate:g} after "
        f"{own.warmup:.0%} of warm-up, linearly down to 0 (memorised: {learnt.epochs:g} epochs, batches of "
        f"{learnt.batch_size}, {learnt.learning_rate:g})"
    )


def told_seconds(world: World) -> str:
    cells = [cell.seconds for own in world.cells.values() for cell in own]
    training, measuring = (sum(each[key] for each in cells) / 60 for key in ("training", "measuring"))
    return f"{training:.0f} minutes of training and {measuring:.0f} of measuring for the {len(cells)} cells"


# ---- findings --------------------------------------------------------------------------------------------------------


def findings(world: World) -> list[str]:
    """Sentences of this world's figures; which methods they name is decided by the numbers."""

    def told(model: str, name: str, metric: str) -> str:
        return text(world.mean(model, name, metric))

    lowest = min(METHODS, key=lambda model: world.mean(model, "forget", "probability").mean)
    found = [
        "**A low forget probability is not forgetting.** "
        f"{lowest} has the lowest, {told(lowest, 'forget', 'probability')}. Of what it says to those questions "
        f"{told(lowest, 'forget', 'fluency')} is language, and the held-out answers, which it should still know, have "
        f"{told(lowest, 'holdout', 'probability')} (before: "
        f"{told('before', 'holdout', 'probability')}); its model utility is {text(world.utility(lowest))}, before "
        f"{text(world.utility('before'))}."
    ]
    never = world.mean("retrained", "forget", "probability")
    below = [model for model in METHODS if disjoint(world.mean(model, "forget", "probability"), never) < 0]
    found.append(
        f"**Less than never having known.** A model that never saw the forget set gives its answers {text(never)}. "
        + (f"{listed(below)} {'are' if len(below) > 1 else 'is'} below it, with intervals apart: " if below else "")
        + (
            "lower is then not more forgotten, it is a trace of what was forgotten."
            if below
            else "No method is below it with intervals apart."
        )
    )
    said = min(METHODS, key=lambda model: world.mean(model, "forget", "rouge_l").mean)
    inside = max(METHODS, key=lambda model: world.mean(model, "forget", "probability").mean)
    found.append(
        f"**What is said is not what is known.** By ROUGE-L of the written answers {said} forgot most "
        f"({told(said, 'forget', 'rouge_l')}). {inside} writes {told(inside, 'forget', 'rouge_l')} of the answers' "
        f"words, and given the answer token by token it still has {told(inside, 'forget', 'probability')} of "
        f"probability, "
        f"{told(inside, 'forget', 'memorization_accuracy')} of the tokens and extraction strength "
        f"{told(inside, 'forget', 'extraction_strength')}; retrained: {told('retrained', 'forget', 'probability')}, "
        f"{told('retrained', 'forget', 'memorization_accuracy')}, {told('retrained', 'forget', 'extraction_strength')}."
    )
    efficacy, utility, both = (
        BY_NAME[name] for name in ("forget efficacy", "model utility", "mean of efficacy and utility")
    )
    first = efficacy.best(world)
    found.append(
        f"**Efficacy and utility.** Forget efficacy ranks {order(efficacy.ranks(world))}, model utility "
        f"{order(utility.ranks(world))}, their mean {order(both.ranks(world))}. {first}, first by efficacy "
        f"({text(world.efficacy(first))}), has utility {text(world.utility(first))}; a model that says nothing any "
        "more has perfect efficacy."
    )
    quality, fluency = BY_NAME["forget quality, ln p"], BY_NAME["forget fluency"]
    best = quality.best(world)
    found.append(
        f"**Forget quality.** Its truth ratios are nearest to the retrained model's with {best} (ln p = "
        f"{quality.of(world, best):.1f}; before {quality.of(world, 'before'):.1f}); of what {best} says to the "
        f"forgotten questions {told(best, 'forget', 'fluency')} is language (retrained: "
        f"{told('retrained', 'forget', 'fluency')}). "
        f"By fluency the order is {order(fluency.ranks(world))}."
    )
    gaps = {model: gap(world, model) for model in METHODS}
    widest = max(gaps, key=lambda model: gaps[model])
    found.append(
        f"**Rehearsed rows flatter.** {widest} keeps {told(widest, 'retain', 'probability')} on the retain rows and "
        f"{told(widest, 'holdout', 'probability')} on held-out ones, which it never rehearsed (before: "
        f"{told('before', 'retain', 'probability')} and {told('before', 'holdout', 'probability')})."
    )
    changes = [single.best(world) for single in SINGLES]
    tally = {model: changes.count(model) for model in METHODS if model in changes}
    found.append(
        f"**The winner depends on the number.** Over the {len(SINGLES)} numbers below "
        + listed(f"{model} is first under {count}" for model, count in tally.items())
        + f". Not told apart by forget efficacy (intervals overlap): {overlapping(world)}."
    )
    return found


def gap(world: World, model: str) -> float:
    return world.mean(model, "retain", "probability").mean - world.mean(model, "holdout", "probability").mean


def overlapping(world: World) -> str:
    pairs = [(a, b) for a in METHODS for b in METHODS if a < b]
    same = [f"{a} and {b}" for a, b in pairs if not disjoint(world.efficacy(a), world.efficacy(b))]
    return ", ".join(same) or "none"


def disjoint(one: Interval, other: Interval) -> int:
    """-1 where one's interval is below the other's, +1 above, 0 where they meet or one has none."""
    bounds = (one.low, one.high, other.low, other.high)
    if None in bounds:
        return 0
    low, high, other_low, other_high = (float(bound) for bound in bounds if bound is not None)
    return -1 if high < other_low else int(low > other_high)


def order(ranks: dict[str, int]) -> str:
    """`A, B = C, D`, the best first."""
    places = sorted(set(ranks.values()))
    return ", ".join(" = ".join(name for name in ranks if ranks[name] == place) for place in places)


# ---- tables ----------------------------------------------------------------------------------------------------------


def text(interval: Interval) -> str:
    """`0.123 [0.110, 0.140]`."""
    bounds = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.mean:.3f}{bounds}"


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(world: World, name: str) -> str:
    rows = [[model, *(text(world.mean(model, name, metric)) for metric in world.metrics)] for model in MODELS]
    return table(["", *(NAMES[metric] for metric in world.metrics)], rows)


def singles(world: World) -> str:
    """Efficacy and utility with their intervals, and how far the seeds are apart."""
    intervals = {"forget efficacy": world.efficacy, "model utility": world.utility}
    seeds = range(len(world.cells["before"]))

    def cell(name: str, model: str) -> str:
        if name not in intervals:
            return f"{BY_NAME[name].of(world, model):.3f}"
        own = [intervals[name](model, seed).mean for seed in seeds]
        spread = f"; seeds {min(own):.3f} to {max(own):.3f}" if len(own) > 1 else ""
        return text(intervals[name](model)) + spread

    rows = [[model, *(cell(single.name, model) for single in SINGLES)] for model in MODELS]
    return table(["", *(single.name for single in SINGLES)], rows)


def ranks(world: World) -> str:
    rows = []
    for single in SINGLES:
        own = single.ranks(world)
        rows.append([f"{single.name} {'↑' if single.better > 0 else '↓'}", *(str(own[model]) for model in METHODS)])
    return table(["", *METHODS], rows)


def answers(world: World) -> str:
    def shortened(said: str, longest: int = 90) -> str:
        plain = " ".join(said.replace("|", "\\|").split())
        return plain if len(plain) <= longest else f"{plain[:longest]}..."

    rows = [[model, *map(shortened, world.cells[model][0].said)] for model in MODELS]
    return table(["", *world.asked], rows, align="---")
