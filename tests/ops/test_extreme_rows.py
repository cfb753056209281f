"""What holds for every row: its gradient sums to 0, and what has no softmax is NaN on every backend."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS

from .rows import DIFFERENTIABLE, assert_within_budget, device_of, interpreted, run, skip_unless_taken

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


# Places of a row that begins 2 elements into 16 bytes: head and tail are what whole packs leave of it.
WIDE, PHASE = 8200, 2
PLACES = {
    "target": lambda t: t, "first": lambda t: 0, "last": lambda t: -1, "head": lambda t: 3, "body": lambda t: 2055,
    "beside the target": lambda t: t + 1 if t < WIDE - 1 else t - 1, "tail": lambda t: -3, "all": lambda t: slice(None),
}  # fmt: skip


def spoilt_rows(value, dtype):
    """A row for each place and each target there, every other row well: (logits, reference, targets)."""
    g = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 3, 4100, WIDE - 3, WIDE - 1]).repeat_interleave(2 * len(PLACES))
    pitch = WIDE + 8  # every row begins as the first does: 16-byte loads are possible in all of them
    logits, reference = (torch.randn(len(targets), pitch, generator=g).to(dtype) for _ in range(2))
    logits = logits[:, PHASE : WIDE + PHASE]
    for i in range(0, len(targets), 2):
        logits[i, list(PLACES.values())[i // 2 % len(PLACES)](int(targets[i]))] = value
    return logits, reference[:, PHASE : WIDE + PHASE], targets


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), NOWHERE], ids=str)
def test_what_has_no_softmax_is_nan_wherever_it_is(value, dtype, with_reference, fused):
    """NaN and +inf anywhere in a row leave nothing of it; -inf is a token that cannot be, the row's only hope the rest.
    Statistics and gradient, in two passes and at once, as eager in float64 has them."""
    logits, reference, targets = spoilt_rows(value, dtype)
    spoilt = torch.arange(len(targets)) % 2 == 0
    if interpreted(fused):  # a place for each target
        keep = torch.arange(len(targets)) % (2 * len(PLACES) + 2) < 2
        logits, reference, targets, spoilt = logits[keep], reference[keep], targets[keep], spoilt[keep]
    outputs = ("logp", "entropy", "lse", "greedy", *(("kl_pq", "kl_qp") if with_reference else ()))
    upstream = {"logp": torch.linspace(-1, 2, len(targets)).double()}
    if not with_reference:
        upstream["entropy"] = torch.ones(len(targets)).double()
    args = targets, reference if with_reference else None, upstream, outputs
    ours, d_ours = run(logits, *args, backend=fused)
    wide = (None if args[1] is None else reference.double(), *args[2:])
    oracle, d_oracle = run(logits.double(), targets, *wide, backend="eager")
    rounding = 1e-5 if dtype == torch.float32 else 2**-7 if interpreted(fused) else 2**-8  # triton's cuts the bits off
    close = dict(atol=2e-5, rtol=rounding, equal_nan=True)
    for output in outputs:
        torch.testing.assert_close(ours[output], oracle[output], msg=lambda m, o=output: f"{o}: {m}", **close)
    torch.testing.assert_close(d_ours, d_oracle, msg=lambda m: f"gradient: {m}", **close)
    if value != NOWHERE:
        assert d_ours[spoilt].isnan().all()
        assert all(ours[output][spoilt].isnan().all() for output in outputs if output != "greedy")
    if not with_reference:
        device = device_of(fused)
        weights = {name: up.float().to(device) for name, up in upstream.items()}
        stats, d_logits = pu.value_and_grad(logits.to(device), targets.to(device), weights, backend=fused)
        torch.testing.assert_close(stats.logp.double().cpu(), oracle["logp"], **close)
        torch.testing.assert_close(d_logits.double().cpu(), d_oracle, msg=lambda m: f"at once: {m}", **close)


@pytest.mark.parametrize("offset", [0.0, 300.0, 3000.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_peak_is_exact_at_any_temperature(offset, softcap, fused):
    """z - max is 0 at the maximum, whatever z was rounded by: its p is 1, and a row's gradient sums to 0. (One
    operation made of the product in z and the difference leaves the rounding there: 2e-6, or 4e-4 about 3000.)"""
    n, v = 8, 64
    logits = torch.randn(n, v) + torch.rand(n, 1) * 7 + (offset if softcap is None else 0.0)
    targets, lane = torch.randint(0, v, (n,)), torch.arange(n)
    logits[lane, (targets + 1) % v] += 22 if softcap is None else 300
    reference, options = logits + torch.randn(n, v) * 0.3, dict(temperature=0.7, softcap=softcap)
    for name in ("logp", "entropy", "kl_pq"):
        upstream = {name: torch.ones(n).double()}
        args = targets, reference, upstream, ("logp", "entropy", "kl_pq")
        _, grad = run(logits, *args, backend=fused, **options)
        _, d_eager = run(logits, *args, backend="eager", **options)
        wide = (targets, reference.double(), *args[2:])
        _, d_oracle = run(logits.double(), *wide, backend="eager", **options)
        assert_within_budget(grad, d_eager, d_oracle, 1e-6 if softcap is None else 1e-5, f"gradient of {name}")
        if softcap is None:
            assert bool((grad.sum(-1).abs() <= 1e-6).all()), grad.sum(-1)


@pytest.mark.parametrize(("base", "step"), [(2.0**24, 2.0), (-(2.0**24), 2.0), (-1e9, 64.0)])
def test_rows_far_from_zero(base, step, fused):
    """Where float32 has whole numbers alone, differences of logits are exact still: so must their softmax be."""
    n, v = 3, 4100 if interpreted(fused) else 9000
    logits = base + step * torch.randint(0, 4, (n, v))
    targets, names = torch.tensor([0, 2000, v - 1]), ("logp", "entropy")
    upstream = {name: torch.linspace(0.5, 1.5, n).double() for name in names}
    ours, d_ours = run(logits, targets, None, upstream, names, fused)
    eager, d_eager = run(logits, targets, None, upstream, names, "eager")
    oracle, d_oracle = run(logits.double(), targets, None, upstream, names, "eager")
    for name in names:
        assert_within_budget(ours[name], eager[name], oracle[name], 4e-6, name)
    assert_within_budget(d_ours, d_eager, d_oracle, 4e-6, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_point_masses(dtype, backend):
    """One lane 60 above or below all others, the target it or another."""
    logits = torch.full((8, 40), -30.0)
    logits[4:] = 30.0
    logits[:, 7] *= -1
    reference = logits.roll(1, dims=1)
    targets = torch.tensor([7, 0, 8, 39] * 2)
    names = tuple(name for name in DIFFERENTIABLE if name != "topk")
    upstream = {name: torch.linspace(-1, 1, 8).double() for name in names}
    args = logits.to(dtype), targets, reference.to(dtype), upstream
    ours, d_ours = run(*args, backend=backend, k=3)
    eager, d_eager = run(*args, backend="eager", k=3)
    oracle, d_oracle = run(logits.double(), targets, reference.double(), upstream, backend="eager", k=3)
    oracle["logp"] = -oracle["log_nll"].exp()  # float64 log_softmax itself is 0 there
    for name in OUTPUTS:
        assert_within_budget(ours[name], eager[name], oracle[name], 4e-6, name)
    assert_within_budget(d_ours, d_eager, d_oracle, 4e-6 + torch.finfo(dtype).eps, "gradient")


def test_a_confident_bfloat16_rows_target_lane(fused):
    """Its gradient a (1 - p) is off by the rounding to bfloat16 alone, and at most by 4 times what eager's is."""
    logits = torch.randn(12, 600).bfloat16()
    targets, lane = torch.randint(0, 600, (12,)), torch.arange(12)
    logits[lane, targets] = (logits.float().logsumexp(-1) + torch.linspace(1, 14, 12)).bfloat16()
    upstream = {"logp": torch.linspace(0.3, 3, 12).double()}
    of_target = {}
    for name, x in ((fused, logits), ("eager", logits), ("oracle", logits.double())):
        _, grad = run(x, targets, None, upstream, outputs=("logp",), backend="eager" if name == "oracle" else name)
        of_target[name] = grad[lane, targets]
    right = of_target["oracle"]
    mine, theirs = ((of_target[name] - right).abs() / right.abs() for name in (fused, "eager"))
    assert mine.max() <= (2**-7 if interpreted(fused) else 2**-8)  # triton's interpreter cuts the bits off
    assert mine.max() <= 4 * theirs.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_of_any_form_stays_nan(dtype, fused):
    """The upstream gradient's too, with all bits set: an addition that rounds it to bfloat16 would make -0 of it."""
    logits, device = torch.randn(1, 600).to(dtype), device_of(fused)
    for bits in (0x7FFFFFFF, -1):
        upstream = torch.tensor([bits], dtype=torch.int32).view(torch.float32).to(device)
        for name in ("logp", "entropy"):
            x = logits.to(device).requires_grad_()
            stats = pu.token_stats(x, torch.tensor([3], device=device), (name,), backend=fused)
            assert torch.autograd.grad(getattr(stats, name), x, upstream)[0].isnan().all()
