"""Derivatives that the kernels do not have are refused, never given as zeros."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwad

import pyunlearn as pu
from pyunlearn.ops import OuterSum

from .rows import device_of

TARGETS = torch.tensor([0, 2, 4])


def losses(backend, **options):
    """(a scalar of x (3, 5), x) through each differentiable op."""
    weight, device = torch.randn(7, 5), device_of(backend)
    targets = TARGETS.to(device)

    def of_logits(x):
        return pu.token_stats(x, targets, ("logp", "entropy"), backend=backend).logp.sum()

    def of_hidden(x):
        return pu.linear_token_stats(x, weight.to(device), targets, backend=backend, **options).logp.sum()

    return [(of_logits, torch.randn(3, 5, device=device)), (of_hidden, torch.randn(3, 5, device=device))]


@pytest.mark.parametrize("budget", [None, 0])
def test_second_derivatives(budget, fused):
    """A gradient penalty, where the upstream gradient is a constant; the first derivative is there all the same."""
    for loss, x in losses(fused, budget_bytes=budget):
        x.requires_grad_()
        (plain,) = torch.autograd.grad(loss(x), x)
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        assert torch.equal(grad, plain)
        with pytest.raises(RuntimeError, match="first derivatives alone"):
            grad.square().sum().backward()
        with pytest.raises(RuntimeError, match="first derivatives alone"):
            torch.autograd.functional.hvp(loss, x.detach(), torch.ones_like(x))


def test_eager_has_them_all():
    loss, x = losses("eager")[0]
    hessian = torch.autograd.functional.hessian(loss, x)
    p = x.softmax(-1)
    expected = p[:, :, None] * p[:, None, :] - torch.diag_embed(p)
    for i in range(3):
        torch.testing.assert_close(hessian[i, :, i], expected[i])
    with fwad.dual_level():
        tangent = fwad.unpack_dual(loss(fwad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("with_graph", [False, True])
def test_forward_mode(with_graph, fused):
    device = device_of(fused)
    ghost = torch.randn(2, 3, 4, device=device)
    calls = [
        *losses(fused),
        (lambda x: pu.value_and_grad(x, TARGETS.to(device), torch.ones(3, device=device), backend=fused)[1],
         torch.randn(3, 5, device=device)),
        (lambda x: pu.segment_dot([(x, x)], backend=fused).dot, torch.randn(3, device=device)),
        (lambda x: pu.ghost_dot(OuterSum(x, ghost), backend=fused), torch.randn(2, 3, 4, device=device)),
    ]  # fmt: skip
    for op, x in calls:
        with fwad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            op(fwad.make_dual(x.requires_grad_(with_graph), torch.ones_like(x)))


@pytest.mark.parametrize("budget", [None, 0, 60])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_reference_that_changed_before_backward_is_noticed(which, budget, backend):
    device = device_of(backend)
    hidden, weight = (torch.randn(n, 6, device=device, requires_grad=True) for n in (3, 7))
    reference = [torch.randn(shape, device=device) for shape in ((3, 6), (7, 6), (7,))]
    stats = pu.linear_token_stats(
        hidden, weight, TARGETS.to(device), outputs="kl_pq", reference=tuple(reference), budget_bytes=budget,
        backend=backend,
    )  # fmt: skip
    reference[which] += 1.0
    if budget is None and backend == "eager":
        stats.kl_pq.sum().backward()  # its logits were made in forward, and are autograd's
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.kl_pq.sum().backward()
