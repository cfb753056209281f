import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import OUTPUTS
from pyunlearn.ops.backends import kernels
from pyunlearn.ops.contract import Options
from pyunlearn.ops.from_logits import forward

from .rows import DIFFERENTIABLE, assert_within_budget, device_of, interpreted, skip_unless_taken

module = importlib.import_module("pyunlearn.ops.projection")
N, H, V = 13, 24, 1500
WITHIN, SLICES, SMALLEST = None, N * 8 * 500, 0


def problem(dtype, with_bias, with_reference, backend="cpu"):
    n, v = (N // 2, V // 3) if interpreted(backend) else (N, V)
    like = dict(dtype=dtype, device=device_of(backend))
    hidden, weight = torch.randn(n, H).to(**like), (torch.randn(v, H) / 2).to(**like)
    bias = torch.randn(v).to(**like) if with_bias else None
    reference = (torch.randn(n, H).to(**like), (torch.randn(v, H) / 2).to(**like)) if with_reference else None
    targets = torch.randint(0, v, (n,)).to(like["device"])
    targets[3] = -100
    return hidden, weight, bias, reference, targets


def run(hidden, weight, bias, reference, targets, outputs, upstream, dtype=None, **options):
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in (hidden, weight, bias)
    ]
    if reference is not None:
        reference = tuple(t.to(dtype or t.dtype) for t in reference)
    h, w, b = leaves
    stats = pu.linear_token_stats(h, w, targets, b, outputs, reference, **options).as_dict()
    differentiable = [name for name in outputs if name in DIFFERENTIABLE]
    sum((stats[name].double() * upstream[name].to(h.device)).sum() for name in differentiable).backward()
    grads = {"d" + n: t.grad for n, t in zip(("hidden", "weight", "bias"), leaves, strict=True) if t is not None}
    return {name: value.detach().double().cpu() for name, value in {**stats, **grads}.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [WITHIN, SLICES, SMALLEST])
@pytest.mark.parametrize(("with_bias", "with_reference"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("zero_share", [0, 0.4, 0.8])
def test_error_budget(dtype, budget, with_bias, with_reference, zero_share, backend):
    skip_unless_taken(backend, dtype)
    outputs = OUTPUTS if with_reference else tuple(n for n in OUTPUTS if not n.startswith("kl"))
    if budget == SLICES:
        outputs = outputs[:-1]  # without topk: the columns stream
    args = problem(dtype, with_bias, with_reference, backend)
    n = args[0].size(0)
    upstream = {name: torch.randn(n, dtype=torch.float64) for name in DIFFERENTIABLE}
    for up in upstream.values():
        up[: round(zero_share * n)] = 0
    share = n * args[1].size(0) / (N * V)  # of the size that the budgets are for
    options = dict(budget_bytes=budget and int(budget * share), k=6)
    ours = run(*args, outputs, upstream, backend=backend, **options)
    eager = run(*args, outputs, upstream, backend="eager", **options)
    oracle = run(*args, outputs, upstream, dtype=torch.float64, backend="eager", k=6)
    tol = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for name in oracle:
        if name != "greedy" or dtype != torch.bfloat16:  # rounding the logits to bfloat16 moves ties
            assert_within_budget(ours[name], eager[name], oracle[name], tol, name)


def test_reference_of_another_dtype(backend):
    hidden, weight, _, reference, targets = problem(torch.bfloat16, False, True, backend)
    options = dict(outputs="kl_pq", budget_bytes=0, backend=backend)
    expected = pu.linear_token_stats(hidden, weight, targets, reference=reference, **options).kl_pq
    wider = tuple(tensor.float() for tensor in reference)
    got = pu.linear_token_stats(hidden, weight, targets, reference=wider, **options).kl_pq
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0.02)


def test_extra_memory_stays_within_the_budget():
    """What the call holds beyond its results: logits in slices, counted by torch's own allocator hooks."""
    hidden, weight = torch.randn(256, 32, requires_grad=True), torch.randn(8192, 32, requires_grad=True)
    targets = torch.randint(0, 8192, (256,))
    logits_bytes = 256 * 8192 * 4

    def bytes_of(budget):
        call = lambda: pu.linear_token_stats(hidden, weight, targets, budget_bytes=budget).logp.sum().backward()  # noqa: E731
        return peak_bytes(call, "cpu")

    peak = bytes_of(logits_bytes // 16)
    results = weight.numel() * 4 + hidden.numel() * 4
    assert peak - results < logits_bytes / 8
    full = bytes_of(None)
    assert full - results > logits_bytes / 2  # the measure sees a full buffer


@pytest.mark.parametrize("graph", [False, True])
def test_without_a_graph_logits_stay_in_the_cache(graph):
    x, w, targets = torch.randn(64, 8), torch.randn(20000, 8, requires_grad=True), torch.randint(0, 20000, (64,))

    def call():
        with torch.set_grad_enabled(graph):
            return pu.linear_token_stats(x, w, targets, outputs=("logp", "entropy"))

    stats, peak = call(), peak_bytes(call, "cpu")
    assert (peak < module.CACHED + 64 * 1024) is not graph
    assert (peak > 64 * 20000 * 4) is graph
    logp = (x.double() @ w.detach().double().t()).log_softmax(-1)
    torch.testing.assert_close(stats.logp.detach().double(), logp[range(64), targets], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.entropy.detach().double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


def test_ignored_rows_never_reach_the_head():
    """Nor its products: those of 8 of 12 rows are made, forward and twice backward."""
    hidden = torch.randn(2, 6, H)
    hidden[0, 2:] = float("nan")
    targets = torch.randint(0, V, (2, 6))
    targets[0, 2:] = -100
    hidden.requires_grad_()
    weight = torch.randn(V, H, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        stats = pu.linear_token_stats(hidden, weight, targets)
    assert flops.get_total_flops() == 2 * 8 * V * H
    assert stats.logp.shape == (2, 6)
    assert torch.equal(stats.logp == 0, ~stats.mask)
    with flops:
        stats.logp.sum().backward()
    assert flops.get_total_flops() == 2 * 2 * 8 * V * H
    assert hidden.grad[0, 2:].eq(0).all()
    assert hidden.grad.isfinite().all()


def test_frozen_head_and_frozen_hidden(backend):
    hidden, weight, _, _, targets = problem(torch.float32, False, False, backend)
    full = run(hidden, weight, None, None, targets, ("logp",), {"logp": torch.ones(len(targets))}, backend=backend)
    for budget in (WITHIN, SLICES):
        options = dict(budget_bytes=budget, backend=backend)
        h = hidden.clone().requires_grad_()
        pu.linear_token_stats(h, weight, targets, **options).logp.sum().backward()
        torch.testing.assert_close(h.grad.cpu(), full["dhidden"].float(), atol=1e-5, rtol=1e-5)
        w = weight.clone().requires_grad_()
        pu.linear_token_stats(hidden, w, targets, **options).logp.sum().backward()
        torch.testing.assert_close(w.grad.cpu(), full["dweight"].float(), atol=1e-5, rtol=1e-5)


def test_tied_embedding_and_checkpointing():
    """The head's weight used twice, inside gradient checkpointing: same gradients as plain torch."""
    from torch.utils.checkpoint import checkpoint

    weight = torch.randn(50, H, requires_grad=True)
    ids, targets = torch.randint(0, 50, (9,)), torch.randint(0, 50, (9,))

    def ours():
        hidden = weight[ids].tanh()
        return checkpoint(lambda h: pu.linear_token_stats(h, weight, targets).logp.sum(), hidden, use_reentrant=False)

    def plain():
        return (weight[ids].tanh() @ weight.t()).log_softmax(-1).gather(-1, targets[:, None]).sum()

    torch.testing.assert_close(torch.autograd.grad(ours(), weight), torch.autograd.grad(plain(), weight))


def test_autocast_casts_the_gemm_not_the_statistics():
    hidden, weight, _, _, targets = problem(torch.float32, False, False)
    expected = pu.linear_token_stats(hidden.bfloat16(), weight.bfloat16(), targets).logp
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pu.linear_token_stats(hidden, weight, targets).logp
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_second_backward():
    hidden, weight, _, _, targets = problem(torch.float32, False, False)
    h = hidden.requires_grad_()
    loss = pu.linear_token_stats(h, weight, targets).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward.*budget_bytes=0"):
        loss.backward()
    loss = pu.linear_token_stats(h, weight, targets, budget_bytes=0).logp.sum()
    first = torch.autograd.grad(loss, h, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, h)[0])


@pytest.mark.parametrize("shape", [(H,), (2, 3, H), (0, H)])
def test_shapes(shape):
    hidden, weight = torch.randn(shape, requires_grad=True), torch.randn(V, H)
    targets = torch.randint(0, V, shape[:-1])
    stats = pu.linear_token_stats(hidden, weight, targets)
    assert stats.logp.shape == targets.shape
    stats.logp.sum().backward()
    assert hidden.grad.shape == shape


def test_state_streams_in_any_split(fused):
    """Merging the columns in slices gives the statistics of the whole row; so does a row's state in parts."""
    options, kernel = Options(OUTPUTS[:-1]), kernels(fused)
    logits, reference = torch.randn(7, 1000) * 4, torch.randn(7, 1000)
    targets = torch.randint(0, 1000, (7,))
    logits, reference, targets = (t.to(device_of(fused)) for t in (logits, reference, targets))
    whole = forward(logits, targets, reference, options, fused)[0]
    splits = [(0, 1), (1, 400), (400, 417), (417, 1000)]
    state, parts = kernel.new_state(logits, 7, 1000), []
    for i, j in splits:
        columns = logits[:, i:j], targets, reference[:, i:j]
        kernel.accumulate(*columns, state, options, i, 1000, i == 0)
        parts.append(kernel.new_state(logits, 7, j - i))
        kernel.accumulate(*columns, parts[-1], options, i, 1000, True)
    for streamed in (state, torch.cat(parts, dim=1)):
        stats = kernel.finish(streamed, targets, True, options, 1000)[0]
        torch.testing.assert_close(stats, whole, atol=2e-6, rtol=2e-6)


HID, W, T = torch.randn(2, H), torch.randn(V, H), torch.zeros(2, dtype=torch.long)
BAD = [
    (dict(weight=W[:, 1:]), ValueError, r"hidden, weight: need shapes \(\.\.\., H\) and \(V, H\)"),
    (dict(bias=torch.zeros(3)), ValueError, "bias: needs shape"),
    (dict(targets=T[:1]), ValueError, "targets: needs shape"),
    (dict(targets=torch.tensor([0, V])), IndexError, f"targets: row 1 holds {V}"),
    (dict(weight=W.double()), TypeError, "weight: needs the dtype of hidden"),
    (dict(weight=W.to("meta")), ValueError, "weight: needs the device of hidden"),
    (dict(outputs="kl_pq"), ValueError, "needs reference="),
    (dict(outputs="kl_pq", reference=(HID,)), TypeError, "reference: needs"),
    (
        dict(outputs="kl_pq", reference=(HID[:1], W)),
        ValueError,
        "reference: needs hidden states for the rows",
    ),
    (
        dict(outputs="kl_pq", reference=(HID, W[1:])),
        ValueError,
        "reference: needs hidden states for the rows",
    ),
    (dict(outputs="kl_pq", reference=(HID, W.double())), TypeError, r"reference\[1\]: needs the dtype"),
    (dict(outputs="topk", k=200, weight=W[:100]), ValueError, "k=200: needs at most V=100"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        pu.linear_token_stats(**{"hidden": HID, "weight": W, "targets": T, **change})
