"""All registered objectives: how a step is computed does not decide it, and a stop leaves no mark."""

from __future__ import annotations

import pytest
import torch

from pyunlearn import objectives
from pyunlearn.training.trainer import UnlearnTrainer

KINDS = {"refuse": ("forget", "retain"), "fixed_refusals": True}
OPTIONS = {"simnpo": {"beta": 0.1}, "satimp": {"beta1": 0.1}}  # else hardly a gradient where nothing is known by heart
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}


def objective(name):
    return objectives.get(name, **OPTIONS.get(name, {}))


def trained(tiny, args, name, resume=None):
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=tiny.pairs(**KINDS), objectives=[objective(name)],
        reference=tiny.model(seed=1),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("name", objectives.names())
def test_accumulation_and_checkpointing_do_not_matter(tiny, arguments, name):
    """4 x 1 and 1 x 4 with unequal lengths, and activations computed again in the backward."""
    four = {"per_device_train_batch_size": 4, "max_steps": 2}
    whole = trained(tiny, arguments(**four), name)
    start = torch.cat([parameter.detach().flatten() for parameter in tiny.model().parameters()])
    assert (whole - start).abs().max() > 1e-5
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    torch.testing.assert_close(trained(tiny, arguments(**one), name), whole, rtol=0, atol=2e-6)
    again = trained(tiny, arguments(activation_checkpointing=True, **four), name)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", objectives.names())
def test_a_resumed_training_has_the_bits_of_one_that_was_not_stopped(tiny, arguments, tmp_path, name):
    """Stopped in the second epoch, whose retain rows and order are others than the first's."""
    args = arguments(per_device_train_batch_size=3, max_steps=5, save_strategy="steps", save_steps=4, **ADAM)
    whole = trained(tiny, args, name)
    assert torch.equal(trained(tiny, args, name, str(tmp_path / "out" / "checkpoint-4")), whole)
