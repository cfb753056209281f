"""The G-effect on a large model of random weights: time in training steps, memory in gradients.

    python -m benchmarks.scale.geffect --shape 7B --device cuda
    python -m benchmarks.scale.geffect                                        a toy, to try the code

Everything is in bfloat16 and goes over the same number of random samples in micro-batches. A training step is forward,
backward and a step of fused AdamW. A probe is `pu.g_effect` with two metrics, so three forwards and backwards; a
PG-effect is `pu.pointwise_g_effect` by ghost products. The backward whose gradients are dropped as they come tells what
activations and the layer in progress take: a probe may take that, two gradients, and 1 % of one for its sums.
Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyunlearn as pu
from pyunlearn._files import write_text
from pyunlearn.geffect import gradient_of
from pyunlearn.gradients.streamed import backwards, probing, streamed

from ..measure import commit, machine, peak_bytes, release, seconds, versions
from ..results import RESULTS
from ..shapes import SHAPES, random_llama

Batch = Mapping[str, Tensor]
PROBE_STEPS, POINTS_STEPS = 3.0, 2.0  # what was set out to be reached


def load(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return random_llama(args.shape, args.device, torch.bfloat16)


def samples(args: argparse.Namespace, seed: int) -> list[Batch]:
    """Micro-batches of random tokens, all supervised."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (args.samples, args.length), generator=g)
    return [{"input_ids": part.to(args.device)} for part in ids.split(args.micro_batch)]


def sample_losses(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): sums of the negative log-likelihood."""
    ids = batch["input_ids"]
    return -pu.token_stats(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).logp.sum(-1)


def losses(batches: list[Batch], model: nn.Module) -> Iterator[Tensor]:
    """One scalar a micro-batch, for `g_effect` and `gradient_of`."""
    return (sample_losses(model, batch).sum() for batch in batches)


def training(model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """A step; AdamW's state lives as long as what is returned."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        for loss in losses(batches, model):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def drop_gradients(model: nn.Module, batches: list[Batch]) -> None:
    """Backward without any gradient kept."""
    with probing(model) as parameters, streamed(parameters, lambda name, gradient: None):
        for _ in backwards("loss", partial(losses, batches), model):
            pass


def points(model: nn.Module, batches: list[Batch], direction: dict[str, Tensor]) -> Tensor:
    """(samples,) float64"""
    return torch.cat([pu.pointwise_g_effect(model, batch, sample_losses, direction).total for batch in batches])


def measure(call: Callable[[], Any], device: str, rounds: int) -> dict[str, float]:
    """Memory taken on top of what is held, and the shortest time, after a warm-up."""
    release()
    call()
    peak = peak_bytes(call, device)
    return {"peak_bytes": peak, "seconds": min(seconds(call, device)[0] for _ in range(rounds))}


def study(args: argparse.Namespace) -> dict[str, Any]:
    model, forget, retain, other = load(args), samples(args, 1), samples(args, 2), samples(args, 3)
    cost = partial(measure, device=args.device, rounds=args.rounds)
    step = cost(training(model, forget))
    alone = cost(lambda: drop_gradients(model, forget))
    metrics = {"forget": partial(losses, other), "retain": partial(losses, retain)}
    probe = cost(lambda: pu.g_effect(model, partial(losses, forget), metrics))
    effect = pu.g_effect(model, partial(losses, forget), metrics)
    direction = gradient_of(model, metrics["retain"])
    pointwise = cost(lambda: points(model, forget, direction))
    whole = float(points(model, forget, direction).sum())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "shape": args.shape,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_bytes": weights,
        "samples": args.samples,
        "length": args.length,
        "micro_batch": args.micro_batch,
        "device": machine(args.device)["name"],
        "versions": versions(args.device),
        "commit": commit(),
        "measured": {"training step": step, "backward alone": alone, "probe": probe, "PG-effect": pointwise},
        "probe_bytes_allowed": 2.01 * weights + alone["peak_bytes"],
        # the samples' effects add up to the probe's, but for the rounding of bfloat16 gradients
        "disagreement": abs(whole / effect.total["retain"] - 1),
    }


def markdown(record: dict[str, Any]) -> str:
    rows, weights = record["measured"], record["weights_bytes"]
    step = rows["training step"]["seconds"]
    lines = [
        f"# G-effect: a {record['shape']} shape with random weights",
        "",
        f"{record['parameters'] / 1e6:.1f} million parameters in bfloat16 ({weights / 2**30:.2f} GiB), "
        f"{record['samples']} samples of {record['length']} tokens in micro-batches of {record['micro_batch']}; "
        f"{record['device']}, torch {record['versions']['torch']}, commit {record['commit']}. Memory is what is taken "
        "beyond the weights, in the training step beyond AdamW's state too, in the PG-effect beyond one gradient.",
        "",
        "| what | seconds | training steps | memory, GiB | memory, gradients |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, one in rows.items():
        peak = one["peak_bytes"]
        cells = (one["seconds"], one["seconds"] / step, peak / 2**30, peak / weights)
        lines.append(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    targets = (
        ("a probe takes at most 3 training steps", rows["probe"]["seconds"] / step, PROBE_STEPS),
        ("and at most two gradients more than a backward whose gradients are dropped, in GiB",
         rows["probe"]["peak_bytes"] / 2**30, record["probe_bytes_allowed"] / 2**30),
        (f"the PG-effect of {record['samples']} samples takes at most 2 training steps",
         rows["PG-effect"]["seconds"] / step, POINTS_STEPS),
    )  # fmt: skip
    lines += ["", "| target | found | at most | |", "|---|---:|---:|---|"]
    for text, value, limit in targets:
        lines.append(f"| {text} | {value:.2f} | {limit:.2f} | {'met' if value <= limit else 'missed'} |")
    lines += ["", f"PG-effects add up to the probe's G-effect within {record['disagreement']:.1e}."]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.geffect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="geffect", help="of the files written")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    record = study(args)
    if not math.isfinite(record["disagreement"]):
        raise SystemExit("the effects are not finite")
    out = args.out or RESULTS / machine(args.device)["folder"]
    write_text(out / f"{args.name}.json", json.dumps(record, indent=1) + "\n")
    write_text(out / f"{args.name}.md", markdown(record))
    print(f"{markdown(record)}\nwrote {out}/{args.name}.json and .md")


if __name__ == "__main__":
    main()
