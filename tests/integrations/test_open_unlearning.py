"""Our objectives as OpenUnlearning's trainers: its losses, written out, of the batches that its data sets give."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from pyunlearn import objectives
from pyunlearn.data import collate
from pyunlearn.integrations.open_unlearning import register_trainers

from ..tiny import arguments, tiny

__all__ = ["arguments", "tiny"]


class FinetuneTrainer(Trainer):
    """As the base of its trainers: two arguments more."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


REGISTRY = {"Trainer": Trainer}
register_trainers(REGISTRY, FinetuneTrainer)


def load(tiny, args, handler, model=None, rows=None, **method_args):
    """As `load_trainer` calls a class of its registry."""
    model = tiny.model().double() if model is None else model
    return REGISTRY[handler](
        model=model, train_dataset=rows, eval_dataset=None, tokenizer=tiny.tokenizer,
        data_collator=Collator(tiny), args=args, evaluators=None, template_args={}, **method_args,
    )  # fmt: skip


class Collator:
    """Nested dictionaries of rows, as its collator takes them, without an index."""

    def __init__(self, tiny):
        self.pad = tiny.forget.pad_token_id

    def __call__(self, rows):
        if "input_ids" not in rows[0]:
            return {key: self([row[key] for row in rows]) for key in rows[0]}
        batch = collate([{"index": 0, **row} for row in rows], self.pad)
        return {key: value for key, value in batch.items() if key != "index"}


@pytest.fixture
def inputs(tiny):
    rows = [{"forget": tiny.forget[i], "retain": tiny.retain[i]} for i in range(3)]
    return Collator(tiny)(rows)


@pytest.fixture
def pairs(tiny):
    data = tiny.pairs(refuse=("forget",))
    items = [data[i] for i in range(3)]
    rows = [{"forget": {"original": item["forget"], "alternate": item["forget_refusal"]}, "retain": item["retain"]}
            for item in items]  # fmt: skip
    return Collator(tiny)(rows)


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]


def nll(model, batch):
    """(B, T - 1), 0 where there is no label."""
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits(model, batch).transpose(1, 2), targets, reduction="none", ignore_index=-100)


def mean_nll(model, batch):
    return nll(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()


def weighted(model, batch, weight):
    loss = nll(model, batch)
    p = (-loss).exp().detach()
    return -(weight(p) * loss)[batch["labels"][:, 1:] != -100].mean()


def ratio(model, frozen, batch):
    return -(nll(model, batch).sum(1) - nll(frozen, batch).sum(1))


def activations(model, frozen, batch, target):
    states = model(**{**batch, "labels": None}, output_hidden_states=True).hidden_states[1]
    mask = (batch["labels"] != -100).float()
    squares = ((states - target(frozen, batch, states)) ** 2).mean(2)
    sums, tokens = (squares * mask).sum(1), mask.sum(1, keepdim=True)
    return (sums / tokens).mean()


def steered(frozen, batch, states):
    u = torch.rand(states.size(-1), generator=torch.Generator().manual_seed(0)).to(states)
    return 2 * u / u.norm()


def kept(frozen, batch, states):
    with torch.no_grad():
        return frozen(**{**batch, "labels": None}, output_hidden_states=True).hidden_states[1]


FORGET = {
    "ga": ({}, lambda m, f, b: -mean_nll(m, b)),
    "wga": ({"beta": 2.0}, lambda m, f, b: weighted(m, b, lambda p: p**2)),
    "satimp": ({"beta1": 5.0, "beta2": 1.0}, lambda m, f, b: weighted(m, b, lambda p: p**5 * (1 - p))),
    "npo": ({"beta": 0.5}, lambda m, f, b: -2 / 0.5 * F.logsigmoid(-0.5 * ratio(m, f, b)).mean()),
    "simnpo": (
        {"beta": 4.5, "delta": 0.3},
        lambda m, f, b: -2 / 4.5 * F.logsigmoid(4.5 * (nll(m, b).sum(1) / (b["labels"] != -100).sum(1) - 0.3)).mean(),
    ),
    "rmu": (
        {"steering_coeff": 2, "module_regex": r"model\.layers\.0", "trainable_params_regex": [".*"]},
        lambda m, f, b: activations(m, f, b, steered),
    ),
}


@pytest.mark.parametrize("name", FORGET)
def test_losses_are_its_own(tiny, arguments, inputs, name):
    method_args, expected = FORGET[name]
    model, frozen = tiny.model().double(), tiny.model().double()
    forget = 0.5 * expected(model, frozen, inputs["forget"])
    for retain_loss_type, retain in ((None, 0.0), ("NLL", 2.0 * mean_nll(model, inputs["retain"]))):
        method_args |= {"gamma": 0.5, "alpha": 2.0, "retain_loss_type": retain_loss_type}
        trainer = load(tiny, arguments(), f"pyunlearn_{name}", model, **method_args)
        torch.testing.assert_close(trainer.compute_loss(model, inputs), forget + retain, rtol=1e-6, atol=0)


def test_preferences_take_original_and_alternate(tiny, arguments, pairs):
    trainer = load(tiny, arguments(), "pyunlearn_dpo", beta=0.1)
    model, frozen = trainer.model, tiny.model().double()
    model.load_state_dict(tiny.model(seed=2).state_dict())  # the reference is as at the start
    loss = trainer.compute_loss(model, pairs)
    win, lose = (ratio(model, frozen, pairs["forget"][key]) for key in ("alternate", "original"))
    straight = -2 / 0.1 * F.logsigmoid(0.1 * (win - lose)).mean() + mean_nll(model, pairs["retain"])
    torch.testing.assert_close(loss, straight, rtol=1e-6, atol=1e-9)


def test_retain_losses(tiny, arguments, inputs):
    model, frozen = tiny.model(seed=2), tiny.model()
    rows = inputs["retain"]
    log_p, log_q = (m(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits.log_softmax(-1)
                    for m in (model, frozen))  # fmt: skip
    kl = F.kl_div(log_p.flatten(0, 1), log_q.flatten(0, 1), reduction="batchmean", log_target=True)
    embedded = activations(model, frozen, rows, kept)
    for kind, options, expected in (
        ("KL", {}, kl),
        ("EMBED_DIFF", {"module_regex": r"model\.layers\.0"}, embedded),
        (None, {}, 0.0),
        ("gd", {}, mean_nll(model, rows)),
    ):
        handler = "pyunlearn_rmu" if kind == "EMBED_DIFF" else "pyunlearn_ga"
        trainer = load(tiny, arguments(), handler, tiny.model(), gamma=0.0, retain_loss_type=kind, **options)
        loss, told = trainer.compute_loss(model, inputs, return_outputs=True)
        torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=loss.dtype), rtol=1e-6, atol=1e-6)
        assert len(told) == (1 if kind is None else 2)


def test_accumulated_micro_batches_weigh_alike(tiny, arguments, inputs):
    """As there: the mean of the micro-batches' losses."""
    rows = [{"forget": tiny.forget[i], "retain": tiny.retain[i]} for i in range(4)]
    args = arguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, remove_unused_columns=False, learning_rate=0.5
    )
    trainer = load(tiny, args, "pyunlearn_npo", rows=rows, beta=0.5)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    model, frozen = (tiny.model().double() for _ in range(2))
    for start in (0, 2):
        batch = Collator(tiny)(rows[start : start + 2])
        forget = -2 / 0.5 * F.logsigmoid(-0.5 * ratio(model, frozen, batch["forget"])).mean()
        ((forget + mean_nll(model, batch["retain"])) / 2).backward()
    with torch.no_grad():
        for parameter, trained in zip(model.parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(trained, parameter - 0.5 * parameter.grad, rtol=1e-4, atol=1e-5)


def test_every_forget_objective_is_registered():
    assert {*REGISTRY} == {"Trainer", *(f"pyunlearn_{name}" for name in objectives.names("forget"))}
    for name, trainer in REGISTRY.items():
        assert trainer.__name__ == name
    register_trainers(REGISTRY, FinetuneTrainer)  # again: no harm
    with pytest.raises(ValueError, match=r"registry\['pyunlearn_ga'\]: is taken by Trainer"):
        register_trainers({"pyunlearn_ga": Trainer}, FinetuneTrainer)


@pytest.mark.parametrize(
    ("handler", "method_args", "message"),
    [
        ("pyunlearn_npo", {"beta": -1.0}, "npo: beta=-1.0: needs a finite number > 0"),
        ("pyunlearn_npo", {"retain_loss_type": "NLLL"}, "retain_loss_type='NLLL': did you mean NLL"),
        ("pyunlearn_rmu", {"module_regex": "model.*"}, "module_regex='model.*': needs one block"),
        ("pyunlearn_rmu", {"trainable_params_regex": ["a"]}, r"trainable_params_regex=['a']: needs '.*'"),
        ("pyunlearn_wga", {"options": {"alhpa": 1.0}}, "wga: option='alhpa': did you mean alpha"),
    ],
)
def test_wrong_method_args_are_named(tiny, arguments, handler, method_args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tiny, arguments(), handler, **method_args)


def test_a_set_to_evaluate_has_the_models_own_loss(tiny, arguments):
    trainer = load(tiny, arguments(), "pyunlearn_npo", beta=0.5)
    rows = [tiny.retain[i] for i in range(4)]
    expected = mean_nll(trainer.model, Collator(tiny)(rows))
    plain = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    assert trainer.evaluate(plain)["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_absent_kinds_are_named(tiny, arguments, inputs):
    trainer = load(tiny, arguments(), "pyunlearn_dpo", beta=0.1)
    with pytest.raises(ValueError, match=r"inputs: dpo needs \['forget_refusal'\], the data set gives"):
        trainer.compute_loss(trainer.model, copy.copy(inputs))
