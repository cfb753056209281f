"""token_stats over shapes, layouts, parts and threads: the same bits, and only what it is told to is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS
from pyunlearn.ops.backends import kernels

from .rows import DIFFERENTIABLE, device_of, rows, run


def test_same_bits_again_and_in_any_layout(fused):
    logits, reference, targets = rows("random", 3, 20000)
    upstream = {name: torch.ones(3) for name in DIFFERENTIABLE}
    once, d_once = run(logits, targets, reference, upstream, backend=fused)
    wide = torch.randn(3, 20064, device=device_of(fused))
    wide[:, :20000] = logits
    for same in (logits, wide[:, :20000]):
        again, d_again = run(same, targets, reference, upstream, backend=fused)
        for name in OUTPUTS:
            assert torch.equal(once[name], again[name])
        assert torch.equal(d_once, d_again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_in_one_part_or_in_many(dtype, monkeypatch):
    """Of the Triton kernels: few rows are split, of many a program streams the whole."""
    logits, reference, targets = rows("random", 2, 12296)
    logits, reference = logits.to(dtype), reference.to(dtype)
    upstream = {name: torch.ones(2) for name in DIFFERENTIABLE}
    many, d_many = run(logits, targets, reference, upstream, backend="triton")
    # Patched: without, it takes 2112 rows, minutes in triton's interpreter.
    monkeypatch.setattr(kernels("triton"), "PROGRAMS", 0)
    assert kernels("triton").new_state(logits, 2, 12296).size(1) == 1
    for outputs in (OUTPUTS, ("logp", "entropy")):
        up = {name: upstream[name] for name in outputs if name in DIFFERENTIABLE}
        one, d_one = run(logits, targets, reference, up, outputs=outputs, backend="triton")
        for name in outputs:
            torch.testing.assert_close(one[name], many[name], atol=1e-6, rtol=2e-6)
        if outputs == OUTPUTS:
            torch.testing.assert_close(d_one, d_many, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


def test_same_bits_for_any_threads_and_rows():
    """Of the CPU kernels: on a GPU few rows are split in more parts."""
    logits, reference, targets = rows("random", 9, 40000)
    threads = torch.get_num_threads()
    upstream = {name: torch.ones(9) for name in DIFFERENTIABLE}
    try:
        torch.set_num_threads(1)
        one, d_one = run(logits, targets, reference, upstream, backend="cpu")
        torch.set_num_threads(2)
        two, d_two = run(logits, targets, reference, upstream, backend="cpu")
        up_few = {name: torch.ones(2) for name in DIFFERENTIABLE}
        few, d_few = run(logits[:2], targets[:2], reference[:2], up_few, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    for name in OUTPUTS:
        assert torch.equal(one[name], two[name])
        assert torch.equal(one[name][:2], few[name])
    assert torch.equal(d_one, d_two)
    assert torch.equal(d_one[:2], d_few)


def test_shifted_slice_of_a_batch(backend):
    """logits[:, :-1] is the slice every trainer takes: no copy, any leading shape, in place too."""
    device = device_of(backend)
    logits = torch.randn(3, 5, 41, device=device, requires_grad=True)
    targets = torch.randint(0, 41, (3, 5), device=device)
    got = pu.token_stats(logits[:, :-1], targets[:, 1:], backend=backend)
    assert got.logp.shape == (3, 4)
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, targets[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got.logp, expected)
    weights = torch.randn(3, 4, device=device)
    (mine,) = torch.autograd.grad((got.logp * weights).sum(), logits)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(mine, theirs)
    copy = logits * 1.0
    inplace = pu.token_stats(copy[:, :-1], targets[:, 1:], inplace_backward=backend != "eager", backend=backend)
    (mine,) = torch.autograd.grad((inplace.logp * weights).sum(), logits)
    torch.testing.assert_close(mine, theirs)
    four = pu.token_stats(logits.unsqueeze(0).expand(2, 3, 5, 41), targets.expand(2, 3, 5), backend=backend)
    torch.testing.assert_close(four.logp[1], logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1))
    one = pu.token_stats(logits[0, 0], targets[0, 0], backend=backend)
    torch.testing.assert_close(one.logp, four.logp[0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("starts", [(0, 0), (3, 3), (3, 2)])
def test_rows_that_begin_anywhere(starts, dtype, fused):
    """Columns of a wider tensor, each row elsewhere in 16 bytes, the reference as they are or otherwise: what a copy
    gives. What lies beside the rows is not minded, and in place not written."""
    device, v, names = device_of(fused), 45, ("logp", "entropy", "kl_pq")
    targets = torch.tensor([0, v - 1], device=device)
    x, r = (t.to(dtype).to(device) for t in torch.randn(2, 2, v))
    leaf, beside = (torch.full((2, 59), float("nan"), dtype=dtype, device=device) for _ in range(2))
    mine, theirs = (slice(start, start + v) for start in starts)
    leaf[:, mine], beside[:, theirs] = x, r
    there = leaf.requires_grad_() * 1.0
    ours = pu.token_stats(
        there[:, mine], targets, names, reference=beside[:, theirs], inplace_backward=True, backend=fused
    )
    torch.autograd.grad(sum(getattr(ours, name).sum() for name in names), leaf)
    x.requires_grad_()
    copy = pu.token_stats(x, targets, names, reference=r, backend=fused)
    (grad,) = torch.autograd.grad(sum(getattr(copy, name).sum() for name in names), x)
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(copy, name))
    torch.testing.assert_close(there.detach()[:, mine], grad)
    assert there.isnan().sum() == 2 * (59 - v)


def test_inplace_backward_writes_into_logits(fused):
    device = device_of(fused)
    leaf = torch.randn(4, 100, device=device, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 99], device=device)
    expected = run(leaf, targets, None, {"logp": torch.ones(4)}, outputs=("logp",), backend=fused)[1]
    logits = leaf * 1.0
    version = logits._version
    stats = pu.token_stats(logits, targets, inplace_backward=True, backend=fused)
    (grad,) = torch.autograd.grad(stats.logp.sum(), logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(grad.double().cpu(), expected)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="second backward after inplace_backward"):
        torch.autograd.grad(stats.logp.sum(), logits)


def test_inplace_backward_refuses_what_it_would_spoil(backend):
    device = device_of(backend)
    logits, targets = torch.randn(4, 100, device=device, requires_grad=True), torch.zeros(4, device=device).long()
    with torch.no_grad(), pytest.raises(ValueError, match="inplace_backward=True: needs a backward, got no_grad"):
        pu.token_stats(logits, targets, inplace_backward=True, backend=backend)
    shared = logits.detach()[:1].expand(4, 100)
    with pytest.raises(ValueError, match="share memory between rows"):
        pu.token_stats(shared, targets, inplace_backward=True, backend=backend)


def test_forward_never_writes(backend):
    logits, reference, targets = (t.to(device_of(backend)) for t in rows("random", 4, 100))
    targets[0] = -100
    copy = logits.clone()
    pu.token_stats(logits, targets, OUTPUTS, reference=reference, backend=backend)
    assert torch.equal(logits, copy)


def test_nothing_to_do(backend):
    """No rows, or only ignored ones: 0 with a graph and zero gradients, even where the ignored row holds NaN."""
    device = device_of(backend)
    empty = torch.randn(0, 7, device=device, requires_grad=True)
    pu.token_stats(empty, torch.empty(0, dtype=torch.long, device=device), backend=backend).logp.sum().backward()
    assert empty.grad.shape == (0, 7)
    logits = torch.full((2, 7), float("nan"), device=device, requires_grad=True)
    targets = torch.tensor([-100, -100], device=device)
    stats = pu.token_stats(logits, targets, OUTPUTS[:4] + OUTPUTS[6:], backend=backend, k=3)
    assert not stats.mask.any()
    assert not stats.greedy.any()
    total = stats.logp.sum() + stats.entropy.sum()
    assert total.item() == 0
    total.backward()
    assert torch.equal(logits.grad.cpu(), torch.zeros(2, 7))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 4),
    v=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(fused, b, t, v, dtype, ignored, seed):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(b, t, v, generator=g) * 5).to(dtype)
    reference = torch.randn(b, t, v, generator=g).to(dtype)
    targets = torch.randint(0, v, (b, t), generator=g)
    targets = targets.masked_fill(torch.rand(b, t, generator=g) < ignored, -100)
    k = min(5, v)
    names = tuple(n for n in DIFFERENTIABLE if v > 1 or n != "log_nll")
    upstream = {name: torch.randn(b, t, generator=g).double() for name in names}
    ours, d_ours = run(logits, targets, reference, upstream, backend=fused, k=k)
    oracle, d_oracle = run(logits.double(), targets, reference.double(), upstream, backend="eager", k=k)
    for name in names:
        torch.testing.assert_close(ours[name], oracle[name], atol=2e-5, rtol=2e-5)
    eps = max(2e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(d_ours, d_oracle, atol=4 * eps, rtol=4 * eps)
