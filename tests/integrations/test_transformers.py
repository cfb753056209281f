"""`loss_func` in the real Trainer: gradients under accumulation, references, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

import pyunlearn as pu
from pyunlearn.data import collate
from pyunlearn.integrations.transformers import loss_func

from ..tiny import arguments, tiny

__all__ = ["arguments", "tiny"]

OPTIONS = {"me": {"positions": "supervised"}, "simnpo": {"beta": 0.3}}  # by its default what is far off is forgotten


class Recorded(Trainer):
    """Keeps the gradient of each step as SGD sees it, and shuffles nothing."""

    def create_optimizer(self, *args):
        self.gradients = []
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self.flat()))
        return optimizer

    def flat(self):
        return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def named(name, reference=None):
    return loss_func(name, reference=reference, **OPTIONS.get(name, {}))


def train(tiny, arguments, loss, size, accumulation, attach=False, rows=None, **changes):
    args = arguments(
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        remove_unused_columns=False,
        **changes,
    )
    rows = rows or (tiny.forget if attach else [without_index(row) for row in tiny.forget])
    pad = tiny.forget.pad_token_id
    trainer = Recorded(
        tiny.model(), args, train_dataset=rows, data_collator=lambda r: batch_of(r, pad), compute_loss_func=loss
    )
    if attach:
        loss.attach(trainer)
    trainer.train()
    return trainer


def without_index(row):
    return {key: row[key] for key in ("input_ids", "labels")}


def batch_of(rows, pad):
    indexed = [{"index": 0, **row} for row in rows]
    batch = collate(indexed, pad)
    return batch if "index" in rows[0] else {key: value for key, value in batch.items() if key != "index"}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["ga", "wga", "satimp", "me"])
def test_four_micro_batches_are_one_batch(tiny, arguments, name):
    (whole,) = train(tiny, arguments, named(name), 8, 1).gradients
    (parts,) = train(tiny, arguments, named(name), 2, 4).gradients
    close(parts, whole)


def test_without_the_steps_count_the_gradient_is_as_many_times_as_large(tiny, arguments):
    def uncounted(outputs, labels, num_items_in_batch=None):
        stats = pu.token_stats(outputs.logits[:, :-1], labels[:, 1:])
        return pu.objectives.ga(stats.logp, stats.mask)

    rows = [without_index(tiny.forget[0])] * 8  # each micro-batch has the mean of all
    (wrong,) = train(tiny, arguments, uncounted, 2, 4, rows=rows).gradients
    (right,) = train(tiny, arguments, loss_func("ga"), 2, 4, rows=rows).gradients
    close(wrong, 4 * right)


@pytest.mark.parametrize("name", ["simnpo", "npo", "tnpo", "kl"])
@pytest.mark.parametrize("source", ["live", "cache"])
def test_sequences_and_references(tiny, arguments, tmp_path, name, source):
    frozen = tiny.model(seed=1)
    made = {"live": lambda: frozen, "cache": lambda: cache_of(frozen, tiny, tmp_path)}[source]
    reference = None if name == "simnpo" else made()
    (whole,) = train(tiny, arguments, named(name, reference), 8, 1, attach=True).gradients
    (parts,) = train(tiny, arguments, named(name, reference), 2, 4, attach=True).gradients
    close(parts, whole)
    model = tiny.model()
    batch = collate([tiny.forget[i] for i in range(8)], tiny.forget.pad_token_id)
    straight(name, model, frozen, batch).backward()
    expected = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def cache_of(frozen, tiny, tmp_path):
    return pu.ReferenceCache.build(frozen, tiny.forget, tmp_path / "cache.safetensors", kl=True, progress=False)


def straight(name, model, frozen, batch):
    """The losses as in their papers, from log_softmax."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    targets, mask = batch["labels"][:, 1:].clamp_min(0), batch["labels"][:, 1:] != -100
    log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_q = frozen(**inputs).logits[:, :-1].log_softmax(-1)
    logp, ref_logp = (each.gather(-1, targets[..., None])[..., 0] * mask for each in (log_p, log_q))
    if name == "kl":
        return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / mask.sum()
    if name == "simnpo":
        return -2 / 0.3 * F.logsigmoid(-0.3 * logp.sum(1) / mask.sum(1)).mean()
    if name == "npo":
        return -2 / 0.1 * F.logsigmoid(0.1 * (ref_logp.sum(1) - logp.sum(1))).mean()
    weight = 2 * logp.detach().exp() ** 4 / (logp.detach().exp() ** 4 + ref_logp.exp() ** 4)
    return (weight * logp)[mask].sum() / mask.sum()


def test_an_evaluation_counts_its_own_sequences(tiny, arguments):
    loss = named("simnpo")
    trainer = train(tiny, arguments, loss, 2, 4, attach=True)
    rows = [tiny.forget[i] for i in range(5)]
    value = trainer.evaluate(rows)["eval_loss"]
    batch = collate(rows, tiny.forget.pad_token_id)
    with torch.no_grad():
        expected = straight("simnpo", trainer.model.eval(), trainer.model, batch)
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_one_whole_batch_needs_no_attaching(tiny, arguments):
    (alone,) = train(tiny, arguments, named("simnpo"), 8, 1).gradients
    (attached,) = train(tiny, arguments, named("simnpo"), 8, 1, attach=True).gradients
    assert torch.equal(alone, attached)
    with pytest.raises(ValueError, match=r"simnpo: divides by the sequences .* call attach\(trainer\) first"):
        train(tiny, arguments, named("simnpo"), 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: loss_func("npo"), r"reference: needs a frozen model or a ReferenceCache for npo, got NoneType"),
        (lambda model: loss_func("wga", reference=model), r"reference: needs None, got LlamaForCausalLM"),
        (lambda model: loss_func("dpo", reference=model), r"dpo: needs \('refusal', 'answer'\) side by side"),
        (lambda model: loss_func("rmu"), "rmu: needs hidden states, compute_loss_func gets logits"),
        (lambda model: loss_func("me"), "me: positions='real', labels show the supervised ones alone"),
        (lambda model: loss_func("npoo"), "objective='npoo': did you mean npo"),
        (lambda model: loss_func("wga", alhpa=1.0), "wga: option='alhpa': did you mean alpha"),
        (lambda model: loss_func("npo", reference=model)(None, None, 1), "labels: needs those of the batch"),
        (lambda model: loss_func("npo", reference=model)(None, torch.ones(1, 2), None), "num_items_in_batch: needs"),
        (lambda model: loss_func("npo", reference=model)(None, torch.ones(1, 2), 1), r"call attach\(trainer\) first"),
    ],
)
def test_what_it_refuses(tiny, make, message):
    with pytest.raises(ValueError, match=message):
        make(copy.deepcopy(tiny.model()))


def test_what_cannot_be_attached(tiny, arguments, tmp_path):
    cache = cache_of(tiny.model(), tiny, tmp_path)

    def attach(loss, rows=tiny.forget, model=None, **changes):
        args = arguments(**{"remove_unused_columns": False, **changes})
        loss.attach(Trainer(model or tiny.model(), args, train_dataset=rows, compute_loss_func=loss))

    with pytest.raises(ValueError, match=r"args\.remove_unused_columns: needs False"):
        attach(loss_func("npo", reference=cache), remove_unused_columns=True)
    with pytest.raises(ValueError, match=r"reference: .* is of other rows than train_dataset"):
        attach(loss_func("npo", reference=cache), tiny.retain)
    loss = loss_func("npo", reference=cache)
    trainer = train(tiny, arguments, loss, 8, 1, attach=True)
    with pytest.raises(ValueError, match="reference: a cache is of the rows of train_dataset"):
        trainer.evaluate(tiny.retain)
    model = tiny.model()
    with pytest.raises(ValueError, match=r"reference\['answer'\]: needs weights of its own"):
        attach(loss_func("npo", reference=model), model=model)
    trainer = Trainer(model, arguments(), train_dataset=tiny.forget)
    with pytest.raises(ValueError, match="trainer: its compute_loss_func needs to be this one"):
        loss_func("wga").attach(trainer)
