"""Whether the rows of a step go through the model together does not decide the step."""

from __future__ import annotations

import peft
import pytest
import torch

from pyunlearn import objectives
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.trainer import UnlearnTrainer

from .test_equalities import KINDS, objective


def trained(tiny, args, terms, packing, model=None, **options):
    trainer = UnlearnTrainer(
        model=tiny.model() if model is None else model, args=args,
        train_dataset=tiny.pairs(**KINDS, **tiny.written, **options), objectives=terms, reference=tiny.model(seed=1),
        packing=packing,
    )  # fmt: skip
    trainer.train()
    return trainer, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_takes_the_same_steps(tiny, arguments, name):
    args = arguments(per_device_train_batch_size=4, max_steps=2)
    together, found = trained(tiny, args, [objective(name)], packing=True)
    apart, expected = trained(tiny, args, [objective(name)], packing=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert apart.packing is None
    if objective(name).positions in ("supervised", "real"):
        assert together.packing.as_dict() == {"used": True, "declined": {}}
        assert together.packing.tokens < 0.9 * together.packing.padded
    else:
        assert "count padding" in together.packing.declined["packed rows"]
    assert together.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["autocast", "accumulated", "checkpointed"],
)
def test_whatever_the_training_is_like(tiny, arguments, changes):
    args = arguments(**{"per_device_train_batch_size": 4, "max_steps": 2, **changes})
    terms = ["npo", "kl", "rmu"]
    together, found = trained(tiny, args, terms, packing=True)
    expected = trained(tiny, args, terms, packing=False)[1]
    assert together.packing.as_dict() == {"used": True, "declined": {}}
    start = torch.cat([parameter.detach().flatten() for parameter in tiny.model().parameters()])
    tolerance = 0.05 if args.bf16 else 1e-4
    assert (found - expected).norm() < tolerance * (expected - start).norm()


def test_adapters_train_the_same(tiny, arguments):
    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))

    args = arguments(per_device_train_batch_size=4, max_steps=3)
    together, found = trained(tiny, args, ["npo", "kl"], True, adapted())
    expected = trained(tiny, args, ["npo", "kl"], False, adapted())[1]
    assert together.packing.as_dict() == {"used": True, "declined": {}}
    start = torch.cat([parameter.detach().flatten() for parameter in adapted().parameters()])
    assert (found - expected).norm() < 1e-4 * (expected - start).norm() > 0


def test_an_evaluation_is_the_same(tiny, arguments):
    losses = [trained(tiny, arguments(), ["npo", "kl"], packing)[0].evaluate(tiny.pairs()) for packing in (True, False)]
    for name in ("eval_loss", "eval_forget.npo/loss", "eval_retain.kl/loss"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-5)


def test_it_is_on_unless_it_is_switched_off():
    assert UnlearnConfig().packing
    assert not UnlearnConfig.model_validate({"packing": "off"}).packing


def test_noise_on_embeddings_leaves_rows_as_they_are(tiny, arguments):
    trainer, _ = trained(tiny, arguments(neftune_noise_alpha=5.0), ["npo"], packing=True)
    assert "NEFTune" in trainer.packing.declined["packed rows"]
