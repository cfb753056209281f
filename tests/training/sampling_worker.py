"""Run by torchrun in test_sampling.py: four steps of 2 processes x 1 sample x 2 micro-batches, drawn by MRD."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import TrainingArguments

from pyunlearn.training.sampling import ForgetSampler, Forgotten
from pyunlearn.training.trainer import UnlearnTrainer
from tests.tiny import Tiny
from tests.two_processes import save_and_leave


def main(folder: Path) -> None:
    tiny = Tiny()
    args = TrainingArguments(
        output_dir=str(folder / "out"), optim="sgd", learning_rate=0.02, lr_scheduler_type="constant",
        max_grad_norm=0.0, max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        use_cpu=True,
    )  # fmt: skip
    pairs = tiny.pairs()
    sampler = ForgetSampler(pairs.forget, refresh_steps=2, forgotten=Forgotten(ngram=2, every_steps=2))
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=pairs, objectives=["ga", "gd"], sampler=sampler
    )
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    save_and_leave({"parameters": after, "memory": asdict(sampler.memory)}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
