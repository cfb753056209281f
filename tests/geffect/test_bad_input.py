"""What g_effect cannot measure is named, and the model is as before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyunlearn as pu
from tests.float64 import make_model

from .common import METRICS, OBJECTIVE, same, state


def elsewhere(_model):
    return torch.ones(2, requires_grad=True).sum()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"metrics": {}}, ValueError, "metrics: needs at least one function"),
        ({"groups": "thirds"}, ValueError, "groups='thirds': needs 'paper' or a mapping"),
        ({"groups": {"g": "nothing.*"}}, ValueError, r"groups\['g'\]='nothing.\*': matches no trainable parameter"),
        ({"ema": 1.0}, ValueError, r"ema=1.0: needs 0 <= ema < 1"),
        ({"objective": elsewhere}, ValueError, "objective: its loss reaches no trainable parameter"),
        ({"metrics": {"m": {}}}, ValueError, r"metrics\['m'\]: is empty, needs one tensor or more"),
        ({"metrics": {"m": {"w": torch.ones(1)}}}, ValueError, r"metrics\['m'\]: the model has no parameter 'w'"),
        (
            {"metrics": {"m": {"lm_head.weight": torch.ones(1)}}},
            ValueError,
            r"metrics\['m'\]\['lm_head.weight'\]: needs shape \(37, 16\), got \(1,\)",
        ),
        (
            {"metrics": {"m": {"lm_head.weight": torch.full((37, 16), math.nan).double()}}},
            ArithmeticError,
            r"metrics\['m'\]: the gradient of 'lm_head.weight' is not finite",
        ),
        ({"metrics": {"m": elsewhere}}, ValueError, r"metrics\['m'\]: its loss reaches no trainable parameter"),
        ({"objective": lambda m: torch.ones(())}, ValueError, "objective: its loss depends on no trainable parameter"),
        ({"objective": lambda m: 3.0}, TypeError, "objective: needs to return a scalar tensor or micro-batches"),
        ({"objective": lambda m: iter([torch.ones(2)])}, ValueError, r"objective: needs scalar losses, got \(2,\)"),
        (
            {"objective": lambda m: m.lm_head.weight.sum(), "metrics": {"m": lambda m: m.model.norm.weight.sum()}},
            ValueError,
            r"metrics\['m'\]: has no parameter in common with the objective",
        ),
        (
            {"objective": lambda m: (m.lm_head.weight * math.inf).sum()},
            ArithmeticError,
            "objective: the gradient of 'lm_head.weight' is not finite",
        ),
        (
            {"metrics": {"m": lambda m: (m.lm_head.weight.sum() - m.lm_head.weight.sum()).sqrt()}},
            ArithmeticError,
            r"metrics\['m'\]: the gradient of 'lm_head.weight' is not finite",
        ),
    ],
)
def test_bad_input_is_named(change, error, match):
    model = make_model("llama")
    before = state(model)
    with pytest.raises(error, match=match):
        pu.g_effect(**{"model": model, "objective": OBJECTIVE, "metrics": METRICS, **change})
    assert same(before, state(model))


def test_models_that_cannot_be_probed():
    with pytest.raises(ValueError, match="model: has no trainable parameter"):
        pu.g_effect(make_model("llama").requires_grad_(False), OBJECTIVE, METRICS)
    with pytest.raises(TypeError, match=r"model: is a DataParallel.*pass the module inside"):
        pu.g_effect(nn.DataParallel(make_model("llama")), OBJECTIVE, METRICS)
    model = make_model("llama")
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"'lm_head.weight' has a post-accumulate-grad hook"):
        pu.g_effect(model, OBJECTIVE, METRICS)
    with pytest.raises(ValueError, match=r"groups='paper': needs one list of blocks.*no numbered blocks"):
        pu.g_effect(nn.Linear(2, 2), lambda m: m(torch.ones(2)).sum(), {"m": lambda m: m(torch.ones(2)).sum()})
