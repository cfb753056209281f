"""Run by torchrun in test_trainer.py: two steps of 2 processes x 2 samples x 2 micro-batches, then a NaN on rank 1."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

from pyunlearn.training.trainer import NonFiniteLossError, UnlearnTrainer
from tests.tiny import Tiny
from tests.two_processes import save_and_leave


class PoisonRankOne(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.process_index == 1:
            with torch.no_grad():
                model.get_output_embeddings().weight[5] = math.nan


def main(folder: Path) -> None:
    tiny = Tiny()

    def trainer(objectives=("wga", "npo", "gd"), **options) -> UnlearnTrainer:
        args = TrainingArguments(
            output_dir=str(folder / "out"), optim="sgd", learning_rate=0.02, lr_scheduler_type="constant",
            max_grad_norm=0.0, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            use_cpu=True,
        )  # fmt: skip
        return UnlearnTrainer(
            model=tiny.model(), args=args, train_dataset=tiny.pairs(), objectives=objectives,
            reference=tiny.model(seed=1), **options,
        )  # fmt: skip

    good = trainer()
    good.train()
    after = torch.cat([p.detach().flatten() for p in good.model.parameters()])
    hidden = trainer(("rmu", "rr"))  # the blocks above the layer get no gradient
    hidden.train()
    misdirected = torch.cat([p.detach().flatten() for p in hidden.model.parameters()])
    error = ""
    try:
        trainer(callbacks=[PoisonRankOne()]).train()
    except NonFiniteLossError as caught:
        error = str(caught)
    log = [row for row in good.state.log_history if "loss" in row]
    save_and_leave({"parameters": after, "misdirected": misdirected, "log": log, "error": error}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
