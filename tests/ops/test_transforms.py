"""Under torch.func, FakeTensorMode and torch.compile the ops are right or refused in a sentence, and never crash."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS, OuterSum, TokenRule

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


WEIGHT = torch.randn(7, 6)
OPS = {  # of (logits or hidden states (4, 6), targets (4,)), all outputs that each has
    "token_stats": lambda x, t, backend: pu.token_stats(x, t, OUTPUTS, reference=2 * x, k=3, backend=backend),
    "value_and_grad": lambda x, t, backend: pu.value_and_grad(x, t, x[..., 0], backend=backend),
    "with a rule": lambda x, t, backend: pu.value_and_grad(
        x, t, {"logp": torch.ones(4), "lse": torch.ones(4)}, TokenRule(alpha=1.0), backend=backend
    ),
    "in place": lambda x, t, backend: pu.value_and_grad(x.clone(), t, x[..., 0], inplace=True, backend=backend),
    "linear_token_stats": lambda x, t, backend: pu.linear_token_stats(
        x, WEIGHT, t, WEIGHT[:, 0], OUTPUTS, reference=(2 * x, WEIGHT), k=3, backend=backend, adapter=(x, WEIGHT)
    ),
    "bfloat16": lambda x, t, backend: pu.linear_token_stats(
        x.bfloat16(), WEIGHT.bfloat16(), t, outputs=("entropy",), backend=backend
    ),
}


def tensors_of(op, backend):
    def call(x, targets):
        result = OPS[op](x, targets, backend)
        stats, *rest = result if isinstance(result, tuple) else (result,)
        return [*stats.as_dict().values(), *rest]

    return call


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("graph", [True, False])
def test_vmap(op, backend, graph):
    """Over logits or hidden states, and targets too, along any dimension."""
    many, targets = torch.randn(3, 4, 6), torch.tensor([[0, 1, 2, -100], [3, 3, 5, 1], [-100] * 4])
    call = tensors_of(op, backend)
    with torch.set_grad_enabled(graph):
        expected = [torch.stack(parts) for parts in zip(*map(call, many, targets), strict=True)]
        for got in (
            torch.func.vmap(call)(many, targets),
            torch.func.vmap(call, in_dims=(2, 1))(many.permute(1, 2, 0), targets.t()),
        ):
            for mine, right in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, right, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_targets_out_of_range(op):
    many, targets = torch.randn(3, 4, 6), torch.zeros(3, 4, dtype=torch.int64)
    targets[1, 2] = 9
    for backend in ("cpu", "eager"):
        with pytest.raises(IndexError, match=r"targets: row \d holds 9, needs 0 <= target < "):
            torch.func.vmap(tensors_of(op, backend))(many, targets)


def test_the_eager_backend_has_every_transform():
    loss = lambda x: logp(x, "eager").sum()  # noqa: E731
    linear = lambda x: pu.linear_token_stats(x, WEIGHT, TARGETS, backend="eager").logp  # noqa: E731
    plain = lambda x: x.log_softmax(-1).gather(-1, TARGETS[:, None]).squeeze(-1)  # noqa: E731
    head = lambda x: plain(x @ WEIGHT.t())  # noqa: E731
    for ours, right in ((loss, lambda x: plain(x).sum()), (linear, head)):
        for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            torch.testing.assert_close(transform(ours)(X), transform(right)(X))
        for mine, theirs in zip(*(torch.func.jvp(f, (X,), (X + 1,)) for f in (ours, right)), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("op", OPS)
def test_other_backends_refuse_derivatives(op):
    call = lambda x: tensors_of(op, "cpu")(x, TARGETS)[0]  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(RuntimeError, match=r"torch.func's grad and jvp need .*backend='eager'"):
            transform(call)(X)
    with pytest.raises(RuntimeError, match=r"value_and_grad: torch.func's grad and jvp need token_stats"):
        torch.func.grad(lambda x: tensors_of("value_and_grad", "eager")(x, TARGETS)[1].sum())(X)


def test_inner_products_are_refused():
    dots = lambda x: pu.segment_dot([(x, X)]).dot.sum()  # noqa: E731
    ghosts = lambda x: pu.ghost_dot(OuterSum(x[None], X[None])).sum()  # noqa: E731
    for op, name in ((dots, "segment_dot"), (ghosts, "ghost_dot")):
        for transform in (torch.func.vmap, torch.func.grad, torch.func.functionalize):
            with pytest.raises(RuntimeError, match=f"{name}: takes no tensors of torch.func's transforms"):
                transform(op)(X[None].expand(3, 4, 6) if transform is torch.func.vmap else X)
    assert torch.equal(torch.func.vmap(lambda x: x + dots(X))(X), X + dots(X))  # nothing of it is transformed


EXPORTED = {
    **{op: lambda x, op=op: tuple(tensors_of(op, None)(x, TARGETS)) for op in OPS},
    "segment_dot": lambda x: tuple(pu.segment_dot([(x, X)])),
    "ghost_dot": lambda x: pu.ghost_dot(OuterSum(x[None], X[None])),
}


@pytest.mark.parametrize("op", EXPORTED)
@pytest.mark.parametrize("strict", [True, False])
def test_export(op, strict):
    class Module(torch.nn.Module):
        def forward(self, x):
            return EXPORTED[op](x)

    program = torch.export.export(Module(), (X.clone(),), strict=strict)
    for mine, right in zip(program.module()(X + 1), Module()(X + 1), strict=True):
        torch.testing.assert_close(mine, right)


def test_in_place_backward_is_declined():
    declined = {}

    def call(x):
        stats = pu.token_stats(x, TARGETS, inplace_backward=True)
        declined.update(stats.declined)
        return stats.logp

    torch.func.vmap(call)(torch.randn(3, 4, 6))
    assert declined == {"in-place backward": "torch.func owns the memory"}


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
