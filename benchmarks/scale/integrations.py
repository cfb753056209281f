"""One training step of others' trainers, theirs and with our losses in it, in turns: time, peak memory, loss.

    python -m benchmarks.scale.integrations             a Llama of 135 million random weights
    python -m benchmarks.scale.integrations --small     a toy, to try the code

A step is the loss of one batch and its backward, no optimiser: --batch pairs (or rows) of --length random tokens, half
of them the prompt. TRL's DPO, KTO and GRPO (which scores completions, and generates none here) have their own fused
head and, inside `accelerate_trl`, ours. Beside transformers' Trainer with `loss_func("wga")` stands the loss as it is
written with log_softmax; beside the trainer that OpenUnlearning loads, its NPO and retain loss with cross_entropy of
both models' logits. Writes integrations.json and integrations.md; needs trl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyunlearn._files import write_text
from pyunlearn.data.tiny import train_tokenizer
from pyunlearn.integrations.open_unlearning import register_trainers
from pyunlearn.integrations.transformers import loss_func
from pyunlearn.integrations.trl import accelerate_trl

from ..measure import commit, machine, peak_bytes, release, seconds, versions
from ..results import RESULTS
from ..shapes import random_llama

TOLERANCE = 1e-4  # of a loss, relative: sums over vocabularies in another order
Step = Callable[[], Tensor]


class Setting(NamedTuple):
    """What every case is made of."""

    shape: str
    batch: int
    length: int
    device: str
    folder: str

    def model(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return random_llama(self.shape, self.device, torch.float32, max_position_embeddings=self.length).train()

    def tokens(self, count: int, model: Any) -> list[int]:
        return torch.randint(3, model.config.vocab_size, (count,)).tolist()

    def rows(self, model: Any) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, the first half of each row not supervised."""
        ids = torch.randint(3, model.config.vocab_size, (self.batch, self.length), device=self.device)
        labels = ids.clone()
        labels[:, : self.length // 2] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def arguments(self) -> dict[str, Any]:
        return {"output_dir": self.folder, "report_to": [], "use_cpu": self.device == "cpu", "bf16": False}


class Pair(NamedTuple):
    """The same step twice."""

    theirs: Step
    ours: Step
    model: Any


def trl_pair(trainer: Any, loss: Callable[[Any], Tensor]) -> Pair:
    def step(inside: Any) -> Tensor:
        with inside:
            value = loss(trainer)
            value.backward()
        return value.detach()

    return Pair(lambda: step(nullcontext()), lambda: step(accelerate_trl()), trainer.model)


def texts(*columns: str, **more: Any) -> Any:
    """A data set for a trainer to be made with."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "none", **dict.fromkeys(columns, "none"), **more}] * 2)


def a_tokenizer() -> Any:
    return train_tokenizer(["none of the rows is a text"])


def batch_loss(setting: Setting, *answers: str, **more: Any) -> Callable[[Any], Tensor]:
    """The loss of one batch of random tokens, laid out as the trainer lays out its rows."""
    names = ("prompt_ids", *answers)

    def loss(trainer: Any) -> Tensor:
        rows = [
            {name: setting.tokens(setting.length // 2, trainer.model) for name in names} for _ in range(setting.batch)
        ]
        batch = trainer.data_collator([{**row, **{key: value(i) for key, value in more.items()}}
                                       for i, row in enumerate(rows)])  # fmt: skip
        return trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))

    return loss


def dpo(setting: Setting) -> Pair:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**setting.arguments(), max_length=None)
    trainer = DPOTrainer(setting.model(), setting.model(1), args, train_dataset=texts("chosen", "rejected"),
                         processing_class=a_tokenizer())  # fmt: skip
    return trl_pair(trainer, batch_loss(setting, "chosen_ids", "rejected_ids"))


def kto(setting: Setting) -> Pair:
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(**setting.arguments(), max_length=None, per_device_train_batch_size=2)
    trainer = KTOTrainer(setting.model(), setting.model(1), args, train_dataset=texts("completion", label=True),
                         processing_class=a_tokenizer())  # fmt: skip
    return trl_pair(trainer, batch_loss(setting, "completion_ids", "KL_completion_ids", label=lambda i: i % 2 == 0))


def grpo(setting: Setting) -> Pair:
    from trl import GRPOConfig, GRPOTrainer

    model = setting.model()
    args = GRPOConfig(**setting.arguments(), num_generations=2, per_device_train_batch_size=2)

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [0.0] * len(completions)

    trainer = GRPOTrainer(model, reward, args, train_dataset=texts(), processing_class=a_tokenizer())
    batch = setting.rows(model)

    def score(trainer: Any) -> Tensor:
        logp, entropy, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, batch["input_ids"], batch["attention_mask"], setting.length // 2, compute_entropy=True
        )
        return logp.mean() + entropy.detach().mean()

    return trl_pair(trainer, score)


def trainer_wga(setting: Setting) -> Pair:
    model = setting.model()
    batch, ours = setting.rows(model), loss_func("wga", alpha=1.0)
    inputs, labels = {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    count = (labels[:, 1:] != -100).sum()

    def plain(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        mask = labels[:, 1:] != -100
        log_p = outputs.logits[:, :-1].float().log_softmax(-1)
        logp = log_p.gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return (logp.detach().exp() * logp * mask).sum() / num_items_in_batch

    def step(loss: Callable) -> Tensor:
        value = loss(model(**inputs), labels, num_items_in_batch=count)
        value.backward()
        return value.detach()

    return Pair(lambda: step(plain), lambda: step(ours), model)


def open_unlearning_npo(setting: Setting) -> Pair:
    from transformers import Trainer, TrainingArguments

    registry: dict[str, Any] = {}
    register_trainers(registry, Trainer)
    model = setting.model(1)
    trainer = registry["pyunlearn_npo"](model=model, args=TrainingArguments(**setting.arguments()), beta=0.1)
    model.load_state_dict(setting.model().state_dict())  # away from the reference
    frozen = setting.model(1).eval()
    batch = {"forget": setting.rows(model), "retain": setting.rows(model)}

    def nll(one: Any, rows: dict[str, Tensor]) -> Tensor:
        logits = one(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), rows["labels"][:, 1:], reduction="none", ignore_index=-100)

    def theirs() -> Tensor:
        with torch.no_grad():
            before = nll(frozen, batch["forget"]).sum(1)
        forget = -2 / 0.1 * F.logsigmoid(0.1 * (nll(model, batch["forget"]).sum(1) - before)).mean()
        retained = nll(model, batch["retain"])
        value = forget + retained.sum() / (batch["retain"]["labels"][:, 1:] != -100).sum()
        value.backward()
        return value.detach()

    def ours() -> Tensor:
        value = trainer.compute_loss(model, batch)
        value.backward()
        return value.detach()

    return Pair(theirs, ours, model)


CASES: dict[str, Callable[[Setting], Pair]] = {
    "TRL DPO": dpo,
    "TRL KTO": kto,
    "TRL GRPO, scores": grpo,
    "Trainer, WGA": trainer_wga,
    "OpenUnlearning, NPO + NLL": open_unlearning_npo,
}


def measure(name: str, setting: Setting, rounds: int) -> dict[str, Any]:
    """A case's record. Raises SystemExit where the two losses are not the same."""
    torch.manual_seed(0)
    pair = CASES[name](setting)
    steps = {"theirs": pair.theirs, "ours": pair.ours}
    times: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):  # the first warms up
        for side, step in steps.items():
            torch.manual_seed(turn)  # the same rows
            pair.model.zero_grad(set_to_none=True)
            elapsed, loss = seconds(step, setting.device)
            losses[side] = float(loss)
            if turn:
                times[side].append(elapsed)
    peaks = {}
    for side, step in steps.items():
        torch.manual_seed(0)
        pair.model.zero_grad(set_to_none=True)
        release()
        peaks[side] = peak_bytes(step, setting.device)
    difference = abs(losses["ours"] - losses["theirs"]) / max(abs(losses["theirs"]), 1e-9)
    if not difference < TOLERANCE:
        raise SystemExit(f"{name}: the losses are {losses}")
    return {"case": name, "seconds": times, "peak_bytes": peaks, "loss": losses, "difference": difference}


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Training steps of others, theirs and ours",
        "",
        f"Llama of shape {record['shape']}, float32, batches of {record['batch']} x {record['length']} tokens; "
        f"{record['device']}, {record['threads']} threads, torch {record['versions']['torch']}, trl "
        f"{record['versions']['trl']}, commit {record['commit']}. In turns, medians of {record['rounds']}; memory is "
        "what a step takes beyond the weights, gradients included.",
        "",
        "| step | theirs, s | ours, s | theirs, MiB | ours, MiB | losses differ by |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in record["cases"]:
        times = [f"{statistics.median(one['seconds'][side]):.3g}" for side in ("theirs", "ours")]
        peaks = [f"{one['peak_bytes'][side] / 2**20:.0f}" for side in ("theirs", "ours")]
        lines.append(f"| {one['case']} | {' | '.join(times + peaks)} | {one['difference']:.0e} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale.integrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="135M", help="of benchmarks.shapes (default 135M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be given repeatedly")
    parser.add_argument("--small", action="store_true", help="a toy: does everything run?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    if args.small:
        args.shape, args.batch, args.length, args.rounds = "toy", 2, 16, 1
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args.shape, args.batch, args.length, args.device, folder)
        cases = []
        for name in args.case or CASES:
            cases.append(measure(name, setting, args.rounds))
            release()
            print({key: value for key, value in cases[-1].items() if key != "loss"}, flush=True)
    record = {
        **{key: getattr(args, key) for key in ("shape", "batch", "length", "rounds")},
        "threads": torch.get_num_threads(),
        "device": machine(args.device)["name"],
        "versions": versions(args.device),
        "commit": commit(),
        "cases": cases,
    }
    out = args.out or RESULTS / machine(args.device)["folder"]
    write_text(out / "integrations.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "integrations.md", markdown(record))
    print(f"{markdown(record)}\nwrote {out}/integrations.json and .md")
    return 0


if __name__ == "__main__":
    main()
