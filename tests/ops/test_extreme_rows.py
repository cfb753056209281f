"""What holds for every row: its gradient sums to 0, and what has no softmax is NaN on every backend."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from pyunlearn.ops import OUTPUTS

from .rows import DIFFERENTIABLE, interpreted, run, skip_unless_taken

MARGINS = (-300.0, -100.0, -30.0, 0.0, 14.0, 16.0, 29.0, 31.0, 60.0, 86.0, 90.0, 110.0, 300.0)
V = 11
NOWHERE = float("-inf")


def extreme_rows():
    """The target that far above the rest (memorised) or below (point masses elsewhere), references likewise."""
    g = torch.Generator().manual_seed(0)
    margins = torch.tensor(MARGINS).repeat(2)
    logits, reference = torch.randn(2, len(margins), V, generator=g)
    targets = torch.randint(0, V, (len(margins),), generator=g)
    lane = torch.arange(len(margins))
    logits[lane, targets] = logits.amax(-1) + margins
    reference[lane[: len(MARGINS)], targets[: len(MARGINS)]] += 30.0
    reference[lane[: len(MARGINS)], (targets[: len(MARGINS)] + 1) % V] += 30.0
    return logits, reference, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rows_gradient_sums_to_zero(dtype, backend):
    """Of all pairs of outputs together, of different weights: a shift of all logits changes nothing but lse."""
    skip_unless_taken(backend, dtype)
    logits, reference, targets = (t[:: 5 if interpreted(backend) else 1] for t in extreme_rows())
    pairs = list(combinations(DIFFERENTIABLE, 2))
    n = len(targets)
    weights = torch.zeros(len(DIFFERENTIABLE), n * len(pairs), dtype=torch.float64)
    for i, pair in enumerate(pairs):
        for name, weight in zip(pair, (0.5, 1.0), strict=True):
            weights[DIFFERENTIABLE.index(name), i * n : (i + 1) * n] = weight
    upstream = dict(zip(DIFFERENTIABLE, weights, strict=True))
    many = [t.repeat(len(pairs), *[1] * (t.dim() - 1)) for t in (logits.to(dtype), targets, reference.to(dtype))]
    stats, grad = run(*many, upstream, backend=backend, k=3)
    _, oracle = run(many[0].double(), many[1], many[2].double(), upstream, backend="eager", k=3)
    spread = many[0].double().aminmax(dim=-1)
    scale = 1 + spread.max - spread.min + sum(stats[name].abs() * weights[i] for i, name in enumerate(DIFFERENTIABLE))
    eps = 8 * torch.finfo(dtype).eps
    assert oracle.isfinite().all()
    assert bool(((grad.sum(-1) - upstream["lse"]).abs() <= eps * scale).all())
    assert bool(((grad - oracle).abs().amax(-1) <= eps * scale).all())


def test_a_memorised_tokens_gradient_in_company(backend):
    """log_nll at half weight beside kl_pq: the target moves by -0.5, whatever the KL does."""
    logits, reference = torch.tensor([[60.0, 0, 1, 2]]), torch.tensor([[1.0, 2, 0, 3]])
    upstream = {"log_nll": torch.tensor([0.5]), "kl_pq": torch.tensor([1.0])}
    _, grad = run(logits, torch.tensor([0]), reference, upstream, outputs=tuple(upstream), backend=backend)
    assert grad[0].tolist() == pytest.approx([-0.5, 0.0450, 0.1224, 0.3326], abs=1e-4)


def test_log_nll_where_nothing_but_the_target_is_possible(backend):
    """It is -inf and falls with z_t; lanes at -inf have no gradient. And far from memorised it is log(-logp)."""
    logits = torch.full((2, 5), NOWHERE)
    logits[0, 2], logits[1] = 0.0, torch.tensor([-100.0, 0, 1, 2, 3])
    targets = torch.tensor([2, 0])
    up = {"log_nll": torch.ones(2)}
    stats, grad = run(logits, targets, None, up, outputs=("log_nll",), backend=backend)
    nll = -logits[1].double().log_softmax(-1)[0]
    assert stats["log_nll"].tolist() == [NOWHERE, pytest.approx(float(nll.log()), abs=1e-6)]
    assert grad[0].tolist() == [0, 0, -1, 0, 0]
    p = logits[1].double().softmax(-1)
    p[0] -= 1
    torch.testing.assert_close(grad[1], p / nll, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("where", ["logits", "reference"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_has_no_softmax_is_nan(value, where, fused):
    """NaN and +inf at every place of a row, and rows of nothing but -inf, beside rows that are well: as eager in
    float64 has them. (-inf alone at a lane is a token that cannot be.)"""
    v, k = 35, 3
    base, other, _ = torch.randn(3, v)
    places = [torch.tensor([0]), torch.tensor([17]), torch.tensor([v - 1]), torch.arange(v)]
    targets = torch.tensor([0, 17, v - 1]).repeat_interleave(2 * len(places))
    logits, reference = base.repeat(len(targets), 1), other.repeat(len(targets), 1)
    spoilt = logits if where == "logits" else reference
    for i in range(0, len(targets), 2):  # every other row is well
        spoilt[i, places[i // 2 % len(places)]] = float(value)
    outputs = OUTPUTS if value != "-inf" else tuple(n for n in OUTPUTS if n != "uniform_ce")
    differentiable = [n for n in outputs if n in DIFFERENTIABLE]
    names = (None, *differentiable) if not interpreted(fused) else (None,) if where == "logits" else ("kl_qp",)
    for name in names:
        upstream = {n: torch.ones(len(targets)).double() for n in differentiable if name in (None, n)}
        if name is None and (value, where) == ("-inf", "reference"):
            continue  # an infinite KL beside others: inf - inf
        ours, d_ours = run(logits, targets, reference, upstream, outputs=outputs, backend=fused, k=k)
        oracle, d_oracle = run(
            logits.double(), targets, reference.double(), upstream, outputs=outputs, backend="eager", k=k
        )
        for output in outputs:
            close = dict(atol=1e-5, rtol=1e-5, equal_nan=True)
            torch.testing.assert_close(ours[output], oracle[output], msg=lambda m, o=output: f"{o}: {m}", **close)
        if where == "logits" or (name in ("kl_pq", "kl_qp") and value != "-inf"):  # eager takes 0 * NaN for the others'
            torch.testing.assert_close(d_ours, d_oracle, msg=lambda m, o=name: f"d {o}: {m}", **close)
        if (value, where) in (("nan", "logits"), ("inf", "logits")):
            assert d_ours[::2].isnan().all()
            assert all(ours[output][::2].isnan().all() for output in outputs if output != "greedy")
        assert d_ours[1::2].isfinite().all()
