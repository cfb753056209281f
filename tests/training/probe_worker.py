"""Run by torchrun in test_probe.py: a training under DDP with probes and without, then a probe of a sharded model."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.probe import GEffectCallback, Probe
from pyunlearn.training.settings import GEffectConfig
from pyunlearn.training.terms import TermLosses
from pyunlearn.training.trainer import UnlearnTrainer
from tests.tiny import Tiny
from tests.two_processes import save_and_leave

TERMS = ["npo", "gd"]


def main(folder: Path) -> None:
    tiny = Tiny()
    reference, metrics = tiny.model(seed=1).eval(), folder / "metrics.jsonl"
    losses = TermLosses(TERMS, reference)
    probe = Probe(losses, {"forget": tiny.forget, "retain": tiny.retain}, GEffectConfig(batch_size=4))

    def trained(*callbacks: GEffectCallback) -> torch.Tensor:
        args = TrainingArguments(
            output_dir=str(folder / "out"), learning_rate=1e-3, max_steps=2, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False, use_cpu=True,
        )  # fmt: skip
        trainer = UnlearnTrainer(
            model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=TERMS, reference=tiny.model(seed=1),
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    plain, probed = trained(), trained(GEffectCallback(probe, metrics, "unlearn", 1))
    torch.distributed.barrier()
    model = tiny.model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = probe.measure(model)
    save_and_leave({"plain": plain, "probed": probed, "rows": read_metrics(metrics), "sharded": sharded}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
