import math

import pytest
import torch

import pyunlearn as pu
from benchmarks.measure import peak_bytes
from pyunlearn.ops import OUTPUTS
from pyunlearn.ops.backends import kernels
from pyunlearn.ops.contract import Options

from .conftest import FUSED
from .rows import (
    DIFFERENTIABLE,
    KINDS,
    assert_within_budget,
    device_of,
    interpreted,
    rows,
    run,
    runs,
    skip_unless_taken,
    upstreams_of,
)

TOL = {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2e-5, torch.float16: 2e-5}
DTYPES = list(TOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("v", [2, 37, 1000, 20011])
def test_error_budget(kind, v, dtype, fused):
    """Every output's value and gradient, alone and together, on adversarial rows."""
    skip_unless_taken(fused, dtype)
    n, k, alone = 8, min(20, v), v < 4000
    if interpreted(fused):
        n, k, alone = (8 if v > 100 else 4), min(6, v), v == 1000
        v = min(v, 4104)  # in two parts, of several chunks where there is a reference
    elif v > 20000 and kind not in ("random", "offset", "peaked"):
        v = 4099
    logits, reference, targets = (t.to(dtype) if t.is_floating_point() else t for t in rows(kind, n, v))
    names = tuple(n for n in DIFFERENTIABLE if n != "uniform_ce" or kind != "masked")  # infinite there, by definition
    upstreams = upstreams_of(names, n, fused)[0 if alone else -1 :]
    ours, d_ours = runs(logits, targets, reference, upstreams, backend=fused, k=k)
    eager, d_eager = runs(logits, targets, reference, upstreams, backend="eager", k=k)
    oracle, d_oracle = runs(logits.double(), targets, reference.double(), upstreams, backend="eager", k=k)
    oracle["logp"] = -oracle["log_nll"].exp()  # float64 log_softmax itself is 0 from a margin of 38 on
    for name in OUTPUTS:
        assert_within_budget(ours[name], eager[name], oracle[name], TOL[dtype], f"{name} of {kind} rows")
    tol = TOL[dtype] + torch.finfo(dtype).eps  # the gradient is stored in the logits' dtype
    for upstream, *grads in zip(upstreams, d_ours, d_eager, d_oracle, strict=True):
        assert_within_budget(*grads, tol, f"d{tuple(upstream)} of {kind} rows")


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"softcap": 5.0}, {"softcap": 8.0, "temperature": 1.7}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transforms(options, dtype, fused):
    skip_unless_taken(fused, dtype)
    logits, reference, targets = (t.to(dtype) if t.is_floating_point() else t for t in rows("random", 6, 333))
    upstream = {name: torch.randn(6, dtype=torch.float64) for name in DIFFERENTIABLE}
    ours, d_ours = run(logits, targets, reference, upstream, backend=fused, **options)
    eager, d_eager = run(logits, targets, reference, upstream, backend="eager", **options)
    oracle, d_oracle = run(logits.double(), targets, reference.double(), upstream, backend="eager", **options)
    for name in OUTPUTS:
        assert_within_budget(ours[name], eager[name], oracle[name], TOL[dtype], name)
    assert_within_budget(d_ours, d_eager, d_oracle, TOL[dtype] + torch.finfo(dtype).eps, "gradient")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 3.0}])
def test_gradcheck(name, options, backend):
    skip_unless_taken(backend, torch.float64)
    logits, reference, targets = (t.double() if t.is_floating_point() else t for t in rows("random", 3, 11))
    targets[1] = -100
    if name == "topk":  # its weights are constants: compare with the formula b - p instead of finite differences
        _, grad = run(
            logits,
            targets,
            None,
            {"topk": torch.ones(3).double()},
            outputs=("topk",),
            k=4,
            backend=backend,
            **options,
        )
        z = pu.ops.backends.eager.transform(logits, pu.ops.contract.Options(**options)).requires_grad_()
        p = z.softmax(-1)
        kth = z.topk(4).values[:, -1:]
        b = torch.where(z >= kth, p, 0.0) / torch.where(z >= kth, p, 0.0).sum(-1, keepdim=True)
        x = logits.detach().clone().requires_grad_()
        dz = (b - p).detach()
        dz[1] = 0
        pu.ops.backends.eager.transform(x, pu.ops.contract.Options(**options)).backward(dz)
        torch.testing.assert_close(grad, x.grad, atol=1e-12, rtol=1e-10)
        return
    logits, reference, targets = (t.to(device_of(backend)) for t in (logits, reference, targets))

    def statistic(x):
        return getattr(pu.token_stats(x, targets, (name,), reference=reference, backend=backend, **options), name)

    assert torch.autograd.gradcheck(statistic, logits.requires_grad_(), fast_mode=interpreted(backend))


def test_double_backward_raises(fused):
    device = device_of(fused)
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    weights = torch.randn(2, device=device, requires_grad=True)
    value = (pu.token_stats(logits, torch.tensor([0, 1], device=device), backend=fused).logp * weights).sum()
    (grad,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        grad.sum().backward()


def test_memorised_token_keeps_its_gradient(fused):
    """Where float32 log_softmax gives an NLL of exactly 0, ours is right to 1e-6 (margin 40)."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 40.0
    names = ("logp", "log_nll")
    stats, grad = run(logits, torch.tensor([7]), None, {"log_nll": torch.ones(1)}, outputs=names, backend=fused)
    assert -stats["logp"].item() == pytest.approx(49 * math.exp(-40), rel=1e-6)
    assert stats["log_nll"].item() == pytest.approx(math.log(49) - 40, rel=1e-6)
    assert float(grad[0, 7]) == pytest.approx(-1, rel=1e-5)
    assert grad[0, :7].tolist() == pytest.approx([1 / 49] * 7, rel=1e-5)


def test_peaked_and_shifted_rows_keep_their_digits(fused):
    """Entropy of 1e-5 nats right to 1e-5 of itself, KL and uniform_ce unharmed by logits around 3000."""
    for kind in ("peaked", "offset"):
        logits, reference, targets = rows(kind, 8, 20011)
        ours, _ = run(logits, targets, reference, {}, backend=fused)
        oracle, _ = run(logits.double(), targets, reference.double(), {}, backend="eager")
        torch.testing.assert_close(ours["entropy"], oracle["entropy"], atol=0, rtol=1e-5)
        for name in ("kl_pq", "kl_qp", "uniform_ce"):
            torch.testing.assert_close(ours[name], oracle[name], atol=2e-6, rtol=2e-6)


def test_lse_is_torchs(backend):
    """Of hidden states too, in slices; the z-loss's gradient is 2 lse p."""
    hidden, weight = torch.randn(5, 8), torch.randn(300, 8)
    targets, device = torch.tensor([3, 4, 5, -100, 6]), device_of(backend)
    logits = (hidden @ weight.t()).to(device).requires_grad_()
    lse = pu.token_stats(logits, targets.to(device), "lse", backend=backend).lse
    right = logits.detach().logsumexp(-1).cpu()
    right[3] = 0
    torch.testing.assert_close(lse.cpu(), right)
    (grad,) = torch.autograd.grad(lse.square().sum(), logits)
    torch.testing.assert_close(grad.cpu(), 2 * right[:, None] * logits.detach().cpu().softmax(-1))
    _, grad = pu.value_and_grad(logits, targets.to(device), {"lse": 2 * lse.detach()}, backend=backend)
    torch.testing.assert_close(grad.cpu(), 2 * right[:, None] * logits.detach().cpu().softmax(-1))
    both = ("lse", "uniform_ce")
    for budget in (None, 0):
        head = (t.to(device) for t in (hidden, weight, targets))
        stats = pu.linear_token_stats(*head, outputs=both, budget_bytes=budget, backend=backend)
        torch.testing.assert_close(stats.lse.cpu(), right)
        mean = (stats.lse - stats.uniform_ce).cpu()
        torch.testing.assert_close(mean, logits.detach().cpu().mean(-1) * stats.mask.cpu(), atol=1e-5, rtol=1e-5)


def test_greedy_ties_across_slices_and_parts(fused):
    """The lowest index wins wherever the row was cut, in the last columns of a slice too."""
    kernel, options = kernels(fused), Options(("greedy",))
    logits = torch.zeros(4, 9000, device=device_of(fused))
    logits[0, 4099] = logits[1, 4100] = logits[2, 8999] = 1.0
    logits[:, 7000] = 1.0
    targets = torch.full((4,), 7000, device=device_of(fused))
    state = kernel.new_state(logits, 4, 9000)
    for i, j in ((0, 4101), (4101, 9000)):
        kernel.accumulate(logits[:, i:j], targets, None, state, options, i, 9000, i == 0)
    sliced, _ = kernel.finish(state, targets, False, options, 9000)
    whole = pu.token_stats(logits, targets, options.outputs, backend=fused).greedy
    assert (sliced[0] > 0).tolist() == whole.tolist() == [False, False, True, True]


def test_a_lane_without_reference_probability(fused):
    """q_j = 0 < p_j: KL(p || q) is infinite, KL(q || p) and its gradient p - q are not."""
    logits, reference = torch.randn(2, 50), torch.randn(2, 50)
    reference[:, 3] = float("-inf")
    targets, upstream = torch.tensor([3, 5]), {"kl_qp": torch.ones(2)}
    stats, grad = run(logits, targets, reference, upstream, outputs=("kl_pq", "kl_qp"), backend=fused)
    assert stats["kl_pq"].isinf().all()
    p, q = logits.double().softmax(-1), reference.double().softmax(-1)
    torch.testing.assert_close(grad, p - q, atol=1e-6, rtol=1e-5)
    q_log_q = torch.where(q > 0, q * q.log(), 0.0).sum(-1)
    torch.testing.assert_close(stats["kl_qp"], q_log_q - (q * p.log()).sum(-1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_reference", DTYPES)
def test_reference_of_another_dtype(dtype, of_reference, fused):
    """Each is read as it is: the statistics and the gradient of these very numbers."""
    skip_unless_taken(fused, dtype)
    logits, reference, targets = rows("random", 4, 173)
    logits, reference = logits.to(dtype), reference.to(of_reference)
    names = ("kl_pq", "kl_qp", "entropy")
    upstream = {name: torch.linspace(0.5, 1.5, 4) for name in names}
    got, d_got = run(logits, targets, reference, upstream, outputs=names, backend=fused, softcap=30.0)
    wide = logits.double(), targets, reference.double()
    oracle, d_oracle = run(*wide, upstream, outputs=names, backend="eager", softcap=30.0)
    for name in names:
        torch.testing.assert_close(got[name], oracle[name], atol=1e-6, rtol=1e-5)
    rounding = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-6
    torch.testing.assert_close(d_got, d_oracle, atol=2e-6, rtol=rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_reference", [torch.float64, torch.float32])
def test_the_twin_reads_a_reference_in_the_precision_of_the_logits(dtype, of_reference):
    logits, reference, targets = rows("random", 4, 173)
    logits, reference = logits.to(dtype), reference.to(of_reference)
    stats = pu.token_stats(logits, targets, ("kl_pq", "kl_qp"), reference=reference, backend="eager")
    log_p, log_q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    exact = {"kl_pq": log_p.exp() * (log_p - log_q), "kl_qp": log_q.exp() * (log_q - log_p)}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in stats.as_dict().items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), exact[name].sum(-1), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_reference_of_another_dtype_is_not_copied(dtypes):
    logits, reference, targets = rows("random", 64, 5000)
    x, reference = logits.to(dtypes[0]).requires_grad_(), reference.to(dtypes[1])

    def forward_and_backward():
        stats = pu.token_stats(x, targets, "kl_pq", reference=reference, backend="cpu")
        return torch.autograd.grad(stats.kl_pq.sum(), x)

    room = x.numel() * x.element_size()
    assert room <= peak_bytes(forward_and_backward, "cpu") < 1.2 * room  # the gradient, and states


@pytest.mark.parametrize("wider", ["reference", "logits"])
def test_a_rounded_twin_is_not_the_reference(wider, backend):
    """KL between float32 logits and their bfloat16 rounding is the rounding's, whichever of them is the reference."""
    whole, _, targets = rows("random", 4, 72)
    rounded = whole.bfloat16()
    logits, reference = (rounded, whole) if wider == "reference" else (whole, rounded)
    names = ("kl_pq", "kl_qp")
    upstream = {name: torch.ones(4) for name in names}
    got, d_got = run(logits, targets, reference, upstream, outputs=names, backend=backend)
    oracle, d_oracle = run(logits.double(), targets, reference.double(), upstream, outputs=names, backend="eager")
    for name in names:
        assert oracle[name].min() > 2e-6
        torch.testing.assert_close(got[name], oracle[name], atol=3e-7, rtol=1e-3)
    torch.testing.assert_close(d_got, d_oracle, atol=1e-6, rtol=5e-3)


def test_rows_of_zero_upstream_get_zero_whatever_they_hold(fused):
    logits = torch.randn(3, 50)
    logits[1] = float("nan")
    up = torch.tensor([1.0, 0.0, 2.0])
    _, grad = run(logits, torch.tensor([3, 4, 5]), None, {"logp": up}, outputs=("logp",), backend=fused)
    assert grad[1].eq(0).all()
    assert grad[[0, 2]].isfinite().all()
    assert grad[[0, 2]].ne(0).all()


def test_nan_logits_give_nan(backend):
    logits = torch.randn(3, 40)
    logits[1, 20] = float("nan")
    stats, _ = run(logits, torch.tensor([0, 3, 5]), None, {}, outputs=("logp", "entropy"), backend=backend)
    assert stats["logp"].isnan().tolist() == [False, True, False]
    assert stats["entropy"].isnan().tolist() == [False, True, False]


def test_greedy_ties_go_to_the_lowest_index(backend):
    logits = torch.zeros(3, 40)
    logits[:, [3, 20]] = 1.0
    stats, _ = run(logits, torch.tensor([3, 20, 5]), None, {}, outputs=("greedy",), backend=backend)
    assert stats["greedy"].tolist() == [1, 0, 0]


L, T = torch.randn(2, 6), torch.zeros(2, dtype=torch.long)
BAD = [
    (dict(outputs=("logpp",)), ValueError, "outputs=.*logpp"),
    (dict(outputs=()), ValueError, "outputs="),
    (dict(outputs=("kl_pq",)), ValueError, "kl_pq.*needs reference="),
    (dict(temperature=0.0), ValueError, "temperature=0.0: needs a finite number > 0"),
    (dict(softcap=-1.0), ValueError, "softcap=-1.0"),
    (dict(k=0), ValueError, "k=0"),
    (dict(outputs="topk", k=7), ValueError, "k=7: needs at most V=6"),
    (dict(targets=T[:1]), ValueError, r"targets: needs shape \(2,\)"),
    (dict(targets=T.float()), TypeError, "targets: needs int64 or int32, got torch.float32"),
    (dict(targets=torch.tensor([0, 6])), IndexError, "targets: row 1 holds 6, needs 0 <= target < 6"),
    (dict(targets=torch.tensor([-1, 0])), IndexError, "targets: row 0 holds -1"),
    (dict(logits=L.long()), TypeError, "logits: needs bfloat16"),
    (dict(logits=torch.randn(6, 2).t()), ValueError, "logits: the last dimension needs stride 1"),
    (dict(logits=torch.randn(2, 0)), ValueError, "logits: needs shape"),
    (dict(outputs="kl_pq", reference=L[:1]), ValueError, "reference: needs the shape of logits"),
    (dict(outputs="kl_pq", reference=L.to("meta")), ValueError, "reference: needs the device of logits"),
    (dict(targets=T.to("meta")), ValueError, "targets: needs the device of logits"),
    (dict(backend="cudnn"), ValueError, "backend='cudnn': needs one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message, backend):
    device = device_of(backend)
    given = {"logits": L, "targets": T, "backend": backend, **change}
    moved = {k: t.to(device) if isinstance(t, torch.Tensor) and not t.is_meta else t for k, t in given.items()}
    if "cuda" in (device, backend) and error is IndexError:  # looking would be a sync: NaN in that row alone
        wrong = (change["targets"] < 0) | (change["targets"] >= L.size(-1))
        assert torch.equal(pu.token_stats(**moved).logp.isnan().cpu(), wrong)
        return
    with pytest.raises(error, match=message):
        pu.token_stats(**moved)


def test_float64_is_refused():
    with FUSED["cuda"]() as cuda, pytest.raises(ValueError, match="takes float32, float16 and bfloat16"):
        pu.token_stats(L.double().to(device_of(cuda)), T.to(device_of(cuda)), backend=cuda)


def test_missing_output_says_what_to_ask_for():
    stats = pu.token_stats(L, T)
    with pytest.raises(AttributeError, match="'entropy' was not requested"):
        _ = stats.entropy
    with pytest.raises(AttributeError, match="no 'entropie'"):
        _ = stats.entropie
    assert "logp" in repr(stats)
