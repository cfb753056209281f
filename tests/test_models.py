"""What runs on which kind of causal language model, measured on a tiny one of each: the table of docs/models.md.

PYUNLEARN_WRITE_DOCS=1 writes the table; without it the test fails where the page tells anything else.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

import pyunlearn as pu
from pyunlearn.data import QA, ForgetRetainDataset, QADataset
from pyunlearn.data.tiny import train_tokenizer
from pyunlearn.geffect import gradient_of, pointwise_g_effect
from pyunlearn.metrics import Kept, read_rows
from pyunlearn.model.forward import supervised_hidden, supervised_stats
from pyunlearn.model.packing import PACKED, Packing
from pyunlearn.model.reference import AdapterOff

from .model.test_packed import make_rows
from .model.zoo import V, make

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
VOCABULARY = 260
AS_MOST = {"sliding_window": 64, "alibi": False}  # of the architectures that may have either
KINDS = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "opt",
     "falcon", "bloom", "mpt", "olmo2", "granite", "smollm3", "stablelm", "cohere", "mixtral", "qwen2_moe", "qwen3_moe",
    "gpt_oss", "deepseek_v2", "deepseek_v3", "mamba", "mamba2", "rwkv", "jamba", "bamba",
)  # fmt: skip
# heads, which tests of their own adapt; what peft refuses in a Mamba; what a Mamba reads without calling it
NOT_ADAPTED = {"lm_head", "head", "embed_out", "out_proj", "dt_proj"}
SIGMA, SEED, DRAWS = 1e-3, 5, 2
SAMPLES = [torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 6)]
CUT = 2  # tokens of a prompt
BATCH = {"input_ids": nn.utils.rnn.pad_sequence(SAMPLES, True, 0)}
BATCH["attention_mask"] = (BATCH["input_ids"] != 0).long()
BATCH["labels"] = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)
BATCH["labels"][:, :CUT] = -100
WINDOW = torch.stack([ids[:5] for ids in SAMPLES])  # (2, 5): of one length

logging.set_verbosity_error()
logging.disable_progress_bar()


class No(Exception):
    """What does not run, as it says itself."""


# ---- straight versions -----------------------------------------------------------------------------------------------


def nll(model: Any, ids: Tensor) -> Tensor:
    """(N,) L_t of one sample's scored tokens."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0, CUT - 1 : -1]
    return F.cross_entropy(logits, ids[CUT:], reduction="none")


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, [*named.values()], allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def product(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([(a[name].double() * b[name].double()).sum() for name in a.keys() & b.keys()]).sum()


@torch.no_grad()
def shaken(model: Any, sign: int, relative: bool) -> Tensor:
    """(draws, samples): sum_t (P - P') / P, or sum_t P - P', on each sample alone."""
    clean, rows = [nll(model, ids) for ids in SAMPLES], []
    for draw in range(DRAWS):
        with pu.perturbed(model, sigma=SIGMA, seed=SEED, draw=draw, sign=sign):
            moved = [nll(model, ids) for ids in SAMPLES]
        rows.append([((a - b) / (a if relative else -1)).sum() for a, b in zip(clean, moved, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def bends(model: Any, ids: Tensor) -> Tensor:
    """(draws,) z'Mz, by two backwards."""
    named, loss, found = dict(model.named_parameters()), nll(model, ids), []
    total = (loss / loss.detach()).sum()
    first = torch.autograd.grad(total, [*named.values()], create_graph=True, allow_unused=True)
    for k in range(DRAWS):
        noise = {n: pu.gaussian_noise(p.numel(), seed=SEED, draw=k, name=n).view_as(p).to(p) for n, p in named.items()}
        along = sum((g * noise[n]).sum() for n, g in zip(named, first, strict=True) if g is not None)
        found.append(product(gradients(model, along), noise))
    return torch.stack(found)


# ---- cells: each runs one thing, holds it to its straight version, and tells how it ran -----------------------------


def score(model: Any, estimator: str) -> Any:
    options: Any = {"sigma": SIGMA, "seed": SEED, "check_draws": 0, "progress": False, "sigma_eval": SIGMA}
    return pu.mrd(model, [BATCH], estimator, DRAWS, **options)


def close(found: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * float(expected.abs().max()))


def run(name: str, model: Any, folder: Path) -> str:
    """A step of npo + kl."""
    items, tokenizer = [QA(f"What is {i}?", f"It is {i + 1}.") for i in range(4)], train_tokenizer(["It"], VOCABULARY)
    model = make(name, **AS_MOST, vocab_size=VOCABULARY)
    before = copy.deepcopy(model)
    forget, retain = (QADataset(part, tokenizer, 64) for part in (items[:2], items[2:]))
    arguments: Any = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 2}
    quiet: Any = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    trainer = pu.UnlearnTrainer(
        model=model,
        args=TrainingArguments(str(folder), **arguments, **quiet, dataloader_pin_memory=False),
        train_dataset=ForgetRetainDataset(forget, retain),
        objectives=["npo", "kl"],
        reference=copy.deepcopy(before),
    )
    assert math.isfinite(trainer.train().training_loss)
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
    return "yes"


def algorithm1(name: str, model: Any, folder: Path) -> str:
    close(score(model, "algorithm1").value, shaken(model, 1, True).abs().mean(0), 1e-4)
    return "yes"


def gradient(name: str, model: Any, folder: Path) -> str:
    norms = [gradients(model, nll(model, ids).log().sum()) for ids in SAMPLES]
    expected = torch.stack([product(each, each).sqrt() for each in norms])
    result = score(model, "gradient")
    close(result.value, SIGMA * math.sqrt(2 / math.pi) * expected, 1e-5)
    return "a sample" if "one backward a batch" in result.diagnostics["declined"] else "yes"


def definition(name: str, model: Any, folder: Path) -> str:
    pairs = (shaken(model, 1, True) + shaken(model, -1, True)) / 2
    close(score(model, "definition").value, pairs.mean(0).abs(), 1e-2)
    return "yes"


def hutchinson(name: str, model: Any, folder: Path) -> str:
    try:
        found = score(model, "hutchinson").draws
    except TypeError as error:
        raise No(str(error).partition("(")[2].rpartition(")")[0]) from None
    close(found, torch.stack([bends(model, ids) for ids in SAMPLES], 1), 1e-3)
    return "yes"


def initial(name: str, model: Any, folder: Path) -> str:
    close(score(model, "initial").value, shaken(model, 1, False).abs().mean(0), 1e-4)
    return "yes"


def losses(model: Any, batch: Any) -> Tensor:
    ids = batch["ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def geffect(name: str, model: Any, folder: Path) -> str:
    parts = [lambda m, i=i: losses(m, {"ids": WINDOW[i : i + 1]}).sum() for i in (0, 1)]
    effect = pu.g_effect(model, parts[0], {"other": parts[1]})
    close(torch.tensor(effect.total["other"]), product(*(gradients(model, part(model)) for part in parts)), 1e-5)
    return "yes"


def pointwise(name: str, model: Any, folder: Path) -> str:
    direction = gradient_of(model, lambda m: losses(m, {"ids": WINDOW.flip(1)}).sum())
    points = pointwise_g_effect(model, {"ids": WINDOW}, losses, direction)
    expected = [product(gradients(model, losses(model, {"ids": ids[None]}).sum()), direction) for ids in WINDOW]
    close(points.total, torch.stack(expected), 1e-5)
    return "yes" if points.declined is None else "a sample"


def lora(name: str, model: Any, folder: Path) -> str:
    """Gradients reach the adapters and nothing else; with adapters off the model is its own reference."""
    plain = supervised_stats(model, BATCH)[0].logp.detach()
    linear = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    config = peft.LoraConfig(r=2, target_modules=sorted(linear - NOT_ADAPTED))
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    logp = supervised_stats(adapted, BATCH)[0].logp
    logp.sum().backward()
    assert all((p.grad is not None) == p.requires_grad == ("lora_" in n) for n, p in adapted.named_parameters())
    close(AdapterOff(adapted).scalars(BATCH)["logp"], plain, 1e-6)
    assert not torch.allclose(logp, plain)
    return "yes"


def shared_prompts(name: str, model: Any, folder: Path) -> str:
    model.float()
    rows, kept = make_rows(), Kept(None, model)
    together = read_rows(model, rows, batch_size=8, kept=kept, progress=False)
    for one, row in zip(together, rows, strict=True):
        torch.testing.assert_close(one.logp, read_rows(model, [row], progress=False)[0].logp, atol=2e-4, rtol=0)
    if (reason := kept.declined.get("shared prompts")) is not None:
        raise No(reason.replace(type(model).__name__, "the model"))
    return "yes"


def packed_rows(name: str, model: Any, folder: Path) -> str:
    with Packing() as packing:
        found = packing.hidden(model, {"": BATCH}, {"": "supervised"}).get("")
    if found is None:
        raise No(packing.declined[PACKED].replace(type(model).__name__, "the model"))
    alone = [{key: value[i : i + 1] for key, value in BATCH.items()} for i in range(len(SAMPLES))]
    close(found.hidden, torch.cat([supervised_hidden(model, row).hidden for row in alone]), 1e-6)
    return "yes"


CELLS: dict[str, Callable[[str, Any, Path], str]] = {
    "run": run, "algorithm1": algorithm1, "gradient": gradient, "definition": definition, "hutchinson": hutchinson,
    "initial": initial, "G-effect": geffect, "pointwise": pointwise, "LoRA": lora, "shared prompts": shared_prompts,
    "packed rows": packed_rows,
}  # fmt: skip


def measure(folder: Path) -> str:
    """The table, and below it why what does not run does not."""
    reasons: list[str] = []
    lines = [f"| kind | {' | '.join(CELLS)} |", "|---|" + "---|" * len(CELLS)]
    for name in KINDS:
        model, row = make(name, torch.float64, **AS_MOST), [name]
        model.set_experts_implementation("eager")  # in float64
        for cell in CELLS.values():
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    row.append(cell(name, copy.deepcopy(model), folder))
            except No as error:
                if (reason := re.sub(r"\s+", " ", str(error))) not in reasons:
                    reasons.append(reason)
                row.append(f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", *(f"({i}) {reason}\n" for i, reason in enumerate(reasons, 1))])


def test_the_page_tells_what_was_measured(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    measured = f"{before}{BEGIN}{measure(tmp_path)}{END}{after}"
    if os.environ.get("PYUNLEARN_WRITE_DOCS"):
        PAGE.write_text(measured, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == measured, "PYUNLEARN_WRITE_DOCS=1 writes the table anew"
