"""All estimators of Memory Removal Difficulty on one model and forget set: time, agreement, and Algorithm 1 as written.

    python -m benchmarks.scale.mrd --model models/SmolLM2-135M-Instruct.Q4_1.gguf --data tofu/forget01.jsonl
    python -m benchmarks.scale.mrd --shape 7B --data tofu/forget10.jsonl --device cuda --num-draws 5      random weights
    python -m benchmarks.scale.mrd                                      the embedded world by a model of random weights

The naive loop goes sample by sample and draw by draw: torch.randn_like added to each parameter, a forward with whole
logits, log_softmax, the weights put back: from a copy, or ("in place", as MeZO does) by taking the same noise off once
more. Each is run for `--naive-seconds` over samples of all lengths, and extrapolated.
Writes mrd.json and mrd.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

import pyunlearn as pu
from pyunlearn._files import write_text
from pyunlearn.data import QADataset, collate, generate_authors, load_qa
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_stats
from pyunlearn.model.load import load_model
from pyunlearn.model.precision import full_precision
from pyunlearn.mrd import ESTIMATORS
from pyunlearn.mrd.samples import make_samples

from ..measure import commit, machine, seconds, versions
from ..results import RESULTS
from ..shapes import SHAPES, random_llama

SIGMA, SEED = 1e-5, 0
Row = dict[str, Any]


def load(args: argparse.Namespace) -> tuple[Any, list[Row], str]:
    """(model on its device, tokenised samples, what it is called)."""
    world = generate_authors()
    if args.data is not None:
        items = load_qa(args.data, limit=args.limit)
    else:
        items = (world.forget + world.retain if args.shape else world.forget)[: args.limit]
    tokenizer: Any
    if args.model is None:
        tokenizer = train_tokenizer(world.texts + [f"{item.question} {item.answer}" for item in items])
        model, name = random_model(args.shape, tokenizer, args.device), args.shape or "embedded"
    else:
        path, gguf = Path(args.model), Path(args.model).suffix == ".gguf"
        model, tokenizer = load_model(str(path.parent), gguf_file=path.name) if gguf else load_model(str(path))
        name = path.stem
    rows = QADataset(items, tokenizer, CausalLM.of(model).context_length)
    return model.to(args.device), [rows[i] for i in range(len(rows))], name


def random_model(shape: str | None, tokenizer: Any, device: str) -> Any:
    if shape is None:
        return tiny_llama(tokenizer)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return random_llama(shape, device, torch.float32, **ids)


@torch.no_grad()
def forward_alone(model: Any, batch: Any, args: argparse.Namespace) -> float:
    """Seconds of one forward over all samples, the very batches that `pu.mrd` makes: what a draw cannot do without."""
    samples = make_samples([batch], args.batch_size, torch.device(args.device))

    def once() -> list[Tensor]:
        return [supervised_stats(model, inputs, ("log_nll",))[0].log_nll for inputs in samples.batches]

    with full_precision(torch.device(args.device)):
        return min(seconds(once, args.device)[0] for _ in range(3))


@torch.no_grad()
def naive(model: Any, rows: Sequence[Row], limit: float, device: str, in_place: bool) -> dict[str, float]:
    """Algorithm 1 as written, sample by sample, within `limit` seconds; its time for a sample and a draw."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    some = [by_length[round(i * (len(rows) - 1) / 7)] for i in range(min(8, len(rows)))] if len(rows) > 1 else [0]

    def logp(row: Row) -> Tensor:
        ids, labels = row["input_ids"].to(device), row["labels"].to(device)[1:]
        scores = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        return scores[labels != -100].gather(1, labels[labels != -100][:, None]).squeeze(1)

    def add_noise(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)

    pristine = [p.detach().clone() for p in model.parameters()]
    clean = {i: logp(rows[i]) for i in some}
    start, spent, draws = time.perf_counter(), 0.0, 0
    sums = dict.fromkeys(some, 0.0)
    while spent < limit or draws == 0:
        for i in some:
            add_noise(draws, SIGMA)
            sums[i] += abs(float(((clean[i] - logp(rows[i])) / clean[i]).sum()))
            if in_place:
                add_noise(draws, -SIGMA)
            else:
                restore(model, pristine)
        draws, spent = draws + 1, time.perf_counter() - start
    restore(model, pristine)
    return {
        "samples": len(some),
        "draws": draws,
        "seconds": spent,
        "seconds_a_sample_and_draw": spent / draws / len(some),
    }


def restore(model: Any, pristine: Sequence[Tensor]) -> None:
    for p, w in zip(model.parameters(), pristine, strict=True):
        p.copy_(w)


def study(model: Any, rows: Sequence[Row], name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The record so far, after every estimator."""
    batch = collate(rows, 0)
    batch.pop("index")
    record: dict[str, Any] = {
        "model": name,
        "data": args.data and Path(args.data).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": len(rows),
        "tokens": int((batch["labels"][:, 1:] != -100).sum()),
        "sigma": SIGMA,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "device": machine(args.device)["name"],
        "versions": versions(args.device),
        "commit": commit(),
        "forward_seconds": forward_alone(model, batch, args),
        "estimators": {},
    }
    for in_place in (False, True) if args.naive_seconds else ():
        loop = naive(model, rows, args.naive_seconds, args.device, in_place)
        whole = loop["seconds_a_sample_and_draw"] * len(rows) * args.num_draws
        loop |= {"extrapolated_seconds": whole, "extrapolated_draws": args.num_draws}
        record["naive, in place" if in_place else "naive"] = loop
    values: dict[str, Tensor] = {}
    for estimator, own in args.estimators:
        draws = own or args.num_draws
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        options: Any = {"batch_size": args.batch_size, "mode": args.mode, "check_draws": args.check_draws}
        score = partial(pu.mrd, model, [batch], estimator, sigma=SIGMA, seed=SEED, **options)
        took, result = seconds(partial(score, num_draws=draws), args.device)
        values[estimator] = result.value
        draw_seconds = took / draws if result.draws is not None else None
        if estimator == "algorithm1" and result.draws is not None:
            values["naive definition"] = result.draws.mean(0).abs()
            if draws > 2:  # without the forward of the weights as they are, and without the self-check
                draw_seconds = (took - seconds(partial(score, num_draws=2), args.device)[0]) / (draws - 2)
        record["estimators"][estimator] = {
            "seconds": took,
            "draw_seconds": draw_seconds,
            "draws": result.diagnostics["num_draws"],
            "median": float(result.value.median()),
            "relative_error": float((result.standard_error / result.value).median()),
            "diagnostics": result.diagnostics,
            "values": result.value.tolist(),
            "errors": result.standard_error.tolist(),
        }
        if args.device != "cpu":
            record["estimators"][estimator]["peak_bytes"] = torch.cuda.max_memory_allocated()
        print(f"{estimator}: {took:.1f} s", flush=True)
        record["spearman"] = {
            f"{a}, {b}": float(spearmanr(values[a], values[b]).statistic)
            for a, b in (("algorithm1", "gradient"), ("definition", "hutchinson"), ("algorithm1", "definition"),
                         ("algorithm1", "initial"), ("naive definition", "definition"))
            if a in values and b in values
        }  # fmt: skip
        yield record


def markdown(record: dict[str, Any]) -> str:
    """The tables of a study."""
    loops = {name: record[name] for name in ("naive", "naive, in place") if name in record}
    prefix = max((one["diagnostics"]["shared_prefix"] or 0 for one in record["estimators"].values()), default=0)
    shared = f" All begin with the same {prefix} tokens, computed once a draw." if prefix else ""
    lines = [
        f"# Memory Removal Difficulty: {record['model']}, {record['data'] or 'embedded world'}",
        "",
        f"{record['samples']} samples, {record['tokens']} scored tokens, {record['parameters'] / 1e6:.1f} million "
        f"parameters, float32; {record['device']}, {record['threads']} threads, torch {record['versions']['torch']}, "
        f"commit {record['commit']}. One forward over all samples takes {record['forward_seconds']:.2f} s.{shared}",
        "",
        f"| estimator | draws | seconds | a draw, in forwards | {''.join(f'x {loop} | ' for loop in loops)}median | "
        "relative standard error |",
        "|---|---:|---:|---:|---:|---:|" + "---:|" * len(loops),
    ]
    for name, one in record["estimators"].items():
        a_draw = f"{one['draw_seconds'] / record['forward_seconds']:.2f}" if one["draws"] else ""
        same = name in ("algorithm1", "gradient")
        faster = [f"{loop['extrapolated_seconds'] / one['seconds']:.1f}" if same else "" for loop in loops.values()]
        cells = (name, one["draws"] or "", f"{one['seconds']:.1f}", a_draw, *faster, f"{one['median']:.3g}")
        lines.append(f"| {' | '.join(map(str, cells))} | {one['relative_error']:.1%} |")
    peaks = {name: one["peak_bytes"] for name, one in record["estimators"].items() if "peak_bytes" in one}
    if peaks:
        weights = record["parameters"] * 4
        by_estimator = ", ".join(f"{name} {peak / 2**30:.1f}" for name, peak in peaks.items())
        lines += ["", f"Peak memory, GiB: {by_estimator}; the weights alone {weights / 2**30:.1f}."]
    for name, loop in loops.items():
        lines += [
            "",
            f'The loop "{name}" took {loop["seconds"]:.0f} s for {loop["samples"]} samples and {loop["draws"]} draws; '
            f"{loop['extrapolated_draws']} draws of all samples would take {loop['extrapolated_seconds']:.0f} s.",
        ]
    if record["spearman"]:
        lines += ["", "| rank correlation (Spearman) of | |", "|---|---:|"]
        lines += [f"| {pair} | {rho:.3f} |" for pair, rho in record["spearman"].items()]
    checks = [
        f"| {name} | {check['sigma_ratio']:.3f} | {check['expected_ratio']:g} | {check['noise_share']:.2%} |"
        for name, one in record["estimators"].items()
        if (check := one["diagnostics"])["noise_share"] is not None
    ]
    if checks:
        lines += ["", "| self-check | at 2 sigma, times | expected | rounding |", "|---|---:|---:|---:|", *checks]
    return "\n".join(lines) + "\n"


def with_draws(words: str) -> list[tuple[Any, int | None]]:
    """Estimators, each with its number of draws where one is given."""
    estimators: list[tuple[Any, int | None]] = []
    for word in words.split(","):
        name, _, draws = word.partition(":")
        if name not in ESTIMATORS or (draws and not (draws.isdecimal() and int(draws) >= 2)):
            raise argparse.ArgumentTypeError(
                f"{word!r}: needs one of {', '.join(ESTIMATORS)}, alone or with a number of draws, 2 at least, such as "
                "definition:50"
            )
        estimators.append((name, int(draws) if draws else None))
    return estimators


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.mrd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a GGUF file, or a folder with config.json and safetensors")
    parser.add_argument("--shape", choices=SHAPES, help="a Llama of this shape with random weights, in its place")
    parser.add_argument("--data", help="JSON lines with question and answer (default: the embedded world)")
    parser.add_argument("--limit", type=int)
    parser.add_argument(
        "--estimators",
        type=with_draws,
        default="algorithm1,gradient,definition:50,hutchinson:50,initial",
        metavar="NAME[:DRAWS],...",
        help="default: %(default)s; definition and hutchinson take two and about ten forwards a draw",
    )
    parser.add_argument("--num-draws", type=int, default=200, help="of estimators without a number of their own")
    parser.add_argument("--check-draws", type=int, default=8, help="of the self-check, which is timed too")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--naive-seconds", type=float, default=60, help="0: no naive loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="mrd", help="of the files written")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    out = args.out or RESULTS / machine(args.device)["folder"]
    for record in study(*load(args), args):  # written each time: one that is stopped keeps what is finished
        write_text(out / f"{args.name}.json", json.dumps(record, indent=1) + "\n")
        write_text(out / f"{args.name}.md", markdown(record))
    print(f"\n{markdown(record)}\nwrote {out}/{args.name}.json and .md")


if __name__ == "__main__":
    main()
