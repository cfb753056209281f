"""Every public op on views of memory: what it gives is what it gives for a contiguous copy, or it refuses."""

from __future__ import annotations

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import OuterSum

from .rows import device_of, interpreted

SHAPE = (3, 4, 16)


def strided(shape):
    return torch.randn([2 * n for n in shape])[tuple(slice(None, None, 2) for _ in shape)]


def expanded(shape):
    return torch.randn([1] * (len(shape) - 1) + [shape[-1]]).expand(shape)


def constant(shape):
    """What autograd gives for a sum: one number everywhere."""
    return torch.randn(1).expand(shape)


def transposed(shape):
    return torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])


def column(shape):
    return torch.randn(*shape, 5)[..., 3]


def offset(shape):
    return torch.randn(1 + torch.Size(shape).numel())[1:].view(shape)


def windows(shape):
    """Overlapping ones, where there are two dimensions."""
    leading = torch.Size(shape[:-1]).numel()
    if leading == 0:
        return torch.randn(shape)
    return torch.randn(leading + shape[-1] - 1).unfold(0, shape[-1], 1).unflatten(0, shape[:-1] or (1,)).reshape(shape)


def negated(shape):
    return torch.view_as_complex(torch.randn(*shape, 2)).conj().imag


VIEWS = [strided, expanded, constant, transposed, column, offset, windows, negated]
SHAPES = [(7,), (1,), (5, 9), (3, 1), (1, 6), (2, 3, 4), (0,), (3, 0), (0, 2)]


def equal_or_refused(op, views):
    """op(*views) is op(*copies), or a ValueError says what to call."""
    expected = op(*(view.resolve_neg().contiguous() for view in views))
    try:
        got = op(*views)
    except ValueError as refused:
        if "call .contiguous()" not in str(refused) and "call .resolve_neg()" not in str(refused):
            raise
        return
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("view", VIEWS)
def test_segment_dot(view, backend):
    views = [view(shape).to(device_of(backend)) for shape in SHAPES]
    others = [torch.randn(t.shape, device=t.device) for t in views]
    pairs = [*zip(views, others, strict=True), *zip(others, views, strict=True), *zip(views, views, strict=True)]
    got = pu.segment_dot(pairs, backend=backend)
    for i, (a, b) in enumerate(pairs):
        for mine, (x, y) in zip(got, ((a, b), (a, a), (b, b)), strict=True):
            assert mine[i].item() == pytest.approx((x.double() * y.double()).sum().item(), abs=1e-9), (i, a.shape)


@pytest.mark.parametrize("which", ["logits", "reference", "targets", "upstream"])
@pytest.mark.parametrize("view", VIEWS)
def test_token_stats_and_value_and_grad(view, which, backend):
    outputs = ("logp", "entropy", "kl_pq", "kl_qp", "topk")
    for shape in [(4, 16)] if interpreted(backend) else [(16,), (5, 16), SHAPE, (2, *SHAPE), (0, 16)]:
        tensors = {"logits": torch.randn(shape), "reference": torch.randn(shape), "upstream": torch.randn(shape[:-1])}
        tensors["targets"] = torch.randn(shape[:-1])
        if len(tensors[which].shape):
            tensors[which] = view(tensors[which].shape)
        if which == "targets":  # the view's strides, kept
            whole = tensors[which].resolve_neg()
            tensors[which] = torch.empty_strided(whole.shape, whole.stride(), dtype=torch.long).fill_(3)
        else:
            tensors["targets"] = torch.randint(0, 16, shape[:-1])
        names = ("logits", "reference", "targets", "upstream")

        def through_autograd(logits, reference, targets, upstream):
            x = logits.detach().requires_grad_()
            stats = pu.token_stats(x, targets, outputs, reference=reference, k=3, backend=backend)
            total = sum((getattr(stats, name) * upstream).sum() for name in outputs)
            return *stats.as_dict().values(), *torch.autograd.grad(total, x)

        def in_one_go(logits, reference, targets, upstream):
            stats, grad = pu.value_and_grad(logits, targets, upstream, floor=upstream, backend=backend)
            return *stats.as_dict().values(), grad

        for op in (through_autograd, in_one_go):
            equal_or_refused(op, [tensors[name].to(device_of(backend)) for name in names])


@pytest.mark.parametrize("view", VIEWS)
def test_linear_token_stats(view, backend):
    shapes = [(5, 6), (17, 6), (17,)]

    def op(hidden, weight, bias):
        x, w, b = (t.detach().requires_grad_() for t in (hidden, weight, bias))
        stats = pu.linear_token_stats(
            x, w, torch.arange(5, device=x.device), b, ("logp", "kl_pq"), reference=(hidden, weight), backend=backend
        )
        return stats.logp, *torch.autograd.grad((stats.logp + stats.kl_pq).sum(), (x, w, b))

    equal_or_refused(op, [view(shape).to(device_of(backend)) for shape in shapes])


@pytest.mark.parametrize("view", VIEWS)
def test_ghost_dot(view, backend):
    left, right = (view(shape).to(device_of(backend)) for shape in ((2, 5, 3), (2, 5, 4)))
    ends = torch.tensor([[0, 9], [4, 9], [10, 9]])[:, 0]

    def op(left, right):
        whole = pu.ghost_dot(OuterSum(left, right), backend=backend)
        flat = OuterSum(left.reshape(10, 3), right.reshape(10, 4), ends)
        return whole, pu.ghost_dot(flat, backend=backend)

    equal_or_refused(op, [left, right])


@pytest.mark.parametrize("view", [expanded, windows])
def test_writing_into_logits_that_share_memory_is_refused(view, backend):
    logits, targets = view((4, 16)).to(device_of(backend)), torch.zeros(4, dtype=torch.long, device=device_of(backend))
    with pytest.raises(ValueError, match=r"inplace=True: logits of strides .* share memory between rows"):
        pu.value_and_grad(logits, targets, torch.ones(4, device=logits.device), inplace=True, backend=backend)
