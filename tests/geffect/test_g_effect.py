"""g_effect against dots of whole gradients in float64, and everything it must leave as it was."""

from __future__ import annotations

import copy
import doctest
import importlib
import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_iter

import pyunlearn as pu
from pyunlearn.gradients.groups import PAPER, assign_groups, layer_of
from tests.float64 import MODELS, make_model

from .common import LiveBytes, full_gradient, ids_of, in_parts, nll, straight

FORGET, RETAIN = ids_of(4, 1), ids_of(4, 2)
METRICS = {"unlearn": nll(FORGET), "retain": nll(RETAIN)}
EVERYTHING = {"all": "*"}
OBJECTIVE = nll(FORGET, -1.0)


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


def state(model: nn.Module) -> list:
    return [
        (id(p.grad), None if p.grad is None else p.grad.clone(), p.requires_grad, bool(p._post_accumulate_grad_hooks))
        for p in model.parameters()
    ] + [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in model.modules()]


def same(a: list, b: list) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in zip(tree_iter(a), tree_iter(b), strict=True)
    )


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


# ---- groups ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """The shape of a causal LM with any number of blocks."""

    def __init__(self, depth: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(3, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(2)
        self.lm_head = nn.Linear(2, 3, bias=False)


def blocks_by_group(depth: int) -> dict[str, list[str]]:
    model = Stack(depth)
    groups = assign_groups(model, [name for name, _ in model.named_parameters()], "paper")
    return {group: list(dict.fromkeys(layer_of(name) for name in names)) for group, names in groups.items()}


def test_paper_groups_of_llama_2_7b():
    """Figure 2: layers 1-11, 12-22 and 23-33, where the 33rd is the final norm."""
    groups = blocks_by_group(32)
    assert tuple(groups) == PAPER
    assert groups["embed"] == ["embed_tokens"]
    assert groups["shallow"] == [f"layers.{i}" for i in range(11)]
    assert groups["middle"] == [f"layers.{i}" for i in range(11, 22)]
    assert groups["deep"] == [*(f"layers.{i}" for i in range(22, 32)), "norm"]
    assert groups["lm_head"] == ["lm_head"]


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 7, 24])
def test_thirds_of_any_depth(depth):
    groups = blocks_by_group(depth)
    sizes = [sum(name.startswith("layers") for name in groups.get(third, [])) for third in PAPER[1:4]]
    assert sum(sizes) == depth
    assert max(sizes) - min(sizes) <= 1


def test_groups_by_patterns():
    model = make_model("llama")
    groups = {"attention": "*.self_attn.*", "mlp": ["*.gate_proj.*", "*.up_proj.*"], "first": "model.layers.0.*"}
    effect = pu.g_effect(model, OBJECTIVE, METRICS, groups)
    dots = effect.per_parameter["retain"]
    assert list(effect.per_group["retain"]) == list(groups)
    assert effect.per_group["retain"]["mlp"] == pytest.approx(
        sum(v for n, v in dots.items() if "gate_proj" in n or "up_proj" in n), rel=1e-12
    )


# ---- bad input -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["effect", "pointwise"])
def test_docstring_examples(name):
    module = importlib.import_module(f"pyunlearn.geffect.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert result.attempted > 0
    assert result.failed == 0
