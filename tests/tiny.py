"""A world small enough to train in a second: four authors, a Llama with hidden size 32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.utils import logging

from pyunlearn.data import ForgetRetainDataset, QADataset, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY = {
    "name": "tiny",
    "model": {"options": {**SIZES, "vocab_size": 384}},
    "data": {"num_authors": 4, "questions_per_author": 2, "forget_fraction": 0.25, "num_unknown": 0},
    "memorise": {"epochs": 3, "batch_size": 4, "warmup": 0},
    "unlearn": {"forget": "wga", "retain": "kl", "epochs": 3, "batch_size": 2, "warmup": 0},
    "evaluate": {"rouge_samples": 2, "max_new_tokens": 6},
}


class Tiny:
    """Tokenizer, rows and models of the tiny world."""

    def __init__(self) -> None:
        self.world = generate_authors(5, 4, seed=0, forget_fraction=0.4)  # 8 forget, 12 retain rows
        self.tokenizer = train_tokenizer(self.world.texts, vocab_size=384)
        self.forget = QADataset(self.world.forget, self.tokenizer, 256)
        self.retain = QADataset(self.world.retain, self.tokenizer, 256)
        answers = [item.answer for item in self.world.forget]
        rows = QADataset(self.world.forget, self.tokenizer, 256, answers[1:] + answers[:1])
        others = [rows[i] for i in range(len(rows))]
        # what a training has a model write for objectives that need it
        self.written = {"together": {"forget_alternate": others, "forget_generic": others}}

    def model(self, seed: int = 0) -> Any:
        model = tiny_llama(self.tokenizer, seed=seed, **SIZES)
        with torch.no_grad():  # away from the uniform start, where every objective looks alike
            for parameter in model.parameters():
                parameter.mul_(2.0)
        return model

    def pairs(self, **options: Any) -> ForgetRetainDataset:
        return ForgetRetainDataset(self.forget, self.retain, refusals=list(self.world.refusals), **options)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """TrainingArguments with plain SGD, so that a step shows the gradient as it is."""

    def make(**changes: Any) -> TrainingArguments:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "optim": "sgd",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": True,
        }
        return TrainingArguments(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    return TINY


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Any]:
    """A whole run's configuration, in a folder of its own."""
    from pyunlearn.runs.config import RunConfig
    from pyunlearn.training.settings import merge

    def make(changes: dict[str, Any] | None = None) -> RunConfig:
        return RunConfig.model_validate(merge({**TINY, "output": str(tmp_path / "run")}, changes or {}))

    return make
