"""Squeezing (Section 3.2 of arXiv:2510.19422): what is likely beside an answer rises as the answer falls."""

from __future__ import annotations

import copy

import pytest
import torch

from pyunlearn import objectives
from pyunlearn.data import ForgetRetainDataset, collate
from pyunlearn.training.trainer import UnlearnTrainer

K = 20


def trained(model, args, rows, objective):
    UnlearnTrainer(model=model, args=args, train_dataset=rows, objectives=[objective]).train()
    return model


def beliefs(model, batch):
    """(N, V): what the model says at every position that an answer's token is predicted from."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits[batch["labels"][:, 1:] != -100].double().softmax(-1)


@pytest.mark.parametrize("seed", [0, 1])
def test_bootstrapping_curbs_it(tiny, arguments, seed):
    """Of the mass of the likeliest tokens but the label, where that is known by heart: GA lets it rise, BS-T less."""
    batch = collate([tiny.forget[i] for i in range(len(tiny.forget))], 0)
    labels = batch["labels"][:, 1:]
    labels = labels[labels != -100][:, None]
    learn = arguments(optim="adamw_torch", learning_rate=5e-3, max_steps=60)
    start = trained(tiny.model(seed), learn, ForgetRetainDataset(tiny.forget, tiny.forget), "gd")
    before = beliefs(start, batch)
    top = before.scatter(-1, labels, 0).topk(K).indices
    assert before.gather(-1, labels).mean() > 0.9
    rise = {}
    for name, options in (("ga", {}), ("bst", {"k": K, "lam": 0.2})):
        objective = objectives.get(name, reduction="token_mean", **options)
        model = trained(copy.deepcopy(start), arguments(max_steps=10), tiny.pairs(), objective)
        change = beliefs(model, batch) - before
        assert change.gather(-1, labels).mean() < 0  # both forget
        rise[name] = float(change.gather(-1, top).sum(-1).mean())
    assert 0 < rise["bst"] < 0.9 * rise["ga"]
