"""Evaluations on the way: at the steps asked for, and the training is the same, bit by bit, as without them."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from pyunlearn.metrics import evaluate
from pyunlearn.training.callbacks import Evaluations, read_metrics
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.unlearn import UnlearnData, unlearn

from ..runs.test_run import press_at

SETTINGS = {"learning_rate": 1e-3, "batch_size": 2, "epochs": 2, "save_steps": 2}  # 8 forget rows: 2 epochs of 4 steps


@pytest.fixture
def train(tiny, tmp_path):
    """`train(name, watching)`: the model and the metrics of an unlearning in a folder of that name."""
    data = UnlearnData(tiny.world.forget, tiny.world.retain, [])
    start = tiny.model()
    start.config.attention_dropout = 0.1  # so that a training draws from torch's generator
    for layer in start.model.layers:
        layer.self_attn.attention_dropout = 0.1

    def train(name, watching=(), **changes):
        model, stage = copy.deepcopy(start), Stage(TrainingFolder(tmp_path / name))
        settings = UnlearnConfig(**{**SETTINGS, **changes})
        unlearn(stage, settings, model, tiny.tokenizer, data, watching=watching)
        rows = [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in read_metrics(stage.folder.metrics)]
        return model, rows

    return train


def disturb(step, model):
    """What a metric may do to all that a training goes on with."""
    assert not any(parameter.grad is not None for parameter in model.parameters())
    random.random(), np.random.rand(), torch.rand(3)
    random.seed(step), np.random.seed(step), torch.manual_seed(step)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    model.eval()


@pytest.mark.parametrize(
    ("every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6]), ("epoch", [4]), (8, []), (9, [])]
)
def test_they_come_when_asked_for_and_change_nothing(tiny, train, every, steps):
    seen = []

    def look(step, model):
        seen.append(step)
        evaluate(model, tiny.tokenizer, tiny.world.forget[:2], rouge_samples=1, max_new_tokens=3, progress=False)
        disturb(step, model)

    plain, rows = train("plain")
    watched, its_rows = train("watched", [Evaluations(every, look)])
    assert seen == steps
    assert its_rows == rows
    assert all(map(torch.equal, watched.parameters(), plain.parameters()))
    assert (watched.training, watched.config.use_cache) == (plain.training, plain.config.use_cache)


def test_an_epoch_is_one_with_accumulated_and_cut_batches(train):
    seen = []
    evaluations = Evaluations("epoch", lambda step, model: seen.append(step))
    train("accumulated", [evaluations], batch_size=3, gradient_accumulation_steps=2, epochs=3)  # 3 batches, 2 steps
    assert seen == [2, 4]


def test_a_resumed_training_leaves_none_out(train, monkeypatch):
    """Stopped at the end of an epoch: its evaluation is made before its checkpoint is."""
    seen = []

    def look(step, model):
        seen.append(step)
        disturb(step, model)

    plain, rows = train("plain")
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 3)
        with pytest.raises(Interrupted, match="at step 4 of 8"):
            train("stopped", [Evaluations("epoch", look)])
    assert seen == [4]
    with monkeypatch.context() as patch:
        patch.setattr(Evaluations, "on_save", lambda *args, **kwargs: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):  # killed after the evaluations of steps 5 and 6, before their checkpoint
            train("stopped", [Evaluations(1, look)])
    assert seen == [4, 5, 6]
    resumed, its_rows = train("stopped", [Evaluations(1, look)])
    assert seen[3:] == [5, 6, 7]
    assert its_rows == rows
    assert all(map(torch.equal, resumed.parameters(), plain.parameters()))
