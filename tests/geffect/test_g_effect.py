"""g_effect against dots of whole gradients in float64, and everything it must leave as it was."""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import torch
from torch import nn

import pyunlearn as pu
from tests.float64 import MODELS, make_model

from .common import (
    FORGET,
    METRICS,
    OBJECTIVE,
    RETAIN,
    LiveBytes,
    full_gradient,
    in_parts,
    nll,
    same,
    state,
    straight,
)

EVERYTHING = {"all": "*"}


def assert_is(effect: pu.geffect.GEffect, expected: dict[str, dict[str, float]], rel: float = 1e-12) -> None:
    scale = max(abs(v) for dots in expected.values() for v in dots.values())
    for metric, dots in expected.items():
        assert effect.per_parameter[metric] == pytest.approx(dots, rel=rel, abs=rel * scale)
        assert effect.total[metric] == pytest.approx(math.fsum(dots.values()), rel=rel)
        assert math.fsum(effect.per_layer[metric].values()) == pytest.approx(effect.total[metric], rel=rel)


def oracle(model: nn.Module, objective=OBJECTIVE, metrics=None) -> dict[str, dict[str, float]]:
    return {name: straight(model, objective, metric) for name, metric in (metrics or METRICS).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_dots_of_whole_gradients(name, batch_size):
    model = make_model(name)
    forget, retain = nll(FORGET[:batch_size]), nll(RETAIN[:batch_size])
    objective = nll(FORGET[:batch_size], -2.0)
    effect = pu.g_effect(model, objective, {"unlearn": forget, "retain": retain})
    assert_is(effect, oracle(model, objective, {"unlearn": forget, "retain": retain}))
    assert effect.cosine["unlearn"] == pytest.approx(-1, rel=1e-12)
    gradient = full_gradient(model, retain)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    assert effect.metric_norm["retain"] == pytest.approx(norm, rel=1e-12)
    assert effect.objective_norm == pytest.approx(2 * effect.metric_norm["unlearn"], rel=1e-12)
    groups = effect.per_group["retain"]
    assert math.fsum(groups.values()) == pytest.approx(effect.total["retain"], rel=1e-12)
    cosines = effect.cosines(effect.groups)["unlearn"]
    assert cosines == pytest.approx(dict.fromkeys(groups, -1.0), rel=1e-12)


def test_first_order_change_of_a_metric():
    """What the G-effect is for: a small step down the objective changes a metric by -lr times it."""
    model, lr = make_model("llama"), 1e-7
    effect, gradient = pu.g_effect(model, OBJECTIVE, METRICS), full_gradient(model, OBJECTIVE)
    before = {name: metric(model).item() for name, metric in METRICS.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.sub_(lr * gradient[name])
    for name, metric in METRICS.items():
        assert metric(model).item() - before[name] == pytest.approx(-lr * effect.total[name], rel=1e-4)


def test_micro_batches_add_up():
    model = make_model("llama, tied")
    metrics = {"unlearn": in_parts(FORGET), "retain": in_parts(RETAIN)}
    effect = pu.g_effect(model, in_parts(FORGET, -1.0), metrics)
    assert_is(effect, oracle(model))
    with pytest.raises(ValueError, match="pass accumulate=True"):
        _ = effect.cosine
    assert "cosine" not in effect.as_dict()
    whole = pu.g_effect(model, in_parts(FORGET, -1.0), metrics, accumulate=True)
    assert_is(whole, oracle(model))
    assert whole.cosine["unlearn"] == pytest.approx(-1, rel=1e-12)
    assert whole.as_dict()["objective_norm"] == whole.objective_norm


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = make_model("llama, tied")
    expected = oracle(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_is(pu.g_effect(model, OBJECTIVE, METRICS), expected)
    assert_is(pu.g_effect(model, in_parts(FORGET, -1.0), METRICS), expected)


class Twice(nn.Module):
    """Runs one layer twice, each time under reentrant checkpointing: its gradient comes in two parts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6).double()

    def forward(self, x):
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True).tanh()
        return x


def test_parts_of_reentrant_checkpointing():
    model, x, y = Twice(), *torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    objective, metric = (lambda m: m(x).sum()), (lambda m: m(y).square().sum())
    effect = pu.g_effect(model, objective, {"a": metric}, EVERYTHING)
    plain = copy.deepcopy(model)
    plain.forward = lambda v: plain.layer(plain.layer(v).tanh()).tanh()
    assert_is(effect, {"a": straight(plain, objective, metric)})
    with pytest.raises(ValueError, match="reentrant checkpointing"):
        _ = effect.objective_norm
    assert pu.g_effect(model, objective, {"a": metric}, EVERYTHING, accumulate=True).objective_norm > 0


def test_frozen_parameters_are_left_out():
    model = make_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name or "embed" in name)
    effect = pu.g_effect(model, OBJECTIVE, METRICS)
    assert set(effect.per_parameter["retain"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert_is(effect, oracle(model))
    assert "lm_head" not in effect.per_group["retain"]


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


def test_adapters():
    model = make_model("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
    effect = pu.g_effect(model, OBJECTIVE, METRICS)
    assert len(effect.per_parameter["retain"]) == 4
    assert list(effect.per_layer["retain"]) == ["model.layers.0", "model.layers.1"]
    assert_is(effect, oracle(model))


def test_objective_that_reaches_fewer_parameters():
    """As RMU does, whose loss ends at a hidden layer: what lies beyond counts 0."""
    model = make_model("llama")

    def objective(m):
        return m.model(input_ids=FORGET, output_hidden_states=True).hidden_states[1].square().sum()

    effect = pu.g_effect(model, objective, METRICS)
    assert_is(effect, oracle(model, objective))
    assert effect.per_layer["retain"]["model.layers.1"] == 0
    assert effect.per_group["retain"]["lm_head"] == 0
    assert pu.g_effect(model, METRICS["retain"], {"rmu": objective}).total["rmu"] == pytest.approx(
        effect.total["retain"], rel=1e-12
    )


def test_bfloat16_against_exact_dots():
    """The gradients are bfloat16's own; their dots have no error to speak of."""
    model = make_model("llama").bfloat16()
    effect = pu.g_effect(model, OBJECTIVE, METRICS)
    assert_is(effect, oracle(model), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_near_orthogonal_gradients(dtype):
    """Terms of size 1 that cancel to a 10^-5th: right to 8 digits of what is left, no absolute tolerance."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False).to(dtype)
    a, b = torch.randn(2, 256, 256).to(dtype).unbind()
    b = torch.cat([b[:128], torch.where(torch.rand(128, 256) < 0.999, -b[:128], b[128:]).to(dtype)])
    a = torch.cat([a[:128], a[:128]])
    products = (a.double() * b.double()).flatten().tolist()  # exact
    exact = math.fsum(products)
    assert 0 < abs(exact) < 1e-3 * math.fsum(map(abs, products))
    effect = pu.g_effect(layer, lambda m: (m.weight * a).sum(), {"m": lambda m: (m.weight * b).sum()}, EVERYTHING)
    assert effect.total["m"] == pytest.approx(exact, rel=1e-8, abs=0)


def test_same_bits_on_every_run():
    model = make_model("llama")
    assert pu.g_effect(model, OBJECTIVE, METRICS) == pu.g_effect(model, OBJECTIVE, METRICS)


def test_gradients_of_metrics_can_be_shared():
    """What one backward a metric costs serves any number of objectives."""
    model = make_model("llama, tied")
    gradients = {name: pu.geffect.gradient_of(model, metric) for name, metric in METRICS.items()}
    for objective in (OBJECTIVE, in_parts(RETAIN)):
        assert pu.g_effect(model, objective, gradients) == pu.g_effect(model, objective, METRICS)


def test_metrics_on_some_of_the_parameters():
    """What the metric's gradient does not hold counts 0, as where its loss does not reach."""
    model = make_model("llama")
    part = {n: g for n, g in pu.geffect.gradient_of(model, METRICS["retain"]).items() if "mlp" in n}
    dots = pu.g_effect(model, OBJECTIVE, {"retain": part}).per_parameter["retain"]
    whole = pu.g_effect(model, OBJECTIVE, METRICS).per_parameter["retain"]
    assert dots == {n: whole[n] if n in part else 0.0 for n in whole}


def test_ema_is_the_authors_smoothing():
    """Their first average is the first gradient; then .6 of the average and .4 of the next gradient."""
    model = make_model("llama")

    def average(ids, scale=1.0):
        smooth = None
        for row in ids.split(1):
            g = full_gradient(model, nll(row, scale))
            smooth = g if smooth is None else {n: 0.6 * smooth[n] + 0.4 * g[n] for n in g}
        return smooth

    def parts(ids, scale=1.0):
        return lambda m: (nll(row, scale)(m) for row in ids.split(1))

    a, b = average(FORGET, -1.0), average(RETAIN)
    effect = pu.g_effect(model, parts(FORGET, -1.0), {"retain": parts(RETAIN)}, ema=0.6)
    assert_is(effect, {"retain": {n: float((a[n] * b[n]).sum()) for n in a}})


# ---- left as found ---------------------------------------------------------------------------------------------------


@pytest.fixture
def used():
    """A model in the middle of training: some gradients are there, some parameters frozen."""
    model = make_model("llama").train()
    nll(RETAIN)(model).backward()
    for i, p in enumerate(model.parameters()):
        if i % 3 == 0:
            p.grad = None
        if i % 5 == 1:
            p.requires_grad_(False)
    return model


def test_gradients_and_hooks_stay(used):
    before, weights = state(used), copy.deepcopy(used.state_dict())
    pu.g_effect(used, OBJECTIVE, METRICS)
    pu.g_effect(used, in_parts(FORGET), METRICS, accumulate=True)
    assert same(before, state(used))
    assert all(torch.equal(v, weights[k]) for k, v in used.state_dict().items())


@pytest.mark.parametrize("where", ["metric", "objective", "backward"])
def test_gradients_and_hooks_stay_after_an_exception(used, where):
    before = state(used)

    def after_a_micro_batch(model):
        yield nll(FORGET)(model)
        raise KeyboardInterrupt

    def explode(gradient):
        raise KeyboardInterrupt

    def in_backward(model):
        hidden = model.model(input_ids=FORGET).last_hidden_state
        hidden.register_hook(explode)
        return hidden.sum()

    bad = in_backward if where == "backward" else after_a_micro_batch
    with pytest.raises(KeyboardInterrupt):
        pu.g_effect(used, OBJECTIVE if where == "metric" else bad, METRICS if where != "metric" else {"x": bad})
    assert same(before, state(used))


def test_memory_is_the_stored_gradients_and_a_layer():
    """A model whose weights outweigh its activations; a third gradient anywhere would show."""
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(16)))
    layer = 128 * 128 * 4
    x, y = torch.randn(2, 1, 128)
    metrics = {"a": lambda m: m(x).sum(), "b": lambda m: m(y).sum()}

    def peak(**options) -> float:
        with LiveBytes() as live:
            pu.g_effect(model, lambda m: m(x + y).square().sum(), metrics, EVERYTHING, **options)
        return live.peak / layer

    assert 32 <= peak() <= 32 + 2.5  # two gradients of 16 layers, the layer in progress, activations
    assert peak(accumulate=True) >= 48


@pytest.mark.parametrize("name", ["effect", "pointwise"])
def test_docstring_examples(name):
    module = importlib.import_module(f"pyunlearn.geffect.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert result.attempted > 0
    assert result.failed == 0
