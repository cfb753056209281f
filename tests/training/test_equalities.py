"""All registered objectives: how a step is computed does not decide it, and a stop leaves no mark."""

from __future__ import annotations

import math

import pytest
import torch

from pyunlearn import objectives
from pyunlearn.data import ForgetRetainDataset, QADataset
from pyunlearn.training.trainer import UnlearnTrainer

KINDS = {"refuse": ("forget", "retain"), "fixed_refusals": True}
OPTIONS = {"simnpo": {"beta": 0.1}, "satimp": {"beta1": 0.1}}  # else hardly a gradient where nothing is known by heart
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}


def objective(name, **given):
    return objectives.get(name, **OPTIONS.get(name, {}), **given)


def trained(tiny, args, name, resume=None, **given):
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=tiny.pairs(**KINDS, **tiny.written),
        objectives=[objective(name, **given)], reference=tiny.model(seed=1),
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


ME = [objectives.get("me", positions="template_free"), "ga", "kl"]


def of_texts(tiny):
    return ForgetRetainDataset(QADataset(tiny.world.forget, tiny.tokenizer, 256, text_mask=True), tiny.retain)


def of_texts_trained(tiny, args, terms, **options):
    trainer = UnlearnTrainer(
        model=tiny.model(), args=args, train_dataset=of_texts(tiny), objectives=terms, reference=tiny.model(seed=1),
        **options,
    )  # fmt: skip
    trainer.train()
    return trainer, torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("terms", [ME[:1], ME], ids=["alone", "beside others"])
def test_the_texts_own_tokens_however_a_step_is_computed(tiny, arguments, terms):
    four = {"per_device_train_batch_size": 4, "max_steps": 2}
    packed, whole = of_texts_trained(tiny, arguments(**four), terms)
    assert packed.packing.as_dict() == {"used": True, "declined": {}}
    one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2}
    for args, options in ((four, {"packing": False}), (one, {})):
        again = of_texts_trained(tiny, arguments(**args), terms, **options)[1]
        torch.testing.assert_close(again, whole, atol=2e-6, rtol=0)


def test_the_texts_own_tokens_on_whole_logits(tiny, arguments):
    """The oracle: full logits in float64, the entropies at the tokens before a question's or an answer's own."""
    trainer, _ = of_texts_trained(tiny, arguments(learning_rate=0.0), ME[:1])
    pairs = of_texts(tiny)
    batch = pairs.collate([pairs[i] for i in range(8)])["forget"]
    logits = tiny.model().double()(input_ids=batch["input_ids"]).logits[:, :-1]
    log_p = logits.log_softmax(-1)
    keep, losses = batch["text_mask"][:, 1:] != 0, (log_p.exp() * (log_p + math.log(logits.size(-1)))).sum(-1)
    assert int(keep.sum()) == trainer.state.log_history[0]["forget.me/count"]
    assert trainer.state.log_history[0]["forget.me/loss"] == pytest.approx(losses[keep].mean().item(), rel=1e-5)
    labelled, real = batch["labels"][:, 1:] != -100, batch["attention_mask"][:, 1:] != 0
    assert bool((labelled & ~keep).sum(1).eq(1).all())  # EOS alone
    assert int(keep.sum()) < int(real.sum())


def test_rows_that_do_not_tell_their_texts_tokens(tiny, arguments):
    with pytest.raises(ValueError, match=r"needs batch\['text_mask'\].*rows of QADataset\(\.\.\., text_mask=True\)"):
        trained(tiny, arguments(), "me", positions="template_free")
