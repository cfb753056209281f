"""Where probability goes that unlearning takes from answers: candidates of high, middle and low likelihood on the way.

    python -m benchmarks.studies.squeezing embedded         the embedded world, a world and a model a seed
    python -m benchmarks.studies.squeezing smollm2_tofu     SmolLM2-135M and TOFU: make model, --tofu FOLDER
    python -m benchmarks.studies.squeezing --toy            a world that takes seconds, to see the form

GA and NPO push an answer down without saying where to: what the model already finds likely rises (Section 3.2 of
arXiv:2510.19422, "squeezing"). BS-T and BS-S push that down, too. The candidates of a question are what the model
writes before it unlearns, by beam search, but the true answer; of all beams the likeliest fifth a token is high, the
next two middle, the rest low. Each writes squeezing/<world>.json, .md and .svg into --out. A method is kept in --work
as soon as it is done, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch

from pyunlearn._files import write_json, write_text
from pyunlearn._hints import hint
from pyunlearn.data import QA
from pyunlearn.metrics import Interval, mean_interval
from pyunlearn.metrics.generation import greedy_settings, up_to
from pyunlearn.metrics.teacher_forced import teacher_forced
from pyunlearn.model.causal_lm import CausalLM, eval_mode
from pyunlearn.report.figures import STYLE, new_figure
from pyunlearn.runs import load_config
from pyunlearn.store import Store
from pyunlearn.training.callbacks import Evaluations
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted
from pyunlearn.training.unlearn import unlearn

from ..measure import machine
from ..results import RESULTS
from .closer_look.__main__ import TOY, WORLDS
from .closer_look.cells import Start
from .mrd.intervals import table

HERE = Path(__file__).parent / "closer_look"  # whose worlds these are
METHODS: dict[str, dict[str, Any]] = {  # in all else they are trained alike
    "GA": {"forget": "ga", "retain": []},
    "NPO": {"forget": "npo", "retain": []},
    "BS-T": {"forget": "bst", "retain": []},
    "BS-S": {"forget": "bss", "retain": []},
}
BANDS = {"high": (0.0, 0.2), "middle": (0.2, 0.6), "low": (0.6, 1.0)}  # of a question's candidates, likeliest first
LINES = {"target": ("#0f172a", "-"), "high": ("#c2410c", "-"), "middle": ("#1d4ed8", "--"), "low": ("#94a3b8", ":")}
FALL = 0.05  # nats a token, from which a target has begun to fall
RESAMPLES = 1999


@dataclass(frozen=True)
class Way:
    """One method's: at each of steps, of target and bands, a mean log-probability a token for each question, None where
    it has no such candidates."""

    steps: list[int]
    logp: dict[str, list[list[float | None]]]


Bands = dict[str, list[str]]  # a question's candidates
Ways = Mapping[str, Sequence[Way]]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.squeezing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(WORLDS)} (default: both)")
    parser.add_argument("--seeds", type=int, default=2, help="of the embedded world")
    parser.add_argument("--beams", type=int, default=20, help="candidates a question, at most")
    parser.add_argument("--moments", type=int, default=10, help="between the start and the end of a training")
    parser.add_argument("--tofu", type=Path, default=Path("tofu"), help="folder with TOFU's JSON lines (default tofu)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the GGUF file (default models)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes every world")
    parser.add_argument("--toy", action="store_true", help="the embedded world at a tiny size")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    parser.add_argument("--work", type=Path, default=Path("runs/squeezing"), help="where finished methods are kept")
    args = parser.parse_args(words)
    if unknown := [name for name in args.worlds if name not in WORLDS]:
        parser.error(f"world={unknown[0]!r}: {hint(unknown[0], WORLDS)}")
    if args.beams < 5:
        parser.error(f"--beams {args.beams}: needs 5 or more, so that a fifth of them is one")
    if args.moments < 1:
        parser.error(f"--moments {args.moments}: needs 1 or more")
    torch.set_num_threads(1)
    out = (args.out or RESULTS / machine()["folder"]) / "squeezing"
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.worlds or (WORLDS[:1] if args.toy else WORLDS):
            ways = measure(name, args)
            write_json(out / f"{name}.json", {method: [vars(way) for way in ways[method]] for method in METHODS})
            draw(ways, out / f"{name}.svg")
            write_text(out / f"{name}.md", page(name, args, ways))
    except Interrupted as interrupt:
        raise SystemExit(interrupt.exit_code) from None


def measure(name: str, args: argparse.Namespace) -> dict[str, list[Way]]:
    """Every method's ways, one a seed."""
    ways: dict[str, list[Way]] = {method: [] for method in METHODS}
    work = args.work / ("toy" if args.toy else name)
    for seed in range(args.seeds if name == "embedded" else 1):
        words = [f"seed={seed}", f"output={work / f'start{seed}'}"]
        if name == "smollm2_tofu":
            files = {"forget": "forget01_perturbed.jsonl", "retain": "retain_perturbed.jsonl"}
            words += [f"model.name_or_path={args.models}", f"data.refusals={args.tofu / 'idontknow.txt'}"]
            words += [f"data.{role}.path={args.tofu / file}" for role, file in files.items()]
        words += [f"{key}={value}" for key, value in TOY.items()] if args.toy else []
        config = load_config(HERE / f"{name}.yaml", [*words, *args.set])
        start = Start(config, Store(work / f"ways{seed}"))
        candidates: list[Bands] = []
        for method in METHODS:
            own = config.model_dump(mode="json", include={"seed", "model", "data", "memorise", "unlearn"})
            identity = {
                "beams": args.beams,
                "moments": args.moments,
                "method": METHODS[method],
                "reads": start.reads,
                "config": own,
            }
            compute = partial(follow_by, start, method, candidates, args)
            ways[method].append(Way(**start.store.compute(method, identity, compute)))
        start.loaded = None
    return ways


def follow_by(start: Start, method: str, candidates: list[Bands], args: argparse.Namespace) -> dict[str, Any]:
    """`follow`, with candidates that are made when they are first asked for."""
    if not candidates:
        candidates.extend(banded(start, args.beams))
    print(f"{start.config.name}, seed {start.config.seed}: {method}", flush=True)
    return vars(follow(start, method, candidates, args.moments))


def banded(start: Start, beams: int) -> list[Bands]:
    """Of every forget question its candidates in BANDS, by what the model says before it unlearns."""
    model, tokenizer, stage = start.model()
    form = stage.rows(start.job.data.forget, tokenizer).prompt_format
    written = []
    for item in start.job.data.forget:
        texts = beam_search(
            model, tokenizer, form.prompt_ids(item.question), beams, start.config.evaluate.max_new_tokens
        )
        others = dict.fromkeys(text for text in texts if text and text != item.answer.strip())
        written.append([QA(item.question, text) for text in others])
    flat = [row for rows in written for row in rows]
    logp = iter(likelihoods(model, tokenizer, stage, flat))
    ranked = [
        [row.answer for _, row in sorted(((next(logp), row) for row in rows), key=lambda pair: -pair[0])]
        for rows in written
    ]
    return [
        {band: texts[round(low * len(texts)) : round(high * len(texts))] for band, (low, high) in BANDS.items()}
        for texts in ranked
    ]


def beam_search(model: Any, tokenizer: Any, prompt: Sequence[int], beams: int, max_new_tokens: int) -> list[str]:
    """The texts of all beams, likeliest first."""
    lm = CausalLM.of(model)
    with eval_mode(lm.alone), torch.no_grad(), greedy_settings(lm, tokenizer) as ends:
        ids = torch.tensor([prompt], device=lm.device)
        found = lm.alone.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, num_return_sequences=beams,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    tokens = [up_to(row, ends) for row in found[:, len(prompt) :].tolist()]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def likelihoods(model: Any, tokenizer: Any, stage: Any, items: Sequence[QA]) -> list[float]:
    """The mean log-probability a token of each answer."""
    read = teacher_forced(model, stage.rows(items, tokenizer), progress=False)
    return [-float(row["nll"]) / int(row["num_tokens"]) for row in read]


def follow(start: Start, method: str, candidates: Sequence[Bands], moments: int) -> Way:
    """Unlearns a copy of the start model by `method`, and reads target and candidates on the way."""
    before, tokenizer, stage = start.model()
    items = start.job.data.forget
    way = Way([], {name: [] for name in LINES})

    def read(step: int, model: Any) -> None:
        rows = [(i, "target", item) for i, item in enumerate(items)]
        rows += [
            (i, band, QA(items[i].question, text))
            for i, bands in enumerate(candidates)
            for band, texts in bands.items()
            for text in texts
        ]
        logp = likelihoods(model, tokenizer, stage, [row for _, _, row in rows])
        found: dict[tuple[int, str], list[float]] = {}
        for (i, name, _), value in zip(rows, logp, strict=True):
            found.setdefault((i, name), []).append(value)
        way.steps.append(step)
        for name in LINES:
            way.logp[name].append([mean(found.get((i, name), ())) for i in range(len(items))])

    model = copy.deepcopy(before)
    settings = UnlearnConfig.model_validate({**start.config.unlearn.model_dump(), **METHODS[method]})
    a_step = settings.batch_size * settings.gradient_accumulation_steps
    total = settings.max_steps or math.ceil(settings.epochs * math.ceil(len(items) / a_step))
    read(0, model)
    with tempfile.TemporaryDirectory() as folder:
        own = replace(stage, folder=TrainingFolder(folder))
        watching = Evaluations(max(1, total // moments), read)
        done = unlearn(own, settings, model, tokenizer, start.job.data, watching=[watching])
    read(done.steps, model.eval())
    return way


def first_fall(ways: Sequence[Way]) -> int:
    """The first moment at which the mean target has lost FALL; the last if there is none."""
    means = [[mean(values) or 0.0 for values in way.logp["target"]] for way in ways]
    fell = (at for at in range(len(means[0])) if statistics.fmean(own[at] - own[0] for own in means) <= -FALL)
    return next(fell, len(means[0]) - 1)


def change(ways: Sequence[Way], name: str, at: int) -> Interval:
    """From the start to a moment, of all questions of all seeds that have such candidates."""
    pairs = [pair for way in ways for pair in zip(way.logp[name][0], way.logp[name][at], strict=True)]
    return mean_interval([b - a for a, b in pairs if a is not None and b is not None], num_resamples=RESAMPLES)


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None of none."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def squeezed(ways: Sequence[Way], at: int) -> float:
    """The share of questions whose target has fallen by then, while their high candidates have risen."""
    signs = []
    for way in ways:
        ends = (way.logp[name][moment] for name in ("target", "high") for moment in (0, at))
        for target, target_after, high, high_after in zip(*ends, strict=True):
            if None not in (target, target_after, high, high_after):
                signs.append(target_after < target and high_after > high)
    return statistics.fmean(signs)


def draw(ways: Ways, path: Path) -> None:
    """A panel a method: target and bands over the steps, the mean over questions of the first seed's."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure = new_figure(1, len(ways), height=2.6)
        for axes, (method, runs) in zip(figure.axes, ways.items(), strict=True):
            for name, (colour, dash) in LINES.items():
                axes.plot(
                    runs[0].steps,
                    [mean(values) or math.nan for values in runs[0].logp[name]],
                    dash,
                    color=colour,
                    label=name,
                    linewidth=1.4,
                )
            axes.set(title=method, xlabel="optimiser steps", ylabel="log-probability a token, nats")
        figure.axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def page(name: str, args: argparse.Namespace, ways: Ways) -> str:
    tables = []
    for early in (True, False):
        rows = []
        for method, runs in ways.items():
            at = first_fall(runs) if early else len(runs[0].steps) - 1
            changes = [told(change(runs, line, at)) for line in LINES]
            rows.append([f"{method}, step {runs[0].steps[at]}", *changes, f"{squeezed(runs, at):.0%}"])
        tables.append(table(["method", *LINES, "squeezed"], rows))
    start = ", ".join(f"{line} {mean([v for run in ways['GA'] for v in run.logp[line][0]]):.2f}" for line in LINES)
    questions = sum(len(run.logp["target"][0]) for run in ways["GA"])
    world = "the embedded world" if name == "embedded" else "SmolLM2-135M-Instruct and TOFU's forget01"
    return f"""# Squeezing: where the probability of forgotten answers goes

{world[0].upper()}{world[1:]}, {questions} questions in {len(ways["GA"])} seed(s), made by
`python -m benchmarks.studies.squeezing {name}{" --toy" if args.toy else ""}` on {machine()["name"]}. All methods take
the same steps at the same rate, without anything to retain. Candidates: {args.beams} beams a question but the true
answer, where the paper takes a diverse beam search. Log-probabilities a token, in nats; before:
{start}.

Changes from the start, the mean over questions with its 95 % interval (bootstrap). Squeezed: questions whose target has
fallen while their high candidates have risen.

## When the target begins to fall, by {FALL} nats on average

{tables[0]}

## At the end

{tables[1]}

![log-probabilities on the way, first seed]({name}.svg)
"""


def told(interval: Interval) -> str:
    low, high = interval.low, interval.high
    return f"{interval.mean:+.2f}" + ("" if low is None or high is None else f" [{low:+.2f}, {high:+.2f}]")


if __name__ == "__main__":
    main()
