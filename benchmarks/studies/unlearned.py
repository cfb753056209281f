"""What the study of MRD repeats: a model that knows its samples, unlearned again and again, each result on disk."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

import pyunlearn as pu
from pyunlearn._files import write_json
from pyunlearn.data import QA, ForgetRetainDataset, QADataset, collate, load_qa
from pyunlearn.metrics import teacher_forced
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.load import load_model
from pyunlearn.recipes import recipe
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.job import Job, first_model, quiet_libraries
from pyunlearn.training.sampling import ForgetSampler, Forgotten
from pyunlearn.training.settings import TermConfig
from pyunlearn.training.terms import collect_needs, make_terms
from pyunlearn.training.trainer import UnlearnTrainer
from pyunlearn.training.unlearn import mean_absolute_change, trainable

Result = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """A model that knows forget and retain, before unlearning; `cells` keeps what was computed from it."""

    model: Any
    tokenizer: Any
    forget: list[QA]
    retain: list[QA]
    refusals: list[str]
    cells: Path

    def rows(self, items: Sequence[QA]) -> QADataset:
        return QADataset(items, self.tokenizer, CausalLM.of(self.model).context_length)

    def mrd(self, items: Sequence[QA], estimator: Any = "gradient", **options: Any) -> pu.MRDResult:
        rows = self.rows(items)
        batches = [collate([rows[i]], rows.pad_token_id) for i in range(len(rows))]
        return pu.mrd(self.model, batches, estimator, progress=False, **{"check_draws": 0, **options})

    def cell(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
        """The result under `name`, computed unless it is there with the same settings."""
        path, wanted = self.cells / f"{name}.json", json.loads(json.dumps(settings))
        if path.is_file() and (there := json.loads(path.read_text()))["settings"] == wanted:
            return there["result"]
        result = compute()
        write_json(path, {"settings": wanted, "result": result})
        print(f"{self.cells.name}/{name}", flush=True)
        return result


def embedded(seed: int, work: Path) -> Start:
    """The embedded world of this seed, learnt by heart by a model of this seed (kept in `work`)."""
    config = RunConfig.model_validate({"seed": seed, "output": str(work / f"seed{seed}" / "run")})
    job = Job.start(config, None, "the same command")
    job.folder.open(config, resume=True)
    model, tokenizer, _ = first_model(job)
    data = job.data
    return Start(model.eval(), tokenizer, data.forget, data.retain, data.refusals, work / f"seed{seed}")


def pretrained(model: str, forget: str, retain: str, retain_limit: int | None, work: Path) -> Start:
    """A model on disk (a folder or a GGUF file) that knows both files already."""
    quiet_libraries()
    path, gguf = Path(model), Path(model).suffix == ".gguf"
    loaded, tokenizer = load_model(str(path.parent), gguf_file=path.name) if gguf else load_model(str(path))
    refusals = ["I do not know.", "I have no information about that.", "I cannot answer this question."]
    return Start(loaded, tokenizer, load_qa(forget), load_qa(retain, limit=retain_limit), refusals, work / path.stem)


def unlearn(
    start: Start,
    method: str,
    forget: Sequence[QA],
    retain: Sequence[QA],
    *,
    seed: int = 0,
    steps: int,
    rate: float,
    batch_size: int,
    by: str = "uniform",
    refresh_steps: int = 10,
    forgotten: Mapping[str, Any] | None = None,
    evaluated: int = 100,
) -> Result:
    """A copy of the model after `steps` AdamW steps, or when all is forgotten: how it went and what is left.

    by: "shuffle" (the trainer's epochs), "uniform", "algorithm2" or "inverse". evaluated: retain samples looked at.
    """
    settings = recipe(method)
    given = [TermConfig.model_validate(term) for term in (*settings["forget"], *settings["retain"])]
    terms = [(term.objective(), term.coefficient) for term in given]
    needs = collect_needs(make_terms(terms))
    rows = start.rows(forget)
    pairs = ForgetRetainDataset(
        rows,
        start.rows(retain) if "retain" in needs else None,
        refusals=start.refusals,
        refuse=["forget"] if "forget_refusal" in needs else [],
        seed=seed,
    )
    sampler = None if by == "shuffle" else ForgetSampler(
        rows,
        None if by == "uniform" else by,
        refresh_steps=refresh_steps,
        seed=seed,
        forgotten=None if forgotten is None else Forgotten(**forgotten),
    )  # fmt: skip
    model = copy.deepcopy(start.model)
    before = {name: weight.detach().clone() for name, weight in trainable(model)}
    args = TrainingArguments(
        output_dir=str(start.cells / "trainer"), max_steps=steps, learning_rate=rate, lr_scheduler_type="constant",
        per_device_train_batch_size=batch_size, max_grad_norm=1.0, seed=seed, data_seed=seed, logging_steps=steps,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
    )  # fmt: skip
    reference = start.model if any(need.logp_reference for need in needs.values()) else None
    trainer = UnlearnTrainer(
        model=model, args=args, train_dataset=pairs, objectives=terms, reference=reference, sampler=sampler
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "change": mean_absolute_change(before, model),
        "limits": None if sampler is None else sampler.memory.limits,
        "refreshed_at": [] if sampler is None else sampler.memory.refreshed_at,
        "samples": [] if sampler is None else sampler.records(),
        "forget": known(model, rows),
        "retain": known(model, start.rows(retain[:evaluated])),
    }


def known(model: Any, rows: QADataset) -> dict[str, float]:
    """Mean probability and memorization accuracy."""
    read = teacher_forced(model, rows, progress=False)
    return {name: sum(row[name] for row in read) / len(read) for name in ("probability", "memorization_accuracy")}


class Study:
    """Settings of one study, and the models it starts from."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.small = args.samples is not None
        self._starts: dict[int, Start] = {}

    def start(self, seed: int) -> Start:
        if seed not in self._starts:
            args = self.args
            if args.model is None:
                self._starts[seed] = embedded(seed, args.work)
            else:
                self._starts[seed] = pretrained(args.model, args.forget, args.retain, args.retain_limit, args.work)
        return self._starts[seed]

    @property
    def seeds(self) -> range:
        return range(self.args.seeds)

    def run(self, name: str, seed: int, method: str, forget: Any, retain: Any, **options: Any) -> Result:
        """`unlearn`, kept. A pretrained model is one and the same for all seeds."""
        start = self.start(seed if self.args.model is None else 0)
        settings = {"method": method, "forget": [item.question for item in forget], "seed": seed, **options}
        return start.cell(name, settings, lambda: unlearn(start, method, forget, retain, seed=seed, **options))
