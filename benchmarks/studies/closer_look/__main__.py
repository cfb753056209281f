"""GA, NPO, ME+GD and IDK+AP under all metrics at once, beside a model that never saw what they forget.

    python -m benchmarks.studies.closer_look embedded         the embedded world, a world and a model a seed
    python -m benchmarks.studies.closer_look smollm2_tofu     SmolLM2-135M and TOFU: make model, --tofu FOLDER
    python -m benchmarks.studies.closer_look                  both
    python -m benchmarks.studies.closer_look --toy            a world that takes seconds, to see the form

Each writes closer_look/<world>.md and .json into --out. Cosine similarity is measured where --embedder is there (make
embedder). A cell, one model under all metrics, is kept in --work as soon as it is done, and the same command goes on
from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from pyunlearn._files import write_json, write_text
from pyunlearn._hints import hint
from pyunlearn.runs import RunConfig, load_config
from pyunlearn.store import Store
from pyunlearn.training.stage import Interrupted

from ...measure import machine
from ...results import RESULTS
from .cells import METRICS, MODELS, WITH_EMBEDDER, Cell, Start
from .numbers import World, as_dict
from .page import page

HERE = Path(__file__).parent
WORLDS = ("embedded", "smollm2_tofu")
TOY = {
    "model.options": "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, vocab_size: 384}",
    "data": "{num_authors: 8, questions_per_author: 4, forget_fraction: 0.25, num_unknown: 8}",
    "memorise": "{epochs: 40, batch_size: 8, learning_rate: 0.01}",
    "unlearn": "{epochs: 4, learning_rate: 0.003}",
    "evaluate.max_new_tokens": "16",
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.closer_look",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(WORLDS)} (default: both)")
    parser.add_argument("--seeds", type=int, default=2, help="of the embedded world")
    parser.add_argument("--tofu", type=Path, default=Path("tofu"), help="folder with TOFU's JSON lines (default tofu)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the GGUF file (default models)")
    parser.add_argument(
        "--embedder", type=Path, default=Path("models/all-MiniLM-L6-v2"), help="folder; left out if none"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes every world")
    parser.add_argument("--toy", action="store_true", help="the embedded world at a tiny size")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    parser.add_argument("--work", type=Path, default=Path("runs/closer_look"), help="where finished cells are kept")
    args = parser.parse_args(words)
    if unknown := [name for name in args.worlds if name not in WORLDS]:
        parser.error(f"world={unknown[0]!r}: {hint(unknown[0], WORLDS)}")
    torch.set_num_threads(1)
    out = (args.out or RESULTS / machine()["folder"]) / "closer_look"
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.worlds or (WORLDS[:1] if args.toy else WORLDS):
            world, start = measure(name, args)
            write_json(out / f"{name}.json", as_dict(world))
            write_text(out / f"{name}.md", page(world, start))
    except Interrupted as interrupt:
        raise SystemExit(interrupt.exit_code) from None


def measure(name: str, args: argparse.Namespace) -> tuple[World, Start]:
    """A world's cells, over its seeds, and its first start."""
    cells: dict[str, list[Cell]] = {model: [] for model in MODELS}
    starts = []
    for seed in range(args.seeds if name == "embedded" else 1):
        work = args.work / ("toy" if args.toy else name)
        starts.append(Start(configured(name, args, seed, work), Store(work / f"cells{seed}")))
        for model in MODELS:
            cells[model].append(starts[-1].cell(model))
        starts[-1].loaded = None  # one model at a time
    return World(name, cells, starts[0].asked), starts[0]


def configured(name: str, args: argparse.Namespace, seed: int, work: Path) -> RunConfig:
    words = [f"seed={seed}", f"output={work / f'start{seed}'}"]
    if name == "smollm2_tofu":
        words.append(f"model.name_or_path={args.models}")
        files = {"data.forget.path": "forget01_perturbed.jsonl", "data.retain.path": "retain_perturbed.jsonl",
                 "data.refusals": "idontknow.txt"}  # fmt: skip
        words += [f"{key}={args.tofu / file}" for key, file in files.items()]
    if args.toy:
        words += [f"{key}={value}" for key, value in TOY.items()]
    there = args.embedder.is_dir()
    words.append(f"evaluate.metrics=[{', '.join((*METRICS, WITH_EMBEDDER) if there else METRICS)}]")
    if there:
        words.append(f"evaluate.embedder={args.embedder}")
    return load_config(HERE / f"{name}.yaml", [*words, *args.set])


if __name__ == "__main__":
    main()
