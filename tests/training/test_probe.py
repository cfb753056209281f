"""The G-effect of a run's objectives: what a probe measures, and that a training does not notice it."""

from __future__ import annotations

import json
import math
import random

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pyunlearn import objectives
from pyunlearn.data import collate
from pyunlearn.data.tiny import tiny_llama
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_hidden, supervised_stats
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import append_metrics, read_metrics
from pyunlearn.training.probe import GEffectCallback, Probe, as_found, token_weights
from pyunlearn.training.settings import GEffectConfig
from pyunlearn.training.stage import Interrupted
from pyunlearn.training.terms import TermLosses
from pyunlearn.training.trainer import UnlearnTrainer

from ..geffect.common import LiveBytes
from ..runs.test_run import press_at
from ..tiny import SIZES

TERMS = ["npo", ("wga", 0.5), ("kl", 2.0), "gd"]
SETTINGS = {"forget_samples": 8, "retain_samples": 12, "batch_size": 8}


def make_probe(tiny, reference, terms=TERMS, **changes):
    rows = {"forget": tiny.forget, "retain": tiny.retain}
    return Probe(TermLosses(terms, reference), rows, GEffectConfig(**{**SETTINGS, **changes}))


@pytest.fixture(scope="module")
def probed(tiny):
    """(model, reference, what a probe in batches of 8 finds)."""
    model, reference = tiny.model(), tiny.model(seed=1).eval()
    return model, reference, make_probe(tiny, reference, pointwise=True).measure(model)


def straight(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def read(model, rows, outputs=("logp",), reference=None):
    return supervised_stats(model, batch_of(rows), outputs, reference=reference)[0]


def batch_of(rows):
    return collate([rows[i] for i in range(len(rows))], rows.pad_token_id)


def test_it_is_the_dot_of_the_runs_gradients(tiny, probed):
    """The oracle: both sets whole, the objectives' public functions, whole gradients by autograd."""
    model, reference, found = probed
    model = model.eval()
    metrics = {
        "unlearn": straight(model, -read(model, tiny.forget).logp.mean()),
        "retain": straight(model, -read(model, tiny.retain).logp.mean()),
    }
    batch = batch_of(tiny.forget)
    with torch.no_grad():
        ref_logp = supervised_stats(reference, batch)[0].logp
        pair = supervised_hidden(reference, batch_of(tiny.retain)).hidden, CausalLM.of(reference).read_head()
    stats, where = supervised_stats(model, batch)
    by_sequence = {"sequence_ids": where.sequence_ids, "num_sequences": 8}
    losses = {
        "forget.npo": objectives.npo(stats.logp, ref_logp, **by_sequence),
        "forget.wga": objectives.wga(read(model, tiny.forget).logp),
        "retain.kl": objectives.kl(read(model, tiny.retain, ("logp", "kl_pq"), pair).kl_pq),
        "retain.gd": -read(model, tiny.retain).logp.mean(),
    }
    coefficients = {"forget.npo": 1.0, "forget.wga": 0.5, "retain.kl": 2.0, "retain.gd": 1.0}
    whole = dict.fromkeys(metrics, 0.0)
    for label, loss in losses.items():
        gradient = straight(model, loss)
        assert found["terms"][label]["coefficient"] == coefficients[label]
        for metric, other in metrics.items():
            dot = float(gradient @ other)
            tolerance = 1e-5 * float(gradient.norm() * other.norm())
            assert found["terms"][label]["total"][metric] == pytest.approx(dot, abs=tolerance)
            whole[metric] += coefficients[label] * dot
    for metric, gradient in metrics.items():
        assert found["total"][metric] == pytest.approx(whole[metric], rel=1e-4)
        for parts in ("groups", "layers"):
            assert math.fsum(found[parts][metric].values()) == pytest.approx(found["total"][metric], rel=1e-12)
        assert found["norm"][metric] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert found["nll"]["unlearn"] == pytest.approx(-read(model, tiny.forget).logp.mean().item(), rel=1e-5)
    assert found["samples"] == {"forget": 8, "retain": 12}


def test_the_split_into_micro_batches_does_not_matter(tiny, probed):
    model, reference, whole = probed
    parts = make_probe(tiny, reference, batch_size=3, pointwise=True).measure(model)
    for key in ("total", "nll", "norm", "weights"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-4)
    assert parts["log10_inverse_confidence"] == pytest.approx(whole["log10_inverse_confidence"], rel=1e-5)
    for key in ("unlearn", "retain"):
        assert parts["pointwise"][key] == pytest.approx(whole["pointwise"][key], rel=1e-3)


def test_npo_is_ga_weighted_by_sample(probed):
    """Equation 5 of the paper: the G-effect of NPO is the mean of its weight times the PG-effect of GA."""
    _, _, found = probed
    weights = found["pointwise"]["weights"]["forget.npo"]
    assert min(weights) < 0.9  # not the reference
    for metric in ("unlearn", "retain"):
        weighted = [w * e for w, e in zip(weights, found["pointwise"][metric], strict=True)]
        assert sum(weighted) / 8 == pytest.approx(found["terms"]["forget.npo"]["total"][metric], rel=1e-4)
    assert found["weights"]["forget.npo"] == pytest.approx(sum(weights) / 8)


def test_weights_by_token(tiny, probed):
    """Of the first samples, whatever batch they are in; next to the text of the tokens."""
    model, reference, found = probed
    parts = make_probe(tiny, reference, batch_size=3).measure(model)
    for i, (one, other) in enumerate(zip(found["heat"], parts["heat"], strict=True)):
        item, row = tiny.forget.items[i], tiny.forget[i]
        assert one["question"] == item.question
        answer = "".join(one["tokens"])
        assert answer.strip().startswith(item.answer)
        batch = collate([row], tiny.forget.pad_token_id)
        expected = supervised_stats(model.eval(), batch)[0].logp.exp()  # WGA weighs with p
        assert len(one["tokens"]) == len(expected)
        assert one["weights"]["forget.wga"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert one["weights"]["forget.npo"] == pytest.approx([one["weights"]["forget.npo"][0]] * len(expected))
        assert other["weights"]["forget.wga"] == pytest.approx(one["weights"]["forget.wga"], rel=1e-4)


def test_weights_are_the_papers():
    logp, ref_logp = torch.tensor([-0.5, -2.0, -1.0]), torch.tensor([-1.0, -0.5, -1.0])
    ids = torch.tensor([0, 0, 1])
    p, ref = logp.double().exp(), ref_logp.double().exp()

    def weights(name, **options):
        return token_weights(objectives.get(name, **options), logp, ref_logp, ids, 2)

    torch.testing.assert_close(weights("wga", alpha=2.0), p**2)
    torch.testing.assert_close(weights("tnpo", beta=3.0), 2 * p**3 / (p**3 + ref**3))
    p, ref = torch.stack([p[0] * p[1], p[2]]), torch.stack([ref[0] * ref[1], ref[2]])
    torch.testing.assert_close(weights("npo", beta=0.5), (2 * p**0.5 / (p**0.5 + ref**0.5))[ids])
    torch.testing.assert_close(weights("ga"), torch.ones(3).double())


def test_the_inverse_confidence_does_not_overflow(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e3)
    found = make_probe(tiny, None, ["ga"]).measure(model)
    logp = read(model, tiny.forget).logp.detach().double()
    assert logp.min() < -800  # 1 / p is beyond float64
    assert found["log10_inverse_confidence"] == pytest.approx(
        float((-logp).logsumexp(0) - math.log(len(logp))) / math.log(10), rel=1e-5
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_dropout_is_off_and_checkpointing_on(tiny):
    model = tiny.model().train()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    with as_found(model):
        on = [module for module in model.modules() if module.training]
        assert on
        assert all(module.gradient_checkpointing for module in on)
    assert [module.training for module in model.modules()] == modes


def test_refusals_have_rows_of_their_own(tiny_config):
    found = {}
    for forget, retain in (("dpo", "ap"), ("idk", "gd")):
        changes = {"unlearn": {"forget": forget, "retain": retain, "epochs": 1}, "geffect": {}}
        config = tiny_config({**changes, "output": str(tiny_config().folder / forget)})
        run(config)
        rows = g_effects(config)
        assert [row["step"] for row in rows] == [0, 1]
        found[forget] = rows[0]["geffect"]
        assert set(found[forget]["terms"]) == {f"forget.{forget}", f"retain.{retain}"}
        assert found[forget]["total"]["unlearn"] != 0
    assert found["dpo"]["nll"] == pytest.approx(found["idk"]["nll"], rel=1e-6)  # the same samples, the same model


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_of_a_model_under_peft_the_adapters_count(tiny, target):
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=[target]))
    with torch.no_grad():  # away from the start, where an adapter does nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    groups = {"a": ["*lora_A*"], "b": ["*lora_B*"]}
    found = make_probe(tiny, tiny.model(seed=1).eval(), ["npo"], groups=groups, pointwise=True).measure(model)
    for metric in ("unlearn", "retain"):
        assert math.fsum(found["groups"][metric].values()) == pytest.approx(found["total"][metric], rel=1e-12)
        weights = found["pointwise"]["weights"]["forget.npo"]
        weighted = [w * e for w, e in zip(weights, found["pointwise"][metric], strict=True)]
        assert sum(weighted) / 8 == pytest.approx(found["total"][metric], rel=1e-4)


# ---- in a training ---------------------------------------------------------------------------------------------------


def g_effects(config):
    return [row for row in read_metrics(config.folder / "metrics.jsonl") if "geffect" in row]


class Randomness(TrainerCallback):
    """What any callback or layer would draw next, at every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((torch.random.get_rng_state().tolist(), random.getstate()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_goes_on_in_the_same_bits(tiny, arguments, tmp_path, checkpointing):
    ends = []
    for probing in (False, True):
        model = tiny.model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1  # so that random numbers matter
        watch = Randomness()
        callbacks = [watch]
        if probing:
            probe = make_probe(tiny, tiny.model(seed=1).eval(), ["npo", "gd"], batch_size=4, pointwise=True)
            callbacks = [GEffectCallback(probe, tmp_path / "metrics.jsonl", "unlearn", 1), watch]
        options = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        args = arguments(optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0, **options)
        name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
        setattr(args, name, checkpointing)
        trainer = UnlearnTrainer(
            model=model, args=args, train_dataset=tiny.pairs(), objectives=["npo", "gd"],
            reference=tiny.model(seed=1), callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        log = [{k: v for k, v in row.items() if "runtime" not in k and "second" not in k} for row in
               trainer.state.log_history]  # fmt: skip
        ends.append((dict(trainer.model.state_dict()), log, watch.seen))
    (plain, plain_log, plain_seen), (probed, probed_log, probed_seen) = ends
    assert all(torch.equal(plain[name], probed[name]) for name in plain)
    assert plain_log == probed_log
    assert plain_seen == probed_seen
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["step_seconds"] is None
    assert all(row["probe_seconds"] > 0 and row["step_seconds"] > 0 for row in rows[1:])


def test_a_probe_is_twice_the_work_of_a_step(tiny, arguments, tmp_path):
    """Of as many samples: a forward and a backward a set, for the metric and for the term, where a step has one."""
    model, rows = tiny.model(), []
    CausalLM.of(model).check_head()  # once a model, and no work of either
    model.get_decoder().register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    probe = make_probe(tiny, tiny.model(seed=1).eval(), ["npo", "gd"])
    probe.measure(model)
    of_probe = sum(rows)
    rows.clear()
    UnlearnTrainer(
        model=model, args=arguments(), train_dataset=tiny.pairs(), objectives=["npo", "gd"],
        reference=tiny.model(seed=1), packing=False,
    ).train()  # fmt: skip
    assert sum(rows) == 8 + 8
    assert of_probe == 2 * (8 + 12)  # all rows of the tiny sets


def test_a_probe_keeps_two_gradients(tiny):
    """Beside what a forward and a backward without the gradient take: those of the metrics, and a layer's."""
    model = tiny_llama(tiny.tokenizer, **{**SIZES, "hidden_size": 128, "intermediate_size": 512})
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    probe = make_probe(tiny, tiny.model(seed=1).eval(), ["ga", "gd"], batch_size=1)
    with LiveBytes() as working:  # all that a forward and a backward make, but for the other parameters' gradients
        for row in (row[role] for role, batches in probe.batches.items() for row in batches):
            torch.autograd.grad(supervised_stats(model, row)[0].logp.sum(), model.get_input_embeddings().weight)
    with LiveBytes() as probing:
        probe.measure(model)
    assert 2 * one < probing.peak < working.peak + 2 * one + layer


PROBING = {"unlearn": {"batch_size": 1, "keep_steps": 2}, "geffect": {"every": 2, "forget_samples": 1}}


def test_a_run_with_probes_is_the_run_without(tiny_config, tmp_path):
    plain, probing = (
        tiny_config({"unlearn": {"batch_size": 1}}),
        tiny_config({**PROBING, "output": str(tmp_path / "probed")}),
    )
    run(plain), run(probing)
    ours, theirs = (load_file(config.folder / "checkpoint" / "model.safetensors") for config in (plain, probing))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = g_effects(probing)
    assert [(row["stage"], row["step"]) for row in rows] == [("unlearn", step) for step in (0, 2, 4, 6)]
    assert rows[0]["geffect"]["samples"] == {"forget": 1, "retain": 5}
    kept = sorted(path.name for path in (probing.folder / "checkpoints").iterdir())
    assert kept == ["step-2", "step-4", "step-6"]
    last = load_file(probing.folder / "checkpoints" / "step-6" / "model.safetensors")
    assert all(torch.equal(last[name], theirs[name]) for name in theirs)


def test_stopped_and_resumed_no_row_is_lost_or_written_twice(tiny_config, tmp_path, monkeypatch):
    whole, config = tiny_config({**PROBING, "output": str(tmp_path / "whole")}), tiny_config(PROBING)
    run(whole)
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 3)
        with pytest.raises(Interrupted, match="stopped in unlearn at step 4 of 6"):
            run(config)
    later = {**g_effects(config)[0], "step": 6}  # as if killed later than the last checkpoint
    append_metrics(config.folder / "metrics.jsonl", later)
    run(config, resume=True)
    ours, theirs = g_effects(config), g_effects(whole)
    assert [row["step"] for row in ours] == [0, 2, 4, 6]
    for row, other in zip(ours, theirs, strict=True):
        assert row["geffect"]["total"] == pytest.approx(other["geffect"]["total"], rel=1e-4)


def test_started_again_before_the_first_checkpoint(tiny, tmp_path):
    """The row of step 0 stays the only one."""
    callback = GEffectCallback(make_probe(tiny, None, ["ga"]), tmp_path / "metrics.jsonl", "unlearn", 1)
    append_metrics(tmp_path / "metrics.jsonl", {"stage": "unlearn", "step": 0, "geffect": {}})
    assert callback._written(0)
    assert not callback._written(1)


def test_what_is_not_finite_is_told_and_does_not_stop(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    found = make_probe(tiny, None, ["ga"]).measure(model)
    assert found["not_finite"].startswith("loss: the gradient of 'model.")


def test_a_mistake_is_told_before_the_first_step(tiny_config):
    config = tiny_config({"geffect": {"groups": {"mine": ["nothing.*"]}}})
    with pytest.raises(ValueError, match=r"groups\['mine'\]=\['nothing.\*'\]: matches no trainable parameter"):
        run(config)
    assert not (config.folder / "metrics.jsonl").exists()  # nor did it memorise


def test_deepspeed_is_refused(tiny, arguments):
    args = arguments()
    args.deepspeed = {}
    callback = GEffectCallback(make_probe(tiny, None, ["ga"]), "metrics.jsonl", "unlearn", 1)
    with pytest.raises(ValueError, match="geffect: DeepSpeed takes gradients over; probe by `pyunlearn geffect`"):
        callback.on_train_begin(args, None, None, model=tiny.model())
