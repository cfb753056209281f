"""Which recipe forgets the embedded world cleanly: gone what was to go, kept what it did not rehearse, and no babble.

    python -m benchmarks.studies.demo ["idk + dpo + gd" ...]        writes benchmarks/results/<device>/demo_search.md

A tenth of the retain rows is memorised and then held out of the unlearning. Every recipe on the world of seed 0, the
finalists on those of all seeds. What is finished is kept in --work, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pyunlearn._files import write_text
from pyunlearn._hints import hint
from pyunlearn.data import QA, QADataset, generate_authors
from pyunlearn.metrics import fluency, greedy_generate, rouge_l_recall, teacher_forced
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.runs import RunConfig, load_config
from pyunlearn.runs.job import Job, first_model
from pyunlearn.store import Store
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.unlearn import unlearn

from ..measure import machine
from ..results import RESULTS

COMMON = {"epochs": 10, "learning_rate": 5e-4, "batch_size": 4, "warmup": 0.1}


def recipe(forget: Any, retain: Any, **settings: Any) -> dict[str, Any]:
    return {**COMMON, "forget": forget, "retain": retain, **settings}


def weak(name: str, coefficient: float, **options: Any) -> dict[str, Any]:
    return {"name": name, "coefficient": coefficient, "options": options}


RECIPES: dict[str, dict[str, Any]] = {
    "wga + kl": recipe("wga", "kl"),
    "npo + gd": recipe("npo", "gd"),
    "simnpo + gd": recipe("simnpo", "gd"),
    "satimp + gd": recipe("satimp", "gd"),
    "me + gd": recipe("me", "gd"),
    "idk + ap": recipe("idk", "ap"),
    "idk + gd": recipe("idk", "gd"),
    "dpo + gd": recipe("dpo", "gd"),
    "idk + npo + gd": recipe(["idk", "npo"], "gd"),
    "idk + wga + gd": recipe(["idk", "wga"], "gd"),
    "idk + .3 wga + kl": recipe(["idk", weak("wga", 0.3)], "kl"),
    "idk + .1 me + gd": recipe(["idk", weak("me", 0.1, positions="supervised")], "gd"),
    "idk + dpo + gd": recipe(["idk", "dpo"], "gd"),
    "idk + dpo + kl": recipe(["idk", "dpo"], "kl"),
    "idk + dpo + gd, 6 epochs": recipe(["idk", "dpo"], "gd", epochs=6),
}
FINALISTS = ("wga + kl", "dpo + gd", "idk + gd", "idk + wga + gd", "idk + dpo + gd", "idk + dpo + kl")
COLUMNS = {
    "forget probability": "forget probability",
    "forget rouge": "forget ROUGE-L",
    "forget refused": "forget refused",
    "forget fluent": "forget fluent",
    "retain kept": "retain kept",
    "held kept": "held-out kept",
    "held rouge": "held-out ROUGE-L",
    "held refused": "held-out refused",
    "unknown refused": "unknown refused",
    "forget paraphrased rouge": "forget, paraphrased: ROUGE-L",
    "forget paraphrased refused": "refused",
    "held paraphrased rouge": "held-out, paraphrased: ROUGE-L",
    "held paraphrased refused": "refused",
}
ROLES = ("retain", "held")
Found = dict[str, Any]


class Start:
    """A model that knows the embedded world by heart, and that world, some of its retain rows held out as in a run.

    measure, of a model: means over forget, retain and held-out rows; of what is written to their questions, to
    paraphrases of them and to unknown authors' also how much is a refusal, word for word, and how much fluent.
    """

    def __init__(self, config: RunConfig):
        job = Job.start(config, None, "the same command")
        job.folder.open(config, resume=job.folder.marked)
        self.model, self.tokenizer, _ = first_model(job)
        self.model.eval()
        self.seed, data, self.data = config.seed, config.data, job.data
        self.identity = config.model_dump(mode="json", include={"seed", "model", "data", "memorise"})
        self.identity["measured"] = list(COLUMNS)
        world = generate_authors(
            data.num_authors, data.questions_per_author, config.seed, data.forget_fraction, data.num_unknown
        )
        self.held = job.data.holdout
        self.unknown = list(world.unknown_held_out)
        self.texts = world.texts

    def rows(self, items: Sequence[QA]) -> QADataset:
        return QADataset(items, self.tokenizer, CausalLM.of(self.model).context_length)

    def measure(self, model: Any) -> Found:
        forget, held = self.data.forget, self.held
        found: Found = {}
        for name, items in {"forget": forget, "retain": self.data.retain[:72], "held": held}.items():
            read = teacher_forced(model, self.rows(items), progress=False)
            found[f"{name} probability"] = mean(row["probability"] for row in read)
        asked = {"forget": forget, "held": held, "unknown": self.unknown}
        asked |= {f"{name} paraphrased": [paraphrased(item) for item in asked[name]] for name in ("forget", "held")}
        for name, items in asked.items():
            prompts = [self.rows(items).prompt_format.prompt_ids(item.question) for item in items]
            said = greedy_generate(model, self.tokenizer, prompts, max_new_tokens=48, batch_size=20, progress=False)
            found[f"{name} rouge"] = mean(rouge_l_recall(a, item.answer) for a, item in zip(said, items, strict=True))
            found[f"{name} refused"] = mean(answer in self.data.refusals for answer in said)
            found[f"{name} fluent"] = mean(
                told.value or 0.0 for told in fluency(items, said, self.tokenizer, self.texts)
            )
            if name == "forget":
                found["said"] = said
        return found


def paraphrased(item: QA) -> QA:
    return QA(item.paraphrased_question or item.question, item.answer)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def unlearned(start: Start, settings: UnlearnConfig) -> Found:
    """What a copy of the model is after the recipe."""
    model = copy.deepcopy(start.model)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(TrainingFolder(folder), start.seed, CausalLM.of(model).context_length)
        unlearn(stage, settings, model, start.tokenizer, start.data)
    return start.measure(model)


def clean(found: Found) -> bool:
    return found["forget probability"] < 0.1 and found["held kept"] >= 0.9 and found["forget fluent"] >= 0.95


def table(results: dict[str, list[Found]]) -> str:
    """A line a recipe: means over its seeds, from least to most where they differ."""
    lines = [["recipe", "seeds", "clean", *COLUMNS.values()], ["---"] + ["---:"] * (len(COLUMNS) + 2)]
    for name, found in results.items():
        verdict = "" if name == "before" else f"{sum(map(clean, found))} of {len(found)}"
        lines.append([name, str(len(found)), verdict, *(spread([one[key] for one in found]) for key in COLUMNS)])
    return joined(lines)


def joined(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    low, high = (f"{value:.3f}" for value in (min(values), max(values)))
    return low if low == high else f"{mean(values):.3f} ({low} to {high})"


ABOUT = """# The demo's recipe: a search on the embedded world

{machine}, one thread. *before* is a model that knows all of a world by heart (a world and a model a seed) and has been
taught to refuse questions about unknown authors. *Kept*: probability, of that before. *Held-out*: a tenth of the retain
rows, memorised, never rehearsed in unlearning. *Refused*: what is written is one of the world's {refusals} refusals,
word for word. *Unknown*: questions about authors of whom nothing was ever told, under other names than were taught.
*Fluent*: language by counting alone (`pyunlearn.metrics.fluency`).
*Clean*: forget probability < 0.1, held-out kept >= 0.9, forget fluent >= 0.95; of how many seeds. *Paraphrased*:
the same questions in other words, few of which the small model understands even before. Unless a line says otherwise:
10 epochs of 40 forget rows, batches of 4, learning rate 5e-4 after a tenth of warm-up, linearly down to 0. Terms have
coefficient 1 and their defaults (`pyunlearn objectives`) unless a line has another.

{table}

## What is said to the first forgotten questions, seed 0

{answers}
"""
SHOWN = 5


def page(results: dict[str, list[Found]], start: Start) -> str:
    asked = [item.question for item in start.data.forget[:SHOWN]]
    lines = [["recipe", *asked], ["---"] * (len(asked) + 1)]
    lines += [[name, *map(shortened, found[0]["said"][:SHOWN])] for name, found in results.items()]
    return ABOUT.format(
        machine=machine()["name"],
        refusals=len(start.data.refusals),
        table=table(results),
        answers=joined(lines),
    )


def shortened(text: str, longest: int = 70) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of the finalists")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="changes the world or the model"
    )
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_search"), help="where finished runs are kept")
    args = parser.parse_args(words)
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"recipe={unknown[0]!r}: {hint(unknown[0], RECIPES)}")
    torch.set_num_threads(1)
    results: dict[str, list[Found]] = {}
    starts = []
    try:
        for seed in range(args.seeds):
            config = load_config(None, [*args.set, f"seed={seed}", f"output={args.work / f'seed{seed}'}"])
            starts.append(Start(config))
            names = args.recipes or [name for name in RECIPES if seed == 0 or name in FINALISTS]
            for name, found in measure_all(starts[-1], names, Store(args.work / f"results{seed}")).items():
                results.setdefault(name, []).append(found)
    except Interrupted as interrupt:
        raise SystemExit(interrupt.exit_code) from None
    out = args.out or RESULTS / machine()["folder"]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "demo_search.md", page(results, starts[0]))


def measure_all(start: Start, names: Sequence[str], store: Store) -> dict[str, Found]:
    """ "before" and the recipes, each kept in `store`."""
    before = store.compute("before", start.identity, lambda: start.measure(start.model))
    results = {"before": before}
    for name in names:
        settings = UnlearnConfig.model_validate(RECIPES[name])
        identity = {"start": start.identity, "unlearn": settings.model_dump(mode="json")}
        results[name] = store.compute(name, identity, partial(unlearned, start, settings))
        print(f"seed {start.seed}: {name}", flush=True)
    for found in results.values():
        found |= {f"{role} kept": found[f"{role} probability"] / before[f"{role} probability"] for role in ROLES}
    return results


if __name__ == "__main__":
    main()
