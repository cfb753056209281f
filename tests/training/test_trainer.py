from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from pyunlearn import objectives
from pyunlearn.data import QADataset
from pyunlearn.model import head
from pyunlearn.model.cache import ReferenceCache
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_stats
from pyunlearn.training.callbacks import Interrupt
from pyunlearn.training.trainer import NonFiniteLossError, UnlearnTrainer


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(tiny, args, terms, dataset=None, reference=None, model=None, **options):
    """(trainer, parameters after training)."""
    model = tiny.model() if model is None else model
    trainer = UnlearnTrainer(
        model=model,
        args=args,
        train_dataset=tiny.pairs() if dataset is None else dataset,
        objectives=terms,
        reference=reference,
        **options,
    )
    trainer.train()
    return trainer, parameters(trainer.model)


def refusal_rows(tiny, pairs, role):
    rows = getattr(pairs, role)
    return QADataset(rows.items, tiny.tokenizer, 256, answers=[pairs.refusal(role, i) for i in range(len(rows))])


@pytest.fixture(scope="module")
def caches(tiny, tmp_path_factory):
    """Reference caches of another model than the one trained, so that no KL is 0."""
    folder, model, pairs = (
        tmp_path_factory.mktemp("reference"),
        tiny.model(seed=1),
        tiny.pairs(fixed_refusals=True),
    )

    def build(name, rows, **options):
        return ReferenceCache.build(model, rows, folder / f"{name}.safetensors", progress=False, **options)

    return {
        "forget": build("forget", tiny.forget),
        "retain": build("retain", tiny.retain, kl=True, layers=[1]),
        "retain_real": build("retain_real", tiny.retain, kl=True, positions="real"),
        "forget_refusal": build("forget_refusal", refusal_rows(tiny, pairs, "forget")),
    }


ALL_KINDS = {"refuse": ("forget", "retain"), "fixed_refusals": True}
COMBINATIONS = [
    pytest.param(["wga", "kl"], {}, id="wga+kl"),
    pytest.param([("npo", 2.0), ("gd", 0.5), "kl"], {}, id="npo+gd+kl"),
    pytest.param(["dpo", "ap"], ALL_KINDS, id="dpo+ap"),
    pytest.param(["idk", ("me", 0.1), "simnpo", "gd"], ALL_KINDS, id="idk+me+simnpo+gd"),
]


@pytest.mark.parametrize(("terms", "kinds"), COMBINATIONS)
def test_the_split_of_a_step_into_micro_batches_does_not_matter(tiny, arguments, caches, terms, kinds):
    start = parameters(tiny.model())
    results = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        args = arguments(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer, after = train(tiny, args, terms, tiny.pairs(**kinds), caches)
        results.append((trainer.state.log_history[0], after))
    assert (results[0][1] - start).abs().max() > 1e-4  # it moved
    for log, after in results[1:]:
        torch.testing.assert_close(after, results[0][1], rtol=0, atol=1e-6)
        for key, value in log.items():
            assert value == pytest.approx(results[0][0][key], rel=1e-4, abs=1e-6), key


def test_a_step_is_the_gradient_of_the_objectives_on_whole_logits(tiny, arguments, caches):
    """The oracle: full logits, the public functions, one backward, one SGD step by hand."""
    alpha, coefficient = 2.0, 0.7
    terms = [objectives.get("wga", alpha=alpha), (objectives.get("npo"), coefficient), ("kl", 3.0)]
    trainer, after = train(tiny, arguments(), terms, reference=caches)

    model, reference, pairs = tiny.model(), tiny.model(seed=1).eval(), tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(8)])

    def log_probabilities(module, kind):
        inputs = {key: batch[kind][key] for key in ("input_ids", "attention_mask")}
        labels = batch[kind]["labels"][:, 1:]
        log_p = module(**inputs).logits[:, :-1].log_softmax(-1)
        target = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return log_p, target, labels != -100

    _, logp, mask = log_probabilities(model, "forget")
    retain_p, _, retain_mask = log_probabilities(model, "retain")
    with torch.no_grad():
        _, ref_logp, _ = log_probabilities(reference, "forget")
        retain_q, _, _ = log_probabilities(reference, "retain")
    kl = (retain_p.exp() * (retain_p - retain_q)).sum(-1)
    wga = (logp.detach().exp() ** alpha * logp)[mask].sum() / mask.sum()
    per_sequence = torch.nn.functional.softplus(0.1 * (torch.where(mask, logp - ref_logp, 0.0).sum(-1)))
    npo = 2 / 0.1 * per_sequence.mean()
    kl = kl[retain_mask].sum() / retain_mask.sum()
    (wga + coefficient * npo + 3.0 * kl).backward()
    expected = torch.cat([(p.detach() - 0.02 * p.grad).flatten() for p in model.parameters()])

    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
    log = trainer.state.log_history[0]
    assert log["forget.wga/loss"] == pytest.approx(wga.item(), rel=1e-4)
    assert log["forget.npo/loss"] == pytest.approx(npo.item(), rel=1e-4)
    assert log["retain.kl/loss"] == pytest.approx(kl.item(), rel=1e-4)
    assert log["loss"] == pytest.approx((wga + coefficient * npo + 3.0 * kl).item(), rel=1e-4)
    assert log["forget.wga/count"] == int(mask.sum())
    assert log["forget.npo/count"] == 8
    assert log["retain.kl/coefficient"] == 3.0


def test_a_step_of_rmu_and_rr_is_their_gradient_on_all_hidden_states(tiny, arguments, caches):
    """The oracle: output_hidden_states, the formulas written out, one backward, one SGD step by hand."""
    c, coefficient = 4.0, 0.1
    terms = [objectives.get("rmu", c=c, layer="shallow", seed=7), ("rr", coefficient)]
    trainer, after = train(tiny, arguments(), terms, reference=caches)

    model, reference, pairs = tiny.model(), tiny.model(seed=1).eval(), tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(8)])

    def states(module, kind, number):
        inputs = {key: batch[kind][key] for key in ("input_ids", "attention_mask")}
        hidden = module(**inputs, output_hidden_states=True).hidden_states[number][:, :-1]
        return hidden[batch[kind]["labels"][:, 1:] != -100]

    u = torch.rand(32, generator=torch.Generator().manual_seed(7))
    rmu = (states(model, "forget", 1) - c * u).square().sum(-1).mean()  # of two blocks, 1 is shallow and middle
    with torch.no_grad():
        ref_hidden = states(reference, "retain", 1)
    rr = (states(model, "retain", 1) - ref_hidden).square().sum(-1).mean()
    (rmu + coefficient * rr).backward()
    moved = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    expected = torch.cat([(p.detach() - 0.02 * g).flatten() for p, g in zip(model.parameters(), moved, strict=True)])

    torch.testing.assert_close(after, expected, rtol=0, atol=2e-6)
    log = trainer.state.log_history[0]
    assert log["forget.rmu/loss"] == pytest.approx(rmu.item(), rel=1e-4)
    assert log["retain.rr/loss"] == pytest.approx(rr.item(), rel=1e-4)
    assert log["forget.rmu/count"] == int((batch["forget"]["labels"][:, 1:] != -100).sum())


def test_layers_of_one_batch_come_from_one_forward(tiny, arguments, caches):
    """Two layers and the head at once give what each gives alone."""
    terms = [objectives.get("rmu", layer=1), objectives.get("rmu", layer=2), "npo", "rr", "kl"]
    trainer, _ = train(tiny, arguments(), terms, reference=caches)
    together = trainer.state.log_history[0]
    for term in terms:
        role = "retain" if term in ("rr", "kl") else "forget"
        alone, _ = train(tiny, arguments(), [term], reference={role: caches[role]})
        name = term if isinstance(term, str) else term.name
        label = f"{role}.{name}" + ("#2" if term is terms[1] else "")
        assert together[f"{label}/loss"] == pytest.approx(alone.state.log_history[0][f"{role}.{name}/loss"], rel=1e-5)


def test_all_positions_of_hidden_states_need_a_live_reference(tiny, arguments, caches):
    terms = [*(objectives.get(name, preset="wmdp", layer="middle") for name in ("rmu", "rr"))]
    terms.append(objectives.get("rr", preset="uwc_code"))
    trainer, _ = train(tiny, arguments(), terms, reference=tiny.model(seed=1))
    log = trainer.state.log_history[0]
    batch = tiny.pairs().collate([tiny.pairs()[i] for i in range(8)])["retain"]
    assert log["retain.rr/count"] == batch["input_ids"].numel() > log["retain.rr#2/count"]
    with pytest.raises(ValueError, match="padding is never cached: give a live model"):
        train(tiny, arguments(), terms, reference=caches)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("terms", [["npo", "kl"], ["rmu", "rr"], ["npo", "rr"]], ids="+".join)
def test_a_live_reference_equals_the_cache(tiny, arguments, caches, terms, checkpointing):
    _, cached = train(tiny, arguments(), terms, reference=caches)
    args = arguments()
    if checkpointing:
        name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
        setattr(args, name, True)
    _, live = train(tiny, args, terms, reference=tiny.model(seed=1))
    torch.testing.assert_close(live, cached, rtol=0, atol=1e-6)


def test_a_cache_of_all_real_positions_serves_the_supervised_ones(tiny, arguments, caches):
    _, narrow = train(tiny, arguments(), ["wga", "kl"], reference=caches)
    _, wide = train(tiny, arguments(), ["wga", "kl"], reference={"retain": caches["retain_real"]})
    torch.testing.assert_close(wide, narrow, rtol=0, atol=1e-6)


def test_padding_counts_for_the_open_unlearning_kl_and_needs_a_live_reference(tiny, arguments, caches):
    term = objectives.get("kl", preset="open_unlearning")
    trainer, _ = train(tiny, arguments(), ["wga", term], reference=tiny.model(seed=1))
    log = trainer.state.log_history[0]
    batch = tiny.pairs().collate([tiny.pairs()[i] for i in range(8)])["retain"]
    assert log["retain.kl/count"] == batch["input_ids"].numel()
    one_by_one = arguments(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    split, _ = train(tiny, one_by_one, ["wga", term], reference=tiny.model(seed=1))
    assert split.state.log_history[0]["retain.kl/count"] == batch["attention_mask"].sum() < batch["input_ids"].numel()
    with pytest.raises(ValueError, match="padding is never cached: give a live model"):
        train(tiny, arguments(), ["wga", term], reference=caches)


def test_me_of_its_authors_code_counts_padded_rows(tiny, arguments):
    """KL(U || p) over all predictions of rows of one length, whatever of them is padding."""
    pairs = tiny.pairs(pad_to=120)
    trainer, _ = train(tiny, arguments(), [objectives.get("me", preset="closer_look_code")], pairs)
    batch = pairs.collate([pairs[i] for i in range(8)])["forget"]
    with torch.no_grad():
        logits = tiny.model()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    p, uniform = logits.softmax(-1).flatten(0, 1), 1 / logits.size(-1)
    divergence = torch.nn.functional.kl_div((p + 1e-12).log(), torch.full_like(p, uniform), reduction="none").sum(-1)
    log = trainer.state.log_history[0]
    assert log["forget.me/count"] == len(divergence) == 8 * 119
    assert log["forget.me/loss"] == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_each_kind_of_sequence_meets_model_and_head_once(tiny, arguments, caches, monkeypatch):
    calls, forwards = [], []

    def spy(hidden, weight, targets, **options):
        calls.append((hidden.shape[0], set(options["outputs"])))
        return original(hidden, weight, targets, **options)

    original = head.linear_token_stats
    monkeypatch.setattr(head, "linear_token_stats", spy)
    model = tiny.model()
    CausalLM.of(model).check_head()  # a forward of its own, once a model
    model.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    trainer, _ = train(tiny, arguments(), ["wga", "npo", "satimp", "kl", "gd"], reference=caches, model=model)
    log = trainer.state.log_history[0]
    assert sorted(calls) == sorted(
        [(log["forget.wga/count"], {"logp"}), (log["retain.kl/count"], {"logp", "kl_pq"})]
    )  # supervised tokens only: no prompt, no padding
    assert len(forwards) == 1 + 2 + 1  # both ways are tried, then they go together
    forwards.clear()
    train(tiny, arguments(max_steps=2), ["wga", "kl"], reference=caches, model=model, packing=False)
    assert len(forwards) == 2 * 2


class Poison(TrainerCallback):
    """Makes the model's weights NaN after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_output_embeddings().weight[5] = math.nan


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tiny, arguments, tmp_path):
    args = arguments(max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=1)
    with pytest.raises(NonFiniteLossError) as caught:
        train(tiny, args, ["wga", "gd"], callbacks=[Poison(step=3)])
    text = str(caught.value)
    assert "step 4" in text
    assert "forget.wga = nan" in text
    assert "retain.gd = nan" in text
    named = [int(word) for word in text.split("forget samples [")[1].split("]")[0].split(", ")]
    assert len(named) == 2
    assert set(named) <= set(range(8))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"checkpoint-{i}" for i in (1, 2, 3)]


def test_a_gradient_that_is_not_finite_stops(tiny, arguments):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    model = tiny.model()
    model.model.norm.register_forward_hook(lambda module, args, output: Explode.apply(output))
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient norm is"):
        train(tiny, arguments(max_steps=3), ["wga"], model=model)


@pytest.mark.parametrize("terms", [["wga", "gd"], ["rmu", "gd"]], ids="+".join)
def test_interrupted_and_resumed_equals_uninterrupted(tiny, arguments, tmp_path, terms):
    changes = {
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }

    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    _, whole = train(tiny, arguments(**changes), terms)
    former = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        first, _ = train(tiny, arguments(**changes), terms, callbacks=[Press(), interrupt])
    assert interrupt.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is former
    assert first.state.global_step == 4
    trainer = UnlearnTrainer(
        model=tiny.model(), args=arguments(**changes), train_dataset=tiny.pairs(), objectives=terms
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    torch.testing.assert_close(parameters(trainer.model), whole, rtol=0, atol=1e-7)


def test_every_epoch_draws_other_retain_rows(tiny, arguments, monkeypatch):
    seen = []
    original = UnlearnTrainer.term_losses

    def spy(self, model, inputs, counts):
        seen.append(inputs["forget"]["index"].tolist() + inputs["retain"]["index"].tolist())
        return original(self, model, inputs, counts)

    monkeypatch.setattr(UnlearnTrainer, "term_losses", spy)
    train(tiny, arguments(max_steps=2), ["wga", "gd"])
    assert [sorted(rows[:8]) for rows in seen] == [list(range(8))] * 2
    pairs = tiny.pairs()
    for epoch, rows in enumerate(seen):
        pairs.set_epoch(epoch)
        assert rows[8:] == [pairs[i]["retain"]["index"] for i in rows[:8]]
    assert seen[0] != seen[1]


def test_what_is_missing_is_named(tiny, arguments, caches):
    with pytest.raises(ValueError, match=r"need \['forget_refusal'\], its items have \['forget', 'retain'\]"):
        train(tiny, arguments(), ["idk"])
    with pytest.raises(ValueError, match=r"need one for \['forget', 'retain'\], missing: \['retain'\]"):
        train(tiny, arguments(), ["npo", "kl"], reference={"forget": caches["forget"]})
    with pytest.raises(ValueError, match=r"need one for \['forget', 'retain'\]"):
        train(tiny, arguments(), ["npo", "kl"], reference=caches["forget"])
    with pytest.raises(ValueError, match="the cache has none; build it with kl=True"):
        train(tiny, arguments(), ["wga", "kl"], reference=caches["forget"])
    with pytest.raises(ValueError, match=r"the cache has none; build it with layers=\['middle'\]"):
        train(tiny, arguments(), ["rmu", "rr"], reference=caches["forget"])
    with pytest.raises(ValueError, match=r"hidden states of layers \[1\], not of layer 2; build it with layers=\[2\]"):
        train(tiny, arguments(), ["rmu", objectives.get("rr", layer="deep")], reference=caches)
    with pytest.raises(
        ValueError, match=r"rmu \(.* 'middle'\) and rr \(.*, layer 2\): needs one layer \('middle' is 1"
    ):
        train(tiny, arguments(), ["rmu", objectives.get("rr", layer=2)], reference=tiny.model())
    with pytest.raises(ValueError, match=r"rmu \(preset paper.*rr \(preset wmdp.*one scale.*rr preset='paper' too"):
        train(tiny, arguments(), ["rmu", objectives.get("rr", preset="wmdp", layer="middle")], reference=tiny.model())
    with pytest.raises(ValueError, match="layer=3: LlamaForCausalLM has 2 layers"):
        train(tiny, arguments(), [objectives.get("rmu", layer=3)])
    with pytest.raises(ValueError, match=r"objective='wgaa': did you mean wga or ga\?"):
        train(tiny, arguments(), ["wgaa"])
    with pytest.raises(TypeError, match=r"objectives='wga': needs a list, \['wga'\]"):
        train(tiny, arguments(), "wga")
    with pytest.raises(ValueError, match="objectives is empty"):
        train(tiny, arguments(), [])
    with pytest.raises(TypeError, match="got 3"):
        train(tiny, arguments(), [3])
    with pytest.raises(ValueError, match="coefficient of wga needs to be finite, got nan"):
        train(tiny, arguments(), [("wga", math.nan)])


def test_one_objective_may_appear_twice(tiny, arguments):
    terms = [objectives.get("wga", alpha=1.0), objectives.get("wga", alpha=5.0)]
    trainer, _ = train(tiny, arguments(), terms)
    log = trainer.state.log_history[0]
    assert log["forget.wga/loss"] < log["forget.wga#2/loss"] < 0


def test_the_loss_is_what_evaluation_measures(tiny, arguments):
    """gd's first value is the token mean NLL of the retain rows in the batch."""
    trainer, _ = train(tiny, arguments(), ["gd"])
    pairs = tiny.pairs()
    batch = pairs.collate([pairs[i] for i in range(8)])["retain"]
    with torch.no_grad():
        stats, _ = supervised_stats(tiny.model().eval(), batch)
    assert trainer.state.log_history[0]["retain.gd/loss"] == pytest.approx(-stats.logp.mean().item(), rel=1e-5)
