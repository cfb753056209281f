"""The rate for which none is told is by what is trained; what is told wins."""

from __future__ import annotations

import peft
import pytest
import torch

from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.rate import LARGE, rate_for
from pyunlearn.training.stage import Stage
from pyunlearn.training.unlearn import UnlearnData, unlearn


def test_rates_are_by_size_and_ten_times_that_of_an_adapter(tiny):
    model = tiny.model()
    assert rate_for(model) == 5e-5
    with torch.device("meta"):
        model.register_parameter("large", torch.nn.Parameter(torch.empty(LARGE)))
    assert rate_for(model) == 1e-5
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules="all-linear"))
    assert rate_for(adapted) == pytest.approx(5e-4)


def test_an_unlearning_tells_the_rate_that_it_took(tiny, tmp_path):
    data = UnlearnData(tiny.world.forget, [], [])
    for given, taken in ({}, 5e-5), ({"learning_rate": 3e-4}, 3e-4):
        settings = UnlearnConfig(forget="ga", retain=[], max_steps=2, **given)
        stage = Stage(TrainingFolder(tmp_path / str(taken)))
        assert unlearn(stage, settings, tiny.model(), tiny.tokenizer, data).learning_rate == taken
