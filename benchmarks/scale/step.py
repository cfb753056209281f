"""Whole training steps: ours with the reference cache against the plain Hugging Face step with a live reference.

A step is a forget and a retain batch of 8 x 256 tokens each, every next token supervised, one backward of the summed
losses, one step of fused AdamW on parameters in bfloat16. Ours runs the decoder, and the head inside
linear_token_stats; what the reference says comes from files made once (`ReferenceCache`; making them is not timed).
The plain step takes the model's logits and, for both models, the float32 log_softmax of all of them.
Both start from the same weights, and both losses of the first batches must agree. Memory is all that is allocated:
weights, gradients, optimiser and activations, and in the plain step the reference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyunlearn as pu
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_hidden
from pyunlearn.model.head import head_stats
from pyunlearn.objectives import TokenInputs
from pyunlearn.ops import backends

from ..kernels.run import Chosen, Session, line
from ..measure import flush_buffer, peak_bytes, release, spread, timed
from ..results import Record
from ..shapes import SHAPES, random_llama

SIZES = ("1B", "8B")
FORGET: dict[str, tuple[str, dict[str, Any]]] = {"NPO": ("npo", {"beta": 0.1}), "WGA": ("wga", {"alpha": 1.0})}
BATCHES = 4  # the steps rotate through so many
TOLERANCE = 5e-3  # relative: logits are bfloat16 on both sides, the order of their products may differ


@dataclass
class Step:
    """One training step under a name: `objective` of FORGET on the forget batch, KL on the retain batch."""

    op = "step"
    shape: str
    objective: str
    device: str
    batch_size: int = 8
    length: int = 256

    @property
    def name(self) -> str:
        return f"{self.objective} + KL, {self.shape}, batch {self.batch_size} x {self.length}"

    dtype = torch.bfloat16
    bytes = 0

    @property
    def n(self) -> int:
        return 2 * self.batch_size * self.length

    @property
    def v(self) -> int:
        return SHAPES[self.shape]["vocab_size"]

    @property
    def h(self) -> int:
        return SHAPES[self.shape]["hidden_size"]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return random_llama(self.shape, self.device, self.dtype, max_position_embeddings=self.length).train()

    def rows(self, seed: int) -> list[dict[str, Tensor]]:
        """A data set: BATCHES batches of random tokens, all supervised."""
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.v, (BATCHES * self.batch_size, self.length), generator=g)
        return [{"input_ids": row, "labels": row} for row in ids]

    def batch(self, rows: list[dict[str, Tensor]], i: int) -> dict[str, Tensor]:
        at = slice(i % BATCHES * self.batch_size, (i % BATCHES + 1) * self.batch_size)
        ids = torch.stack([row["input_ids"] for row in rows[at]]).to(self.device)
        index = torch.arange(len(rows))[at]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "index": index}


def run(session: Session, chosen: Chosen = Chosen()) -> int:  # noqa: B008
    """Measures every step that is chosen and not in the file yet. Returns an exit status."""
    for shape in ("toy",) if session.small else SIZES:
        for objective in FORGET:
            step = Step(shape, objective, session.device, *((2, 16) if session.small else ()))
            order = backends.ORDER.get(torch.device(session.device).type, ())
            names = [name for name in order if name == "eager" or not backends.unavailable(name)]
            if not chosen.case(step):
                continue
            if session.late() or all(session.records.has(session.blank(step, name)) for name in names):
                continue
            for record in measure(session, step, sorted(names, key=lambda name: name != "eager")):
                session.records.add(record)
                print(line(record), flush=True)
    return 0


def measure(session: Session, step: Step, names: list[str]) -> Iterator[Record]:
    """The plain step first ("eager"), then ours by backend, whose first loss is held against the plain one's."""
    forget, retain = step.rows(1), step.rows(2)
    batches = [(step.batch(forget, i), step.batch(retain, i)) for i in range(BATCHES)]
    with tempfile.TemporaryDirectory() as folder:
        caches = build_caches(step, forget, retain, Path(folder))
        expected: list[float] = []
        for name in names:
            record = session.blank(step, name)
            try:
                loss = partial(plain, step, step.model(1)) if name == "eager" else ours(step, caches, name)
                model = step.model(0)
                with torch.no_grad():
                    first = loss(model, *batches[0]).tolist()
                if name == "eager":
                    expected = first
                elif not all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(first, expected, strict=True)):
                    raise ValueError(f"the first losses are {first}, the plain step's {expected}")
                record |= train(step, model, loss, batches)
            except (RuntimeError, ValueError) as error:  # out of memory is a result
                record["failed"] = f"{type(error).__name__}: {error}"[:300]
            loss = model = None  # type: ignore[assignment]  # their memory is given back before the next starts
            release()
            yield record


def build_caches(step: Step, forget: list, retain: list, folder: Path) -> tuple[pu.ReferenceCache, pu.ReferenceCache]:
    reference = step.model(1).eval()
    build = partial(pu.ReferenceCache.build, reference, batch_size=step.batch_size, progress=False)
    return build(forget, folder / "forget"), build(retain, folder / "retain", kl=True)


def train(step: Step, model: nn.Module, loss: Callable, batches: list) -> Record:
    """`peak_bytes` and `time_ms` of training steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def once(pair: tuple) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, *pair).sum().backward()
        optimizer.step()

    once(batches[0])  # the optimiser takes its memory
    flush_buffer.cache_clear()
    release()
    held = torch.cuda.memory_allocated() if step.device != "cpu" else 0
    peak = held + peak_bytes(lambda: once(batches[1]), step.device)
    seconds = 3.0 if step.shape != "toy" else 0.01
    return {"peak_bytes": peak, "time_ms": spread(timed(lambda i: batches[i % BATCHES], once, step.device, seconds))}


def plain(step: Step, reference: nn.Module, model: nn.Module, forget: dict, retain: dict) -> Tensor:
    """(2,): forget and retain loss, as they are written with transformers and torch alone."""
    logp = token_logp(model, forget)
    if step.objective == "NPO":
        with torch.no_grad():
            ref_logp = token_logp(reference, forget)
        beta = FORGET["NPO"][1]["beta"]
        lost = -2 / beta * F.logsigmoid(beta * (ref_logp.sum(-1) - logp.sum(-1))).mean()
    else:
        lost = (FORGET["WGA"][1]["alpha"] * logp.detach()).exp().mul(logp).mean()
    log_p = model(retain["input_ids"], attention_mask=retain["attention_mask"]).logits[:, :-1].float().log_softmax(-1)
    with torch.no_grad():
        logits = reference(retain["input_ids"], attention_mask=retain["attention_mask"]).logits
        log_q = logits[:, :-1].float().log_softmax(-1)
    return torch.stack([lost, F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()])


def token_logp(model: nn.Module, batch: dict) -> Tensor:
    """(B, T - 1)"""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(-1, batch["labels"][:, 1:].unsqueeze(-1)).squeeze(-1)


def ours(step: Step, caches: tuple[pu.ReferenceCache, pu.ReferenceCache], backend: str) -> Callable:
    """The same losses from per-token statistics; the reference's head is moved to the device once."""
    name, options = FORGET[step.objective]
    forget_loss, retain_loss = pu.objectives.get(name, **options), pu.objectives.get("kl")
    ref_head = caches[1].head
    ref_head = ref_head._replace(weight=ref_head.weight.to(step.device))

    def inputs(states: Any, stats: pu.TokenStats, ref_logp: Tensor | None = None) -> dict[str, TokenInputs]:
        return {"answer": TokenInputs(stats.as_dict(), ref_logp, states.sequence_ids, states.num_sequences, step.v)}

    def loss(model: nn.Module, forget: dict, retain: dict) -> Tensor:
        head = CausalLM.of(model).read_head()
        states = supervised_hidden(model, forget)
        stats = head_stats(head, states.hidden, states.targets, backend=backend)
        ref_logp = caches[0].logp(forget["index"]).to(step.device) if name == "npo" else None
        lost = forget_loss(inputs(states, stats, ref_logp))
        states = supervised_hidden(model, retain)
        reference = (caches[1].hidden(retain["index"]).to(step.device), ref_head)
        stats = head_stats(head, states.hidden, states.targets, "kl_pq", reference=reference, backend=backend)
        return torch.stack([lost, retain_loss(inputs(states, stats))])

    return loss
