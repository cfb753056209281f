import importlib

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import TokenRule
from pyunlearn.ops.contract import OUTPUTS

from .rows import DIFFERENTIABLE, assert_within_budget, device_of, rows

RULES = [TokenRule(), TokenRule(alpha=1.5), TokenRule(alpha=2.0, gamma=0.5), TokenRule(alpha=0.5, beta=4.0)]


def problem(dtype, v=1000, n=9):
    logits, reference, targets = rows("random", n, v)
    targets[2] = -100
    floor = torch.randn(n) - 3
    return logits.to(dtype), reference.to(dtype), targets, floor


def expected(logits, targets, weights, rule, floor, reference=None, **options):
    """d(logits) by autograd over the float64 twin."""
    x = logits.double().requires_grad_()
    reference = None if reference is None else reference.double()
    stats = pu.token_stats(x, targets, tuple(weights), reference=reference, backend="eager", **options).as_dict()
    total = 0.0
    for name, weight in weights.items():
        weight = weight.double()
        if name == "logp":
            weight = weight * rule(stats["logp"].detach(), None if floor is None else floor.double())
        total = total + (weight * stats[name]).sum()
    return stats, torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}])
def test_gradient_is_autograds(backend, rule, dtype, options):
    logits, _, targets, floor = problem(dtype)
    floor = floor if rule.beta else None
    device = device_of(backend)
    one, several = ("logp",), ("logp", "entropy", "uniform_ce", "lse")
    for weights in ({name: torch.randn(9) for name in names} for names in (one, several)):
        stats, d_logits = pu.value_and_grad(
            logits.to(device), targets.to(device), {n: w.to(device) for n, w in weights.items()}, rule,
            None if floor is None else floor.to(device), backend=backend, **options,
        )  # fmt: skip
        oracle, d_oracle = expected(logits, targets, weights, rule, floor, **options)
        _, d_eager = pu.value_and_grad(logits, targets, weights, rule, floor, backend="eager", **options)
        assert d_logits.dtype == dtype
        tol = 4e-6 + torch.finfo(dtype).eps
        assert_within_budget(d_logits.double().cpu(), d_eager.double(), d_oracle, tol, "gradient")
        for name, value in oracle.items():
            torch.testing.assert_close(getattr(stats, name).double().cpu(), value.detach(), atol=2e-5, rtol=2e-5)
        assert d_logits[2].eq(0).all()


@pytest.mark.parametrize("kind", ["peaked", "saturated", "offset", "masked", "wrong"])
def test_hard_rows(fused, kind):
    logits, _, targets = rows(kind, 8, 4099)
    names = tuple(n for n in DIFFERENTIABLE if not n.startswith("kl") and n not in ("topk", "log_nll"))
    if kind == "masked":
        names = tuple(n for n in names if n != "uniform_ce")
    weights = {name: torch.randn(8) for name in names}
    device = device_of(fused)
    _, ours = pu.value_and_grad(
        logits.to(device), targets.to(device), {n: w.to(device) for n, w in weights.items()}, backend=fused
    )
    _, eager = pu.value_and_grad(logits, targets, weights, backend="eager")
    _, oracle = expected(logits, targets, weights, TokenRule(), None)
    assert_within_budget(ours.double().cpu(), eager.double(), oracle, 4e-6, f"d{kind}")


def test_every_output_and_a_reference(fused):
    logits, reference, targets, _ = problem(torch.float32)
    weights = {name: torch.randn(9) for name in DIFFERENTIABLE if name != "log_nll"}
    device = device_of(fused)
    stats, ours = pu.value_and_grad(
        logits.to(device), targets.to(device), {n: w.to(device) for n, w in weights.items()},
        outputs=OUTPUTS, reference=reference.to(device), backend=fused,
    )  # fmt: skip
    _, oracle = expected(logits, targets, weights, TokenRule(), None, reference)
    torch.testing.assert_close(ours.double().cpu(), oracle, atol=1e-6, rtol=1e-5)
    assert set(stats.as_dict()) == set(OUTPUTS)


@pytest.mark.parametrize("v", [7, 4096, 30011])
def test_layouts_and_in_place(backend, v):
    """Slices, any leading shape, an unaligned row, rows longer than one block holds; in place the same bits."""
    device = device_of(backend)
    wide = torch.randn(2, 3, v + 5, device=device)
    logits = wide[:, :-1, 1 : v + 1]
    targets = torch.randint(0, v, (2, 2), device=device)
    weights = torch.randn(2, 2, device=device)
    _, apart = pu.value_and_grad(logits, targets, weights, backend=backend)
    oracle = expected(logits.cpu(), targets.cpu(), {"logp": weights.cpu()}, TokenRule(), None)[1]
    torch.testing.assert_close(apart.double().cpu(), oracle, atol=2e-6, rtol=2e-5)
    before = wide.clone()
    version = wide._version
    _, written = pu.value_and_grad(logits, targets, weights, inplace=True, backend=backend)
    assert written.data_ptr() == logits.data_ptr()
    assert wide._version > version
    assert torch.equal(written, apart)
    assert torch.equal(wide[:, -1], before[:, -1])
    assert torch.equal(wide[..., 0], before[..., 0])
    assert torch.equal(wide[..., v + 1 :], before[..., v + 1 :])


def test_passes_on_to_the_model(backend):
    device = device_of(backend)
    hidden = torch.randn(6, 8, device=device)
    head = torch.randn(50, 8, device=device, requires_grad=True)
    targets = torch.randint(0, 50, (6,), device=device)
    logits = hidden @ head.t()
    _, d_logits = pu.value_and_grad(logits, targets, torch.full((6,), -1 / 6, device=device), backend=backend)
    logits.backward(d_logits)
    (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ head.t(), targets), head)
    torch.testing.assert_close(head.grad, plain)


L, T, W = torch.randn(2, 6), torch.zeros(2, dtype=torch.long), torch.ones(2)
BAD = [
    (dict(weights=-1.0), TypeError, r"weights: needs a tensor shaped like targets, .* got -1.0"),
    (dict(weights=W[:1]), ValueError, r"weights\['logp'\]: needs the shape of targets \(2,\), got \(1,\)"),
    (dict(weights=T), TypeError, "weights.*needs a floating-point tensor"),
    (dict(weights={"greedy": W}), ValueError, "weights: needs names of differentiable outputs"),
    (dict(weights={"kl_pq": W}), ValueError, "kl_pq.*needs reference="),
    (dict(weights={"entropy": W}, rule=TokenRule(alpha=1.0)), ValueError, "rule=.*needs a weight for 'logp'"),
    (dict(floor=W[:1]), ValueError, "floor: needs the shape of targets"),
    (dict(logits=L[:1].expand(2, 6), inplace=True), ValueError, "inplace=True: logits of strides"),
    (dict(logits=torch.randn(6, 2).t()), ValueError, "logits: the last dimension needs stride 1"),
    (dict(targets=T[:1]), ValueError, "targets: needs shape"),
    (dict(outputs="logpp"), ValueError, "outputs="),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        pu.value_and_grad(**{"logits": L, "targets": T, "weights": W, **change})


def test_docstring_example():
    import doctest

    result = doctest.testmod(importlib.import_module("pyunlearn.ops.one_pass"), extraglobs={"torch": torch})
    assert (result.attempted > 0, result.failed) == (True, 0)
