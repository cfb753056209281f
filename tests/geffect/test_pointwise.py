"""pointwise_g_effect: per-sample autograd in float64 is the oracle of the other methods."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyunlearn as pu
from pyunlearn.geffect import gradient_of, pointwise_g_effect
from tests.float64 import MODELS, make_model

from .common import FORGET, RETAIN, full_gradient, nll, sample_losses

BATCH = {"ids": FORGET}


def oracle(model: nn.Module, direction: dict[str, torch.Tensor], size: int = 4) -> torch.Tensor:
    dots = []
    for i in range(size):
        gradient = full_gradient(model, nll(FORGET[i : i + 1]))
        dots.append(sum((gradient[name] * direction[name]).sum() for name in direction))
    return torch.stack(dots)


@pytest.fixture(params=MODELS)
def model(request):
    with sdpa_kernel(
        SDPBackend.MATH
    ):  # jvp needs forward-mode rules; eager attention of transformers is not all float64
        yield make_model(request.param)


@pytest.mark.parametrize("method", ["ghost", "jvp", "loop"])
def test_equals_per_sample_autograd(model, method):
    direction = gradient_of(model, nll(RETAIN))
    points = pointwise_g_effect(model, BATCH, sample_losses, direction, method, per_layer=True)
    expected = oracle(model, direction)
    torch.testing.assert_close(points.total, expected, rtol=1e-10, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(torch.stack(list(points.per_layer.values())).sum(0), points.total)
    loop = pointwise_g_effect(model, BATCH, sample_losses, direction, "loop", per_layer=True)
    assert list(points.per_layer) == list(loop.per_layer)
    for layer, dots in loop.per_layer.items():
        torch.testing.assert_close(points.per_layer[layer], dots, rtol=1e-10, atol=1e-12)
    assert points.declined is None
    assert points.total.dtype == torch.float64
    assert not points.total.requires_grad


@pytest.mark.parametrize("method", ["ghost", "jvp", "loop"])
def test_samples_that_are_not_finite_are_named(model, method):
    def broken(model, batch):
        return sample_losses(model, batch) * torch.where((batch["ids"] == FORGET[2]).all(1), torch.nan, 1.0)

    direction = gradient_of(model, nll(RETAIN))
    with pytest.raises(ArithmeticError, match=r"loss_fn: the G-effect of samples \[2\] is not finite"):
        pointwise_g_effect(model, BATCH, broken, direction, method)


@pytest.mark.parametrize("method", ["ghost", "jvp", "loop"])
def test_batch_of_one(model, method):
    direction = gradient_of(model, nll(RETAIN))
    points = pointwise_g_effect(model, {"ids": FORGET[:1]}, sample_losses, direction, method)
    torch.testing.assert_close(points.total, oracle(model, direction, 1), rtol=1e-10, atol=1e-14)
    assert points.per_layer == {}


@pytest.mark.parametrize("method", ["ghost", "jvp"])
def test_near_orthogonal_directions(model, method):
    """A direction whose part along sample 0's gradient is taken out but for a millionth: no absolute tolerance."""
    direction, mine = gradient_of(model, nll(RETAIN)), full_gradient(model, nll(FORGET[:1]))
    share = sum((direction[n] * mine[n]).sum() for n in mine) / sum(g.square().sum() for g in mine.values())
    direction = {n: g - (1 - 1e-6) * share * mine[n] for n, g in direction.items()}
    points = pointwise_g_effect(model, {"ids": FORGET[:1]}, sample_losses, direction, method)
    torch.testing.assert_close(points.total, oracle(model, direction, 1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("method", ["ghost", "jvp", "loop"])
def test_same_bits_on_every_run(model, method):
    direction = gradient_of(model, nll(RETAIN))
    once, again = (pointwise_g_effect(model, BATCH, sample_losses, direction, method) for _ in range(2))
    assert torch.equal(once.total, again.total)


def test_mean_is_the_g_effect(model):
    points = pointwise_g_effect(model, BATCH, sample_losses, gradient_of(model, nll(RETAIN)))
    effect = pu.g_effect(model, nll(FORGET), {"retain": nll(RETAIN)})
    assert points.total.mean().item() == pytest.approx(effect.total["retain"], rel=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_ghost_with_checkpointing(use_reentrant):
    model = make_model("llama, tied")
    direction = gradient_of(model, nll(RETAIN))
    expected = oracle(model, direction)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    points = pointwise_g_effect(model, BATCH, sample_losses, direction)
    torch.testing.assert_close(points.total, expected, rtol=1e-10, atol=1e-12)


def test_some_parameters_alone():
    model = make_model("llama")
    direction = {n: g for n, g in gradient_of(model, nll(RETAIN)).items() if "mlp" in n}
    for method in ("ghost", "loop"):
        points = pointwise_g_effect(model, BATCH, sample_losses, direction, method)
        torch.testing.assert_close(points.total, oracle(model, direction), rtol=1e-10, atol=1e-12)


class Scaled(nn.Module):
    """A parameter that no ghost rule covers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.layer = nn.Linear(3, 1, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x) * self.scale


def test_parameters_without_a_rule():
    model, batch = Scaled(), {"x": torch.randn(4, 3, dtype=torch.float64)}
    direction = {"scale": torch.ones(1).double(), "layer.weight": torch.ones(1, 3).double()}

    def losses(m, b):
        return m(b["x"]).squeeze(-1)

    ghost, jvp, loop = (pointwise_g_effect(model, batch, losses, direction, way) for way in ("ghost", "jvp", "loop"))
    assert ghost.declined == "no ghost norm rule covers scale"
    torch.testing.assert_close(ghost.total, loop.total)
    torch.testing.assert_close(jvp.total, loop.total)


@pytest.mark.parametrize("method", ["ghost", "jvp", "loop"])
def test_model_stays_as_it_was(method):
    model = make_model("llama")
    model.config._attn_implementation = "eager"  # which has forward-mode rules
    nll(RETAIN)(model).backward()
    before = {n: (p.grad, p.grad.clone(), p.requires_grad) for n, p in model.named_parameters()}
    direction = gradient_of(model, nll(FORGET))
    pointwise_g_effect(model, BATCH, sample_losses, direction, method)
    for name, p in model.named_parameters():
        grad, value, requires_grad = before[name]
        assert p.grad is grad
        assert torch.equal(p.grad, value)
        assert p.requires_grad == requires_grad
        assert not p._post_accumulate_grad_hooks
        assert not p._backward_hooks


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "exact"}, "method='exact': needs one of"),
        ({"metric_gradient": {}}, "metric_gradient: is empty"),
        ({"metric_gradient": {"nowhere": torch.ones(1)}}, "metric_gradient: the model has no parameter 'nowhere'"),
        ({"metric_gradient": {"lm_head.weight": torch.ones(2)}}, r"metric_gradient\['lm_head.weight'\]: needs shape"),
        ({"metric_gradient": {"model.norm.weight": torch.ones(16)}}, "'model.norm.weight' does not require grad"),
        ({"batch": {"ids": FORGET, "more": torch.ones(3)}}, "batch: needs tensors of one size in dimension 0"),
        ({"loss_fn": lambda m, b: sample_losses(m, b).mean()}, r"loss_fn: needs losses of shape \(4,\), got \(\)"),
    ],
)
def test_bad_input_is_named(change, match):
    model = make_model("llama")
    model.model.norm.weight.requires_grad_(False)
    arguments = {
        "batch": BATCH,
        "loss_fn": sample_losses,
        "metric_gradient": {"lm_head.weight": torch.ones_like(model.lm_head.weight)},
    }
    with pytest.raises(ValueError, match=match):
        pointwise_g_effect(model, **{**arguments, **change})


def test_gradient_of_names_what_is_not_finite():
    with pytest.raises(ArithmeticError, match=r"loss: the gradient of 'lm_head.weight' is not finite"):
        gradient_of(make_model("llama"), lambda m: (m.lm_head.weight * float("nan")).sum())
