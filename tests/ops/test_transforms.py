"""Under torch.func, FakeTensorMode and torch.compile the ops are right or refused in a sentence, and never crash."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyunlearn as pu

X, TARGETS = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])


def logp(x, backend=None):
    return pu.token_stats(x, TARGETS, ("logp", "entropy"), backend=backend).logp


def gradient(x):
    return pu.value_and_grad(x, TARGETS, torch.ones(4))[1]


def test_vmap_and_functionalize():
    many = torch.randn(3, 4, 6)
    torch.testing.assert_close(torch.func.vmap(logp)(many), torch.stack([logp(x) for x in many]))
    torch.testing.assert_close(torch.func.functionalize(logp)(X), logp(X))
    torch.testing.assert_close(torch.func.functionalize(gradient)(X), gradient(X))


def test_fake_tensors():
    with FakeTensorMode():
        x, targets = torch.randn(4, 6), torch.zeros(4).long()
        assert pu.token_stats(x, targets).logp.shape == (4,)
        assert pu.value_and_grad(x, targets, torch.ones(4))[1].shape == (4, 6)
        for op in (lambda: pu.segment_dot([(x, x)]), lambda: pu.gaussian_noise(4)):
            with pytest.raises(ValueError, match="no memory"):
                op()


def test_zero_tensors_are_refused():
    zeros = torch._efficientzerotensor(4, 6)
    for op in (logp, gradient, lambda z: pu.segment_dot([(z, z)])):
        with pytest.raises(ValueError, match="no memory"):
            op(zeros)


def test_torch_func_grad_and_jvp_are_the_eager_backends():
    def loss(x):
        return logp(x).sum()

    def linear(x):
        return pu.linear_token_stats(x, torch.ones(7, 6), TARGETS).logp.sum()

    for call in (
        lambda: torch.func.grad(loss)(X),
        lambda: torch.func.jvp(loss, (X,), (X,)),
        lambda: torch.func.vmap(torch.func.grad(loss))(X.expand(2, 4, 6)),
        lambda: torch.func.grad(linear)(X),
    ):
        with pytest.raises(RuntimeError, match="need backend='eager'"):
            call()
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(logp(x).sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: logp(x, "eager").sum())(X), expected)


@pytest.mark.parametrize("op", [logp, gradient])
def test_compile_with_dynamic_shapes(op):
    compiled = torch.compile(lambda x: op(x), dynamic=True, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), op(X))
