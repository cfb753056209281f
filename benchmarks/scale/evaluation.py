"""The teacher-forced part of the TOFU suite against a plain loop: time and peak memory.

    python -m benchmarks.scale.evaluation --data tofu          SmolLM2 from models/, after `make model`
    python -m benchmarks.scale.evaluation --toy                a tiny model and data made here, to try the code
    python -m benchmarks evaluation                            the first, with PYUNLEARN_TOFU for the data, or tofu

The plain loop is what evaluation code does with `transformers`: the answers, the paraphrases, the first wrong answers,
the second ones, ..., each a pass of its own over its set, in its order, in batches of 16 padded to their longest, with
the float32 log_softmax of all logits. Ours is `evaluate_suite` without what generates: the texts of a question in one
row of the model, which has their prompt once, in batches by length, without logits of a batch. Both tokenise inside.
Nothing is read from or written to a cache. Last, --flat questions are read, and what the process holds is watched.
Writes evaluation.json and evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pyunlearn._files import write_text
from pyunlearn.data import QA, QADataset, collate, load_qa, padding_id
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import Suite, evaluate, evaluate_suite, get_metric, get_suite
from pyunlearn.model.load import load_model

from ..measure import commit, machine, peak_bytes, release, seconds, versions
from ..results import RESULTS

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = {"forget": "forget10", "retain": "retain", "real_authors": "real_authors", "world_facts": "world_facts"}
LOGS = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}  # prefix in logs -> set
BATCH_SIZE = 16
FASTER, LEANER = 2.0, 3.0  # what was set out to be reached, at least
TOLERANCE = 1e-3  # of a loss per token, in nats: products are float32 in another order
Sets = Mapping[str, Sequence[QA]]


def load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, list[QA]], str]:
    """Model on its device, tokenizer, sets, and what the model is called."""
    model: Any
    tokenizer: Any
    if args.toy:
        sets = {name: toy_items(name, args.samples) for name in FILES}
        texts = [
            f"{item.question} {item.answer} {item.paraphrased_answer}" for items in sets.values() for item in items
        ]
        tokenizer = train_tokenizer(texts, vocab_size=400)
        return tiny_llama(tokenizer).to(args.device), tokenizer, sets, "toy"
    path, gguf = Path(args.model), Path(args.model).suffix == ".gguf"
    model, tokenizer = load_model(str(path.parent), gguf_file=path.name) if gguf else load_model(str(path))
    sets = {name: load_qa(args.data, name=f"{file}_perturbed", limit=args.samples) for name, file in FILES.items()}
    return model.to(args.device), tokenizer, sets, path.stem


def toy_items(name: str, count: int) -> list[QA]:
    wrong = ("It lives on a hill, all say.", "No one knows.", "In the big old town by the river.")
    return [
        QA(f"Where does {name} {i} live?", f"By the sea, in house {i}.", f"House {i} by the sea.", wrong)
        for i in range(count)
    ]


def teacher_forced(suite: Suite) -> Suite:
    """Its lines that need no text written, and no holdout set."""
    lines = [each for each in suite.measures if "written" not in get_metric(each.metric).needs and not each.against]
    return replace(suite, measures=tuple(lines), aggregates=(), rows=None)


def passes(items: Sequence[QA]) -> Iterator[list[str]]:
    """What a plain evaluation reads of a set, a list of answers a pass."""
    yield [item.answer for item in items]
    if all(item.paraphrased_answer is not None for item in items):
        yield [item.paraphrased_answer or "" for item in items]
    for j in range(len(items[0].perturbed_answers)):
        yield [item.perturbed_answers[j] for item in items]


@torch.no_grad()
def plain(model: Any, tokenizer: Any, sets: Sets, device: str) -> dict[str, list[list[float]]]:
    """Set -> pass -> loss per token of every sample."""
    losses: dict[str, list[list[float]]] = {name: [] for name in sets}
    for name, items in sets.items():
        for answers in passes(items):
            rows, found = QADataset(items, tokenizer, None, answers=answers), []
            for start in range(0, len(rows), BATCH_SIZE):
                some = [rows[i] for i in range(start, min(start + BATCH_SIZE, len(rows)))]
                batch = {key: value.to(device) for key, value in collate(some, padding_id(tokenizer)).items()}
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
                targets, kept = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
                logp = logits.float().log_softmax(-1)
                hits = (logp.argmax(-1) == targets) & kept
                chosen = logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0].where(kept, 0)
                found += (-chosen.sum(1) / kept.sum(1)).tolist()
                hits.cpu()
            losses[name].append(found)
    return losses


def study(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, sets, name = load(args)
    suite = teacher_forced(get_suite("tofu"))
    ours = lambda: evaluate_suite(model, tokenizer, sets, suite, batch_size=BATCH_SIZE, progress=False)  # noqa: E731
    theirs = lambda: plain(model, tokenizer, sets, args.device)  # noqa: E731
    times: dict[str, list[float]] = {"plain loop": [], "suite": []}
    for _ in range(args.rounds):  # in turns, before anything else
        elapsed, losses = seconds(theirs, args.device)
        times["plain loop"].append(elapsed)
        elapsed, result = seconds(ours, args.device)
        times["suite"].append(elapsed)
    log = result.log
    print({name: [round(each, 2) for each in own] for name, own in times.items()}, flush=True)
    pairs = [
        (own, other)
        for prefix, of in LOGS.items()
        for own, other in zip(log[f"{prefix}_Q_A_Prob"].column("avg_loss"), losses[of][0], strict=True)
    ]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "texts": sum(len(each) for own in losses.values() for each in own),
        "samples": args.samples,
        "batch_size": BATCH_SIZE,
        "threads": torch.get_num_threads(),
        "device": machine(args.device)["name"],
        "versions": versions(args.device),
        "commit": commit(),
        "measured": {
            name: {"peak_bytes": peak(call, args.device), "seconds": min(times[name])}
            for name, call in (("plain loop", theirs), ("suite", ours))
        },
        "disagreement": max(abs(own - other) for own, other in pairs),
        "flat": args.flat,
        "resident_bytes": watch(model, tokenizer, sets["world_facts"], args.flat),
    }


def resident_bytes() -> int:
    """What this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch(model: Any, tokenizer: Any, items: Sequence[QA], count: int) -> list[int]:
    """Resident bytes at every tenth of the way through `count` questions, others each time, of which each is read."""
    asked = [replace(items[i % len(items)], question=f"{i}. {items[i % len(items)].question}") for i in range(count)]
    held: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: held.append(resident_bytes()))
    evaluate(model, tokenizer, asked, metrics=["probability"], batch_size=BATCH_SIZE, progress=False)
    hook.remove()
    held.append(resident_bytes())
    return [held[(len(held) - 1) * tenth // 10] for tenth in range(11)]


def peak(call: Callable[[], Any], device: str) -> int:
    release()
    return peak_bytes(call, device)


def markdown(record: dict[str, Any]) -> str:
    theirs, ours = record["measured"]["plain loop"], record["measured"]["suite"]
    faster, leaner = (theirs[key] / ours[key] for key in ("seconds", "peak_bytes"))
    lines = [
        f"# The TOFU suite's teacher-forced part: {record['model']}",
        "",
        f"{record['texts']} texts, of at most {record['samples']} questions a set, batches of {record['batch_size']}, "
        f"{record['parameters'] / 1e6:.1f} million parameters; {record['device']}, {record['threads']} threads, torch "
        f"{record['versions']['torch']}, commit {record['commit']}. Both in turns, the least of each; memory is "
        "what is taken beyond the weights.",
        "",
        "| what | seconds | texts a second | memory, MiB |",
        "|---|---:|---:|---:|",
    ]
    for name, one in record["measured"].items():
        rate, taken = record["texts"] / one["seconds"], one["peak_bytes"] / 2**20
        lines.append(f"| {name} | {one['seconds']:.2f} | {rate:.1f} | {taken:.1f} |")
    lines += ["", "| target | found | at least | |", "|---|---:|---:|---|"]
    for text, value, limit in (("times as fast", faster, FASTER), ("times less memory", leaner, LEANER)):
        lines.append(f"| {text} | {value:.2f} | {limit:.2f} | {'met' if value >= limit else 'missed'} |")
    held = [each / 2**20 for each in record["resident_bytes"]]
    lines += [
        "",
        f"Losses per token agree within {record['disagreement']:.1e} nats. Over {record['flat']} questions the process "
        f"holds {held[1]:.0f} MiB after a tenth of the way and {held[-1]:.0f} at the end, {max(held):.0f} at most.",
    ]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=MODEL, help=f"folder or GGUF file (default {MODEL})")
    parser.add_argument("--data", default=os.environ.get("PYUNLEARN_TOFU", "tofu"), help="folder with TOFU's files")
    parser.add_argument("--toy", action="store_true", help="a tiny model, data made here")
    parser.add_argument("--samples", type=int, default=32, help="questions of each set (default 32)")
    parser.add_argument("--flat", type=int, default=1000, help="questions to watch memory over (default 1000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    record = study(args)
    if not record["disagreement"] < TOLERANCE:
        raise SystemExit(f"the losses disagree by {record['disagreement']} nats per token")
    out = args.out or RESULTS / machine(args.device)["folder"]
    write_text(out / "evaluation.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "evaluation.md", markdown(record))
    print(f"{markdown(record)}\nwrote {out}/evaluation.json and .md")
    return 0


if __name__ == "__main__":
    main()
