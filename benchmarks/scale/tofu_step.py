"""Training steps of NPO + KL on rows of TOFU: ours, lever by lever, against plain Hugging Face ones.

    python -m benchmarks.scale.tofu_step --data tofu          SmolLM2 from models/, after `make model`
    python -m benchmarks.scale.tofu_step --toy                a tiny model and data made here, to try the code
    python -m benchmarks tofu_step                            the first, with PYUNLEARN_TOFU for the data, or tofu

A step takes 8 rows of forget01 and 8 of retain90, as their chat template gives them: one backward of the two losses,
one step of fused AdamW in float32, its learning rate 0, so that each step is of the same weights, which stand a little
off the reference's. The plain steps pad, take the model's logits and the float32 log_softmax of all of them; their
reference is a live model, or its log-probabilities and hidden states kept in files, as in ours. All ways take turns,
batch after batch. Memory: weights, optimiser and reference, and what the first step takes on top, gradients included.
Errors are of loss and gradient of the first batch, against the plain step in float64. Compiling is told apart.
Writes tofu_step.json and tofu_step.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyunlearn as pu
from pyunlearn._files import write_text
from pyunlearn.data import QA, ForgetRetainDataset, QADataset, load_qa
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.model.compiled import Compiling
from pyunlearn.model.load import load_model
from pyunlearn.model.packing import Packing
from pyunlearn.training.terms import TermLosses, count_items

from ..measure import commit, machine, peak_bytes, release, synchronize, versions
from ..results import RESULTS

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
BETA = 0.1
OFF = 0.02  # of each tensor's spread: how far the trained weights are from the reference's
FASTER, LEANER = 1.8, 0.7  # what was set out to be reached: times the first way's speed, of its memory
TOLERANCE = 1e-4  # of a loss, relative
FIRST = "plain, live reference"
Batch = dict[str, dict[str, Tensor]]
Loss = Callable[[nn.Module, Batch], Tensor]


class Way(NamedTuple):
    """Of a step: its loss, and what it has."""

    loss: Loss
    packing: Packing | None = None
    compiling: Compiling | None = None

    def around(self, model: nn.Module) -> ExitStack:
        """Forward and backward."""
        stack = ExitStack()
        if self.packing is not None:
            stack.enter_context(self.packing)
        if self.compiling is not None:
            stack.enter_context(self.compiling(model, self.packing))
        return stack


def load(args: argparse.Namespace) -> tuple[Any, ForgetRetainDataset, str]:
    """Model on its device, rows, and what the model is called."""
    model: Any
    tokenizer: Any
    if args.toy:
        sets = [[QA(f"Where does {name} {i} live?", f"By the sea, in house {i}.") for i in range(args.batch_size)]
                for name in ("Ann", "Bob")]  # fmt: skip
        tokenizer = train_tokenizer([f"{item.question} {item.answer}" for items in sets for item in items], 400)
        model, name = tiny_llama(tokenizer), "toy"
    else:
        path = Path(args.model)
        gguf = path.suffix == ".gguf"
        model, tokenizer = load_model(str(path.parent), gguf_file=path.name) if gguf else load_model(str(path))
        limit = args.batches * args.batch_size
        sets, name = [load_qa(args.data, name=file, limit=limit) for file in ("forget01", "retain90")], path.stem
    forget, retain = (QADataset(items, tokenizer, None) for items in sets)
    return model.to(args.device), ForgetRetainDataset(forget, retain), name


def token_logp(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, T - 1), 0 where nothing is supervised."""
    labels = batch["labels"][:, 1:]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return logp.where(labels != -100, 0)


def plain(reference: Callable[[Batch], tuple[Tensor, Tensor]]) -> Loss:
    """With what gives, of a batch, the reference's (B,) log-probabilities of forget answers and (N, V) logits of
    supervised retain tokens."""

    def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            before, other = reference(batch)
        logp = token_logp(logits_of(model, batch["forget"]), batch["forget"]).sum(1)
        lost = -2 / BETA * F.logsigmoid(BETA * (before - logp)).mean()
        log_p = logits_of(model, batch["retain"])[:, :-1].log_softmax(-1)
        log_p = log_p[batch["retain"]["labels"][:, 1:] != -100]
        return lost + F.kl_div(other.log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1).mean()

    return loss


def live(model: Any) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    def reference(batch: Batch) -> tuple[Tensor, Tensor]:
        logits = [
            model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
            for rows in (batch["forget"], batch["retain"])
        ]
        supervised = batch["retain"]["labels"][:, 1:] != -100
        return token_logp(logits[0], batch["forget"]).sum(1), logits[1][:, :-1][supervised]

    return reference


def cached(forget: pu.ReferenceCache, retain: pu.ReferenceCache, device: str) -> Callable:
    weight = retain.head.weight.to(device)

    def reference(batch: Batch) -> tuple[Tensor, Tensor]:
        rows = batch["forget"]
        owner = (rows["labels"][:, 1:] != -100).nonzero()[:, 0]
        logp = forget.logp(rows["index"]).to(owner.device)
        before = logp.new_zeros(len(rows["labels"])).index_add(0, owner, logp)
        return before, retain.hidden(batch["retain"]["index"]).to(weight) @ weight.t()

    return reference


def ours(losses: TermLosses, packing: Packing | None) -> Loss:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        losses.packing = packing
        counts = {term.count: count_items(batch, *term.count) for term in losses.terms}
        return torch.stack(losses.term_losses(model, batch, counts)).sum()

    return loss


def ways(reference: nn.Module, caches: dict[str, pu.ReferenceCache], device: str) -> dict[str, Way]:
    losses = TermLosses([pu.objectives.get("npo", beta=BETA), "kl"], caches)
    levers = {
        "ours, rows padded": (None, None),
        "ours, rows packed": (Packing(share=False), None),
        "ours, rows packed, what they begin with shared": (Packing(), None),
        "ours, packed, shared and compiled": (Packing(), Compiling()),
    }
    return {
        FIRST: Way(plain(live(reference))),
        "plain, cached reference": Way(plain(cached(caches["forget"], caches["retain"], device))),
        **{name: Way(ours(losses, packing), packing, compiling) for name, (packing, compiling) in levers.items()},
    }


def study(args: argparse.Namespace) -> dict[str, Any]:
    model, pairs, name = load(args)
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        build = pu.ReferenceCache.build
        caches = {
            "forget": build(reference, pairs.forget, f"{folder}/forget", progress=False),
            "retain": build(reference, pairs.retain, f"{folder}/retain", kl=True, progress=False),
        }
        generator = torch.Generator(args.device).manual_seed(0)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, device=args.device)
            weight.add_(noise * OFF * (weight.std() if weight.numel() > 1 else 1))
        with torch.enable_grad():
            return measure(args, model.train(), reference, pairs, caches, name)


def measure(
    args: argparse.Namespace, model: Any, reference: Any, pairs: Any, caches: dict[str, pu.ReferenceCache], name: str
) -> dict[str, Any]:
    size, count = args.batch_size, min(args.batches, len(pairs) // args.batch_size)
    batches = [pairs.collate([pairs[j] for j in range(i * size, (i + 1) * size)]) for i in range(count)]
    batches = [
        {kind: {key: value.to(args.device) for key, value in rows.items()} for kind, rows in batch.items()}
        for batch in batches
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    found = ways(reference, caches, args.device)
    exact_loss, exact = oracle(model, reference, batches[0])

    def step(way: str, batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        with found[way].around(model):
            value = found[way].loss(model, batch)
            value.backward()
        optimizer.step()
        return float(value.detach())

    results: dict[str, dict[str, Any]] = {}
    for way, (_, packing, compiling) in found.items():
        value = step(way, batches[0])  # tries, and takes the optimiser's memory
        off = sum(float((p.grad.double() - g).square().sum()) for p, g in zip(model.parameters(), exact, strict=True))
        norm = sum(float(g.square().sum()) for g in exact)
        results[way] = {
            "loss_error": abs(value - exact_loss) / abs(exact_loss),
            "gradient_error": (off / norm) ** 0.5,
            "held_bytes": held(model, reference if way == FIRST else None, caches["retain"]),
            "packing": None if packing is None else packing.as_dict(),
            "compiling": None if compiling is None else compiling.as_dict() | {"seconds": compiling.seconds},
            "tokens": None,
        }
        print(way, results[way], flush=True)
    del exact
    for way, (_, packing, _) in found.items():
        optimizer.zero_grad(set_to_none=True)
        release()
        before = 0 if packing is None else packing.tokens
        results[way]["step_bytes"] = peak_bytes(partial(step, way, batches[0]), args.device)
        results[way]["tokens"] = sum(rows["input_ids"].numel() for rows in batches[0].values())
        if packing is not None and packing.as_dict()["used"]:
            results[way]["tokens"] = packing.tokens - before
    wall: dict[str, list[list[float]]] = {way: [] for way in found}
    cpu: dict[str, list[list[float]]] = {way: [] for way in found}
    for turn in range(args.rounds):
        for way in found:
            wall[way].append([])
            cpu[way].append([])
        for batch in batches:
            for way in found:
                synchronize(args.device)
                start, used = time.perf_counter(), time.process_time()
                step(way, batch)
                synchronize(args.device)
                wall[way][turn].append(time.perf_counter() - start)
                cpu[way][turn].append(time.process_time() - used)
        print({way: [round(each, 2) for each in own[turn]] for way, own in wall.items()}, flush=True)
    for way, result in results.items():
        result |= {"seconds": wall[way], "cpu_seconds": cpu[way]}
    labels = [rows["labels"][:, 1:] for batch in batches for rows in batch.values()]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "batch_size": size,
        "batches": count,
        "rounds": args.rounds,
        "positions": sum(rows["input_ids"].numel() for batch in batches for rows in batch.values()),
        "real": sum(int(rows["attention_mask"].sum()) for batch in batches for rows in batch.values()),
        "supervised": sum(int((each != -100).sum()) for each in labels),
        "threads": torch.get_num_threads(),
        "device": machine(args.device)["name"],
        "versions": versions(args.device),
        "commit": commit(),
        "ways": results,
    }


def oracle(model: Any, reference: Any, batch: Batch) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the plain step in float64."""
    exact = copy.deepcopy(model).double()
    # transformers 5.x renamed it; without it the activations of this one step would need more memory than all others
    getattr(exact, "activation_checkpointing_enable", exact.gradient_checkpointing_enable)()
    value = plain(live(copy.deepcopy(reference).double()))(exact, batch)
    gradients = torch.autograd.grad(value, [*exact.parameters()])
    return float(value.detach()), list(gradients)


def held(model: Any, reference: Any, cache: pu.ReferenceCache) -> int:
    """Bytes between steps: weights, AdamW's two moments of them, and of the reference all, or the head."""

    def size(weights: Any) -> int:
        return sum(weight.numel() * weight.element_size() for weight in weights)

    return 3 * size(model.parameters()) + size([cache.head.weight] if reference is None else reference.parameters())


def best(samples: list[list[float]]) -> float:
    """Seconds of a step: the least of the rounds, the mean of the batches."""
    return statistics.fmean(map(min, zip(*samples, strict=True)))


def markdown(record: dict[str, Any]) -> str:
    ways = record["ways"]
    memory = {way: own["held_bytes"] + own["step_bytes"] for way, own in ways.items()}
    times = {way: best(own["seconds"]) for way, own in ways.items()}
    lines = [
        f"# Steps of NPO + KL on rows of TOFU: {record['model']}",
        "",
        f"{record['batches']} steps of {record['batch_size']} forget and {record['batch_size']} retain rows: "
        f"{record['positions']:,} positions, {record['real']:,} of them real, {record['supervised']:,} supervised; "
        f"{record['parameters'] / 1e6:.1f} million parameters in float32; {record['device']}, {record['threads']} "
        f"threads, torch {record['versions']['torch']}, transformers {record['versions']['transformers']}, commit "
        f"{record['commit']}. In turns; of each batch the least of {record['rounds']} rounds, and of the batches the "
        "mean. Memory is weights, optimiser, reference and what a step takes; positions are those of the first step "
        "that go through the model with gradients; errors are against the plain step in float64, as shares.",
        "",
        "| step | ms | CPU ms | times as fast | MiB | of the first's | positions | error of loss | of gradient |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, own in ways.items():
        figures = [
            f"{1e3 * times[way]:.0f}", f"{1e3 * best(own['cpu_seconds']):.0f}", f"{times[FIRST] / times[way]:.2f}",
            f"{memory[way] / 2**20:.0f}", f"{memory[way] / memory[FIRST]:.2f}", f"{own['tokens']}",
            f"{own['loss_error']:.1e}", f"{own['gradient_error']:.1e}",
        ]  # fmt: skip
        lines.append(f"| {way} | {' | '.join(figures)} |")
    last = [*ways][-1]
    faster, leaner = times[FIRST] / times[last], memory[last] / memory[FIRST]
    lines += [
        "",
        "| target | found | set out for | |",
        "|---|---:|---:|---|",
        f"| times as fast | {faster:.2f} | at least {FASTER} | {'met' if faster >= FASTER else 'missed'} |",
        f"| of the memory | {leaner:.2f} | at most {LEANER} | {'met' if leaner <= LEANER else 'missed'} |",
    ]
    told = [f"{way}: made and tried in {own['compiling']['seconds']:.0f} s before its first step, which no time has."
            for way, own in ways.items() if (own["compiling"] or {}).get("used")]  # fmt: skip
    told += [f"{way}: {name} is not used: {why}." for way, own in ways.items()
             for lever in ("packing", "compiling")
             for name, why in ((own[lever] or {}).get("declined") or {}).items()]  # fmt: skip
    return "\n".join([*lines, *([""] if told else []), *told]) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.tofu_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=MODEL, help=f"folder or GGUF file (default {MODEL})")
    parser.add_argument("--data", default=os.environ.get("PYUNLEARN_TOFU", "tofu"), help="folder with TOFU's files")
    parser.add_argument("--toy", action="store_true", help="a tiny model, data made here")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of each set in a step (default 8)")
    parser.add_argument("--batches", type=int, default=5, help="steps of a round (default 5: forget01 once)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    record = study(args)
    if wrong := {way: own["loss_error"] for way, own in record["ways"].items() if not own["loss_error"] < TOLERANCE}:
        raise SystemExit(f"losses are off by {wrong}")
    out = args.out or RESULTS / machine(args.device)["folder"]
    write_text(out / "tofu_step.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "tofu_step.md", markdown(record))
    print(f"{markdown(record)}\nwrote {out}/tofu_step.json and .md")
    return 0


if __name__ == "__main__":
    main()
