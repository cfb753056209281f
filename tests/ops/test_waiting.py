"""On a GPU no step waits for its numbers where the caller asks for none: no position to ignore, a budget given."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyunlearn as pu
from pyunlearn.ops import from_hidden, from_logits, one_pass, one_pass_hidden
from pyunlearn.ops.backends import native, unavailable

N, V, H = 16, 600, 8
BUDGETS = [N * V * 8, N * 4 * 300, 0]  # all logits, slices, the narrowest


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU's host would need a number, or a size, that lies there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
            raise AssertionError(f"{op} waits for the GPU")
        return op(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """The CPU's tensors say that they are a GPU's, and torch's dispatcher sees what is done with them."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    monkeypatch.setattr(native, "_stream", lambda like: 0)
    for module in (from_hidden, one_pass_hidden):
        monkeypatch.setattr(module, "check_range", lambda *_: None)
    for module in (from_logits, one_pass):
        monkeypatch.setattr(module, "owner", lambda *_: "")
    with NoWaiting():
        yield


def step(**options):
    """Statistics from hidden states, and the gradients of all that has one."""
    leaves = [torch.randn(size, requires_grad=True) for size in ((N, H), (V, H), (V,))]
    hidden, weight, bias = leaves
    reference = (hidden.detach() + 0.1, weight.detach())
    outputs = ("logp", "entropy", "kl_pq")
    stats = pu.linear_token_stats(hidden, weight, torch.arange(N), bias, outputs, reference, **options)
    return torch.autograd.grad(sum(value.sum() for value in stats.as_dict().values()), leaves)


@pytest.mark.parametrize("budget", BUDGETS)
def test_from_hidden_states(gpu, budget):
    assert all(gradient.shape for gradient in step(ignore_index=None, budget_bytes=budget, backend="cpu"))


@pytest.mark.parametrize("budget", BUDGETS)
def test_of_hidden_states_in_one_pass(gpu, budget):
    hidden, weight = (torch.randn(size, requires_grad=True) for size in ((N, H), (V, H)))
    rest = dict(ignore_index=None, budget_bytes=budget, backend="cpu")
    _, gradients = pu.linear_value_and_grad(hidden, weight, torch.arange(N), torch.ones(N), **rest)
    assert gradients.hidden.shape == hidden.shape


def test_positions_that_are_looked_for_are_waited_for(gpu):
    """What the test above says of a step that waits."""
    with pytest.raises(AssertionError, match=r"nonzero.* waits for the GPU"):
        step(budget_bytes=0, backend="cpu")


def test_of_logits(gpu):
    logits = torch.randn(N, V, requires_grad=True)
    stats = pu.token_stats(logits, torch.arange(N), ("logp", "entropy"), backend="cpu")
    (stats.logp + stats.entropy).sum().backward()
    assert logits.grad.shape == logits.shape


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def captured(call):
    """What `call` gives when a CUDA graph plays it, and by itself."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            plain = call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return results, plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("budget", [*BUDGETS, None])
def test_a_step_is_captured_in_a_cuda_graph(backend, budget):
    """None: the logits are there. With a budget: from hidden states."""
    if reason := unavailable(backend):
        pytest.skip(reason)
    targets = torch.randint(0, V, (N,), device="cuda")
    x, w = torch.randn(N, H, device="cuda", requires_grad=True), torch.randn(V, H, device="cuda", requires_grad=True)
    logits = torch.randn(N, V, device="cuda", requires_grad=True)

    def call():
        if budget is None:
            stats = pu.token_stats(logits, targets, ("logp", "entropy"), backend=backend)
            return torch.autograd.grad((stats.logp + stats.entropy).sum(), (logits,))
        stats = pu.linear_token_stats(
            x, w, targets, outputs=("logp", "entropy"), ignore_index=None, budget_bytes=budget, backend=backend
        )
        return torch.autograd.grad((stats.logp + stats.entropy).sum(), (x, w))

    for mine, plain in zip(*captured(call), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only the GEMMs of a GPU add 16-bit products to float32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_added_in_place(dtype):
    from pyunlearn.ops.products import FLOAT32_SUMS, product

    a, b = (torch.randn(*size, device="cuda").to(dtype) for size in ((512, 700), (700, 640)))
    out = torch.zeros(512, 640, device="cuda")
    exact = a.double() @ b.double()
    product(a, b, out, True)  # the library's workspace is there from now on
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product(a, b, out, True)
    product(a, b, out, True)
    if FLOAT32_SUMS:
        assert torch.cuda.max_memory_allocated() == before
    assert (out.double() - 3 * exact).abs().max() <= 1e-5 * exact.abs().max()
    product(a, b, out, False)
    assert (out.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
