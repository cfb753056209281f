import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import TokenRule

from .rows import assert_within_budget, device_of, interpreted, skip_unless_taken

N, V, H, R = 150, 203, 24, 3
BUDGETS = [None, 100 * V * 4, 0]  # one block; two; blocks of 64 rows
TENSORS = {"hidden": (N, H), "weight": (V, H), "bias": (V,), "x": (N, R), "b": (V, R)}


def problem(dtype, backend="cpu", names=tuple(TENSORS)):
    tensors = {name: torch.randn(TENSORS[name]).to(dtype) for name in names}
    targets = torch.randint(0, V, (N,))
    targets[::7] = -100
    weights = {name: torch.randn(N) for name in ("logp", "entropy", "lse")}
    device = device_of(backend)
    moved = ({k: v.to(device) for k, v in group.items()} for group in (tensors, weights))
    return *moved, targets.to(device)


def leaves_of(tensors, dtype=None):
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def at_once(tensors, targets, weights, **options):
    leaves = leaves_of(tensors)
    adapter = (leaves["x"], leaves["b"]) if "x" in leaves else None
    head = leaves["hidden"], leaves["weight"], targets, weights
    stats, found = pu.linear_value_and_grad(*head, bias=leaves.get("bias"), adapter=adapter, **options)
    named = {"hidden": found.hidden, "weight": found.weight, "bias": found.bias}
    return stats, named | dict(zip("xb", found.adapter, strict=True))


def by_autograd(tensors, targets, weights, rule, floor, dtype=None, **options):
    leaves = leaves_of(tensors, dtype)
    adapter = (leaves["x"], leaves["b"]) if "x" in leaves else None
    stats = pu.linear_token_stats(
        leaves["hidden"], leaves["weight"], targets, leaves.get("bias"), tuple(weights), adapter=adapter, **options
    )
    factor = {"logp": rule(stats.logp.detach(), floor if dtype is None or floor is None else floor.to(dtype))}
    loss = sum((weight.to(dtype) * factor.get(n, 1) * getattr(stats, n)).sum() for n, weight in weights.items())
    return stats, dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", [TokenRule(), TokenRule(alpha=0.5, beta=4.0)], ids=str)
def test_gradients_are_autograds(backend, dtype, budget, rule):
    skip_unless_taken(backend, dtype)
    if interpreted(backend) and (budget == 0 or rule.beta):
        pytest.skip("in Python: one budget and one rule will do")
    tensors, weights, targets = problem(dtype, backend)
    floor = torch.randn(N, device=targets.device) - 3 if rule.beta else None
    stats, ours = at_once(tensors, targets, weights, rule=rule, floor=floor, budget_bytes=budget, backend=backend)
    rest = (targets, weights, rule, floor)
    _, eager = by_autograd(tensors, *rest, backend="eager")
    exact, oracle = by_autograd(tensors, *rest, dtype=torch.float64, backend="eager")
    tol = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for name, gradient in ours.items():
        assert gradient.dtype == dtype
        mine, theirs, true = (g.double().cpu() for g in (gradient, eager[name], oracle[name]))
        assert_within_budget(mine, theirs, true, tol, f"d{name}")
    for name in weights:
        torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name).detach(), atol=2e-2, rtol=2e-2)
    assert ours["hidden"][::7].eq(0).all()
    assert torch.equal(stats.mask, targets != -100)


@pytest.mark.parametrize("budget", BUDGETS)
def test_products_are_made_once(budget):
    """Of the rows that count, logits and d(hidden): beyond the budget too."""
    tensors, weights, targets = problem(torch.float32, names=("hidden", "weight"))
    hidden = tensors["hidden"].requires_grad_()
    with FlopCounterMode(display=False) as flops:
        pu.linear_value_and_grad(hidden, tensors["weight"], targets, weights["logp"], budget_bytes=budget)
    assert flops.get_total_flops() == 2 * 2 * int((targets != -100).sum()) * V * H


def test_blocks_give_what_one_gives():
    """Rows of d(hidden) do not know of each other: the same bits. d(weight) is a sum over them."""
    tensors, weights, targets = problem(torch.float32, names=("hidden", "weight"))
    (_, whole), (_, blocks) = (at_once(tensors, targets, weights, budget_bytes=b, backend="cpu") for b in (None, 0))
    torch.testing.assert_close(blocks["hidden"], whole["hidden"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(blocks["weight"], whole["weight"], atol=1e-5, rtol=1e-5)


def test_what_takes_no_gradient_costs_none():
    tensors, weights, targets = problem(torch.float32, names=("hidden", "weight"))
    hidden = tensors["hidden"].requires_grad_()
    _, found = pu.linear_value_and_grad(hidden, tensors["weight"], targets, weights["logp"])
    assert found.weight is None
    assert found.bias is None
    assert found.adapter == (None, None)
    _, found = pu.linear_value_and_grad(hidden.detach(), tensors["weight"], targets, weights["logp"])
    assert found.hidden is None


def test_memory_of_a_frozen_head_is_the_budget():
    n, v, h = 512, 4096, 16
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h)
    targets, logits = torch.randint(0, v, (n,)), n * v * 4

    def call(budget):
        return pu.linear_value_and_grad(hidden, weight, targets, torch.ones(n), budget_bytes=budget)

    small = n * h * 4 + n * 200
    assert peak_bytes(lambda: call(logits // 8), "cpu") <= logits // 8 + small
    assert peak_bytes(lambda: call(logits), "cpu") >= logits


@pytest.mark.parametrize("shape", [(H,), (2, 3, H), (0, H)])
def test_shapes(shape):
    hidden, weight = torch.randn(shape, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.randint(0, V, shape[:-1])
    stats, found = pu.linear_value_and_grad(hidden, weight, targets, torch.ones(shape[:-1]))
    assert stats.logp.shape == targets.shape
    assert found.hidden.shape == shape
    (plain,) = torch.autograd.grad((hidden @ weight.t()).log_softmax(-1).gather(-1, targets[..., None]).sum(), weight)
    torch.testing.assert_close(found.weight, plain, atol=1e-5, rtol=1e-5)


def test_nothing_counts():
    hidden, weight = torch.full((3, H), float("nan"), requires_grad=True), torch.randn(V, H, requires_grad=True)
    stats, found = pu.linear_value_and_grad(hidden, weight, torch.full((3,), -100), torch.ones(3))
    assert stats.logp.eq(0).all()
    assert found.hidden.eq(0).all()
    assert found.weight.eq(0).all()


def test_an_objective_in_one_pass():
    """With what `one_pass` says of it: the gradient of the objective's own loss."""
    hidden, weight = torch.randn(2, 6, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.randint(0, V, (2, 6))
    targets[0, 2:4] = -100
    mask, wga = targets != -100, pu.objectives.get("wga", alpha=1.5)
    _, found = pu.linear_value_and_grad(hidden, weight, targets, **pu.objectives.one_pass(wga, mask))
    loss = pu.objectives.wga(pu.linear_token_stats(hidden, weight, targets).logp, mask, alpha=1.5)
    for ours, plain in zip(found, torch.autograd.grad(loss, (hidden, weight)), strict=False):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


HID, W, T = torch.randn(2, H), torch.randn(V, H), torch.zeros(2, dtype=torch.long)
BAD = [
    (dict(budget_bytes=-1), ValueError, "budget_bytes=-1"),
    (dict(weight=W[:, 1:]), ValueError, "hidden, weight: need shapes"),
    (dict(weights=torch.ones(3)), ValueError, r"weights\['logp'\]: needs the shape of targets"),
    (dict(weights={"greedy": torch.ones(2)}), ValueError, "weights: needs names of differentiable outputs"),
    (dict(weights={"kl_pq": torch.ones(2)}), ValueError, "needs reference="),
    (dict(targets=T + V), IndexError, f"targets: row 0 holds {V}"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        pu.linear_value_and_grad(**{"hidden": HID, "weight": W, "targets": T, "weights": torch.ones(2), **change})


def test_docstring_example():
    import doctest

    result = doctest.testmod(importlib.import_module("pyunlearn.ops.one_pass_hidden"), extraglobs={"torch": torch})
    assert (result.attempted > 0, result.failed) == (True, 0)
