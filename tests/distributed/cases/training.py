"""Trainings on two processes: DDP against one process, probes, and the sampler."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, TrainingArguments

from pyunlearn import objectives
from pyunlearn.data import collate
from pyunlearn.integrations.transformers import loss_func
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.dual import Dual
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.probe import GEffectCallback, Probe
from pyunlearn.training.sampling import ForgetSampler, Forgotten
from pyunlearn.training.settings import GEffectConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.start import Start
from pyunlearn.training.terms import TermLosses
from pyunlearn.training.trainer import NonFiniteLossError, UnlearnTrainer
from pyunlearn.training.unlearn import UnlearnData, unlearn
from tests.tiny import Tiny
from tests.training.test_equalities import KINDS, objective

from . import joins_itself

STOCK: dict[str, dict[str, float]] = {"ga": {}, "simnpo": {"beta": 0.3}, "npo": {}}
SGD = {"optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def make_arguments(folder: Path, batch_size: int, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "out"), per_device_train_batch_size=batch_size, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        use_cpu=True, **changes,
    )  # fmt: skip


def parameters(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def evaluated(trainer: UnlearnTrainer) -> dict[str, float]:
    metrics = trainer.evaluate(trainer.train_dataset)
    return {name: value for name, value in metrics.items() if name.endswith("loss")}


def stock_trainer(tiny: Tiny, args: TrainingArguments, name: str) -> Trainer:
    """transformers' own, with an objective as its loss."""
    loss = loss_func(name, reference=tiny.model(seed=1) if name == "npo" else None, **STOCK[name])
    trainer = Trainer(
        tiny.model(), args, train_dataset=tiny.forget, compute_loss_func=loss,
        data_collator=lambda rows: collate(rows, tiny.forget.pad_token_id),
    )  # fmt: skip
    loss.attach(trainer)
    return trainer


def moving_trainer(tiny: Tiny, args: TrainingArguments, every: str = "step") -> UnlearnTrainer:
    """Half of each sequence's tokens count, and the retain term's coefficient moves."""
    terms = [objectives.get("ga", keep=0.5), objectives.get("gd", keep=0.5, kept="largest", temperature=2.0)]
    dual = Dual(above_reference=0.01, step=5.0, every=every)
    return UnlearnTrainer(model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=terms, dual=dual)


@joins_itself
def stock(folder: Path) -> dict[str, Any]:
    """Two steps of 2 processes x 2 samples x 2 micro-batches by transformers' own Trainer."""
    tiny, results = Tiny(), {}
    for name in STOCK:
        args = make_arguments(folder, 2, max_steps=2, remove_unused_columns=False, **SGD)
        trainer = stock_trainer(tiny, args, name)
        trainer.train()
        results[name] = parameters(trainer.model)
    return results


class PoisonRankOne(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1:
            with torch.no_grad():
                model.get_output_embeddings().weight[5] = math.nan


@joins_itself
def ddp(folder: Path) -> dict[str, Any]:
    """Two steps of 2 processes x 2 samples x 2 micro-batches, then a NaN on rank 1."""
    tiny = Tiny()

    def trainer(objectives=("wga", "npo", "gd"), **options) -> UnlearnTrainer:
        return UnlearnTrainer(
            model=tiny.model(), args=make_arguments(folder, 2, max_steps=2, **SGD), train_dataset=tiny.pairs(),
            objectives=objectives, reference=tiny.model(seed=1), **options,
        )  # fmt: skip

    good = trainer()
    good.train()
    hidden = trainer(("rmu", "rr"))  # the blocks above the layer get no gradient
    hidden.train()
    moving = {}
    for every in ("step", "micro_batch"):
        mover = moving_trainer(tiny, make_arguments(folder, 2, max_steps=2, **SGD), every)
        mover.train()
        moving[every] = parameters(mover.model), mover.dual.memory.value
    error = ""
    try:
        trainer(callbacks=[PoisonRankOne()]).train()
    except NonFiniteLossError as caught:
        error = str(caught)
    log = [row for row in good.state.log_history if "loss" in row]
    after, misdirected = parameters(good.model), parameters(hidden.model)
    return {
        "moving": moving,
        "parameters": after,
        "misdirected": misdirected,
        "log": log,
        "error": error,
    }


@joins_itself
def equal(folder: Path) -> dict[str, Any]:
    """Every objective: losses before, then two steps of 2 processes x 1 sample x 2 micro-batches."""
    tiny, results = Tiny(), {}
    for name in objectives.names():
        args = make_arguments(folder, 1, max_steps=2, per_device_eval_batch_size=3, **SGD)
        trainer = UnlearnTrainer(
            model=tiny.model(), args=args, train_dataset=tiny.pairs(**KINDS, **tiny.written),
            objectives=[objective(name)], reference=tiny.model(seed=1),
        )  # fmt: skip
        before = evaluated(trainer)
        trainer.train()
        results[name] = {"before": before, "parameters": parameters(trainer.model)}
    return results


@joins_itself
def probe(folder: Path) -> dict[str, Any]:
    """A training under DDP with probes and without, then a probe of a sharded model."""
    tiny, terms = Tiny(), ["npo", "gd"]
    reference, metrics = tiny.model(seed=1).eval(), folder / "metrics.jsonl"
    rows = {"forget": tiny.forget, "retain": tiny.retain}
    measured = Probe(TermLosses(terms, reference), rows, GEffectConfig(batch_size=4))

    def trained(*callbacks: GEffectCallback) -> Tensor:
        trainer = UnlearnTrainer(
            model=tiny.model(), args=make_arguments(folder, 2, max_steps=2, learning_rate=1e-3),
            train_dataset=tiny.pairs(), objectives=terms, reference=tiny.model(seed=1), callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
        return parameters(trainer.model)

    plain, probed = trained(), trained(GEffectCallback(measured, metrics, "unlearn", 1))
    torch.distributed.barrier()
    model = tiny.model()
    shard(model)
    return {"plain": plain, "probed": probed, "rows": read_metrics(metrics), "sharded": measured.measure(model)}


@joins_itself
def sampling(folder: Path) -> dict[str, Any]:
    """Four steps of 2 processes x 1 sample x 2 micro-batches, drawn by MRD."""
    tiny = Tiny()
    pairs = tiny.pairs()
    sampler = ForgetSampler(pairs.forget, refresh_steps=2, forgotten=Forgotten(ngram=2, every_steps=2))
    trainer = UnlearnTrainer(
        model=tiny.model(), args=make_arguments(folder, 1, max_steps=4, **SGD), train_dataset=pairs,
        objectives=["ga", "gd"], sampler=sampler,
    )  # fmt: skip
    trainer.train()
    return {"parameters": parameters(trainer.model), "memory": asdict(sampler.memory)}


def grow(model: Any) -> None:
    """What a training might do, without one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


@joins_itself
def start(folder: Path) -> dict[str, Any]:
    """A training under DDP; then models that are sharded before their weights are kept, and afterwards, as accelerate
    does. Each process has a folder of its own there, as on hosts without a common disk."""
    tiny = Tiny()
    model, data = tiny.model(), UnlearnData(tiny.world.forget, tiny.world.retain, [])
    settings = UnlearnConfig(forget="ga", retain=[], batch_size=2, max_steps=2, learning_rate=1e-2)
    told = unlearn(Stage(TrainingFolder(folder / "work")), settings, model, tiny.tokenizer, data)
    results = {"trained": told.mean_absolute_change, "parameters": parameters(model), "error": ""}
    for sharded in ("before", "after"):
        model = tiny.model()
        own = Start(Stage(TrainingFolder(folder / sharded / str(torch.distributed.get_rank()))), "unlearn")
        for step in ("before", "after"):
            if step == sharded:
                shard(model)
            if step == "before":
                own.keep(model)
        results[f"written, {sharded}"] = own.path.exists()
        grow(model)
        results[sharded] = own.mean_absolute_change(model)
    with mock.patch("pyunlearn.store.save_file", side_effect=OSError(28, "No space left on device")):
        try:
            own.keep(model)
        except OSError as error:
            results["error"] = str(error)
    return results
