"""BS-T, UNDIAL, CE-U, PDU and FLAT through the kernels: against their targets written out, at any certainty."""

from __future__ import annotations

import math

import pytest
import torch

from pyunlearn import linear_token_stats, token_stats
from pyunlearn import objectives as o

V = 40


def rows(margin, dtype=torch.float64, seed=0):
    """(logits, reference, targets): the target's logit is `margin` above the likeliest other one, for both models."""
    g = torch.Generator().manual_seed(seed)
    logits, reference = (torch.randn(6, V, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    targets = torch.randint(0, V, (6,), generator=g)
    for x in (logits, reference):
        others = x.scatter(-1, targets[:, None], -torch.inf)
        x.scatter_(-1, targets[:, None], others.amax(-1, keepdim=True) + margin)
    return logits.to(dtype).requires_grad_(), reference.to(dtype), targets


def straight(name, z, r, y, **options):
    """Loss a token, with the target distribution written out."""
    onehot = torch.nn.functional.one_hot(y, V).to(z)
    log_p = z.log_softmax(-1)
    if name == "bst":
        top, at = z.detach().topk(options["k"], -1)
        belief = torch.zeros_like(z).scatter(-1, at, top.softmax(-1))
        goal = options["lam"] * belief + (1 - options["lam"]) * onehot
        return torch.where(goal > 0, goal * log_p, 0.0).sum(-1)
    if name == "pdu":
        return (z.amax(-1) - z.mean(-1)) ** 2
    if name == "undial":
        goal = (r - options["b"] * onehot).softmax(-1)
    if name == "ce_u":
        goal = z.detach().masked_fill(onehot > 0, -torch.inf).softmax(-1)
    return -torch.where(goal > 0, goal * log_p, 0.0).sum(-1)


def ours(name, z, r, y, backend=None, **options):
    objective = o.get(name, reduction="sum", **options)
    how = {} if objective.k is None else {"k": objective.k}
    reference = r if objective.reference == "kl" else None
    how |= {"lowered": objective.lowered} if objective.lowered else {}
    stats = token_stats(z, y, objective.outputs, reference=reference, backend=backend, **how)
    frozen = token_stats(r, y, ("logp", "entropy"), backend=backend)
    ids = torch.arange(len(y))
    given = o.TokenInputs(
        stats.as_dict(), ref_logp=frozen.logp, ref_entropy=frozen.entropy, sequence_ids=ids, num_sequences=len(y)
    )
    return objective({"answer": given})


CASES = [("bst", {"k": 5, "lam": 0.3}), ("bst", {"k": V, "lam": 1.0}), ("undial", {"b": 10.0}), ("undial", {"b": 0.5})]
CASES += [("ce_u", {}), ("pdu", {})]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("margin", [-80.0, -20.0, -3.0, 0.5, 1.0, 5.0, 12.0, 25.0])
@pytest.mark.parametrize("backend", ["eager", None])
def test_value_and_gradient_at_any_certainty(name, options, margin, backend):
    z, r, y = rows(margin)
    value, want = ours(name, z, r, y, backend, **options), straight(name, z, r, y, **options).sum()
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-11)
    one, other = (torch.autograd.grad(loss, z)[0] for loss in (value, want))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(("name", "options"), [*CASES, ("undial", {"b": 30.0})])
@pytest.mark.parametrize("margin", [-80.0, -3.0, 0.5, 5.0, 12.0, 16.0, 17.0, 20.0, 30.0, 40.0])
def test_float32_is_no_worse_than_the_straight_version(name, options, margin):
    """The error budget of the field: |ours - fp64| <= |straight - fp64| + tolerance."""
    z, r, y = rows(margin, torch.float32)
    exact = z.detach().double().requires_grad_(), r.double(), y
    want = straight(name, *exact, **options).sum()
    (goal,) = torch.autograd.grad(want, exact[0])
    value, plain = ours(name, z, r, y, **options), straight(name, z, r, y, **options).sum()
    grads = [torch.autograd.grad(loss, z)[0] for loss in (value, plain)]
    assert value.isfinite()
    allowed = abs(plain.item() - want.item()) + 3e-6 * abs(want.item()) + 2e-6 * len(y)
    assert abs(value.item() - want.item()) <= allowed
    worst = (grads[1] - goal).abs().max() + 2e-6 * (goal.abs().max() + 1)
    assert (grads[0] - goal).abs().max() <= worst


@pytest.mark.parametrize("b", [0.5, 10.0, 30.0])
@pytest.mark.parametrize("margin", [-1000.0, 5.0, 16.0, 17.0, 20.0, 31.0, 1000.0])
@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("moved", [0.0, 0.5])
def test_undial_of_tokens_that_the_reference_is_sure_of(b, margin, backend, moved):
    """d(loss)/d(logits) is p - target in float32 too, of the right sign in the lane of the answer."""
    _, r, y = rows(margin, torch.float32)
    z = (r + moved * torch.randn(r.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    value = ours("undial", z, r, y, backend, b=b)
    wide = z.detach().double().requires_grad_()
    want = straight("undial", wide, r.double(), y, b=b).sum()
    plain = straight("undial", z, r, y, b=b).sum()
    grads = [torch.autograd.grad(loss, x)[0].double() for loss, x in ((value, z), (plain, z), (want, wide))]
    assert abs(value.item() - want.item()) <= abs(plain.item() - want.item()) + 1e-6 * (len(y) + abs(want.item()))
    assert (grads[0] - grads[2]).abs().max() <= (grads[1] - grads[2]).abs().max() + 3e-7


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("budget", [None, 0])
def test_undial_from_hidden_states(softcap, budget):
    g = torch.Generator().manual_seed(0)
    weight, y = torch.randn(300, 32, generator=g), torch.randint(0, 300, (6,), generator=g)
    hidden = 0.1 * torch.randn(6, 32, generator=g) + 0.6 * weight[y]  # margins of about 17
    x, wide = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    how = {"softcap": softcap, "budget_bytes": budget}
    stats = linear_token_stats(x, weight, y, outputs=("kl_qp",), reference=(hidden, weight), lowered=10.0, **how)
    frozen = linear_token_stats(hidden, weight, y, outputs=("logp", "entropy"), **how)
    loss = o.undial(stats.kl_qp, frozen.logp, frozen.entropy, reduction="sum")
    z, r = (h @ weight.double().T for h in (wide, hidden.double()))
    z, r = (x if softcap is None else softcap * torch.tanh(x / softcap) for x in (z, r))
    goal = (r - 10.0 * torch.nn.functional.one_hot(y, 300)).softmax(-1)
    want = -(goal * z.log_softmax(-1)).sum()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    (ours_,), (exact,) = torch.autograd.grad(loss, x), torch.autograd.grad(want, wide)
    assert (ours_.double() - exact).abs().max() <= 2e-5 * exact.abs().max()


@pytest.mark.parametrize("margin", [60.0, 120.0, 1000.0])
def test_ce_u_lets_no_token_go_that_is_certain(margin):
    """Its gradient is p - target, 1 at the label, where 1 - p_y is far below what float32 has; a log-odds weight of
    p_y / (1 - p_y) would be infinite."""
    z, r, y = rows(margin, torch.float32)
    loss = ours("ce_u", z, r, y)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    torch.testing.assert_close(gradient.gather(-1, y[:, None])[:, 0], torch.ones(len(y)))
    others = z.detach().masked_fill(torch.nn.functional.one_hot(y, V) > 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(gradient.scatter(-1, y[:, None], 0.0), -others, rtol=1e-5 + 2e-7 * margin, atol=1e-7)


def test_impossible_tokens_and_minus_infinity_lanes():
    z, r, y = rows(0.0)
    with torch.no_grad():
        z[:, 3] = r[:, 3] = -torch.inf
    y[y == 3] = 4
    for name, options in CASES[:1] + CASES[2:5]:
        value, want = ours(name, z, r, y, **options), straight(name, z, r, y, **options).sum()
        torch.testing.assert_close(value, want, rtol=1e-8, atol=1e-10)
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.isfinite().all()
        assert (gradient[:, 3] == 0).all()
    y[:] = 3  # p_y = 0: nothing to forget, and CE-U leaves it alone
    value = ours("ce_u", z, r, y)
    assert value.isfinite()
    assert (torch.autograd.grad(value, z)[0] == 0).all()


def test_bst_golden():
    """By hand: p = (.5, .3, .2), y the last, k 2: belief (.625, .375), lam .2."""
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    loss = ours("bst", z, z.detach(), torch.tensor([2]), k=2, lam=0.2)
    want = 0.8 * math.log(0.2) + 0.2 * (0.625 * math.log(0.5) + 0.375 * math.log(0.3))
    assert loss.item() == pytest.approx(want, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, z)  # t - p
    assert gradient[0].tolist() == pytest.approx([0.125 - 0.5, 0.075 - 0.3, 0.8 - 0.2], rel=1e-9)


def test_undial_golden():
    """By hand: q = (.5, .5), e^-b = 1/3: target (.25, .75) with y the first; p = (.8, .2)."""
    z = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log().requires_grad_()
    loss = ours("undial", z, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), b=math.log(3))
    assert loss.item() == pytest.approx(-0.25 * math.log(0.8) - 0.75 * math.log(0.2), rel=1e-12)
    assert torch.autograd.grad(loss, z)[0][0].tolist() == pytest.approx([0.8 - 0.25, 0.2 - 0.75], rel=1e-9)


def test_ce_u_golden():
    """By hand: p = (.5, .3, .2), y the first: target (0, .6, .4)."""
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    loss = ours("ce_u", z, z.detach(), torch.tensor([0]))
    assert loss.item() == pytest.approx(-0.6 * math.log(0.3) - 0.4 * math.log(0.2), rel=1e-12)
    assert torch.autograd.grad(loss, z)[0][0].tolist() == pytest.approx([0.5, 0.3 - 0.6, 0.2 - 0.4], rel=1e-9)


def test_pdu_golden():
    z = torch.tensor([[7.0, 1.0, 4.0]], dtype=torch.float64, requires_grad=True)  # largest 7, mean 4
    loss = ours("pdu", z, z.detach(), torch.tensor([1]))
    assert loss.item() == pytest.approx(9.0)
    assert torch.autograd.grad(loss, z)[0][0].tolist() == pytest.approx([6 * (1 - 1 / 3), -2.0, -2.0])


def test_bst_without_beliefs_is_ga():
    logp, topk = -torch.rand(3, 4), -torch.rand(3, 4)
    for reduction in o.REDUCTIONS:
        torch.testing.assert_close(o.bst(logp, topk, lam=0.0, reduction=reduction), o.ga(logp, reduction=reduction))
    torch.testing.assert_close(o.bst(logp, topk, lam=1.0), o.bst(topk, logp, lam=0.0))


def test_beliefs_of_one_token_that_is_the_answer_are_ga():
    z, r, y = rows(3.0)
    torch.testing.assert_close(ours("bst", z, r, y, k=1, lam=0.6), token_stats(z, y).logp.sum())


def test_beliefs_of_the_whole_vocabulary_have_no_gradient():
    z, r, y = rows(1.0)
    (gradient,) = torch.autograd.grad(ours("bst", z, r, y, k=V, lam=1.0), z)
    assert gradient.abs().max() < 1e-12
    with pytest.raises(ValueError, match=f"k={V + 1}: needs at most V={V}"):
        ours("bst", z, r, y, k=V + 1)


def test_bstw_at_the_reference_is_bst_and_fades_below_it():
    logp, topk = -torch.rand(3, 4, dtype=torch.float64), -torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(o.bst(logp, topk, logp, preset="bstw"), o.bst(logp, topk))
    below = o.bst(logp - 50.0, topk, logp, preset="bstw", beta=1.0)
    assert abs(below / o.bst(logp - 50.0, topk)) < 1e-20


def test_undial_without_an_adjustment_is_distillation():
    z, _, y = rows(1.0)
    (gradient,) = torch.autograd.grad(ours("undial", z, z.detach(), y, b=1e-12), z)
    assert gradient.abs().max() < 1e-10


def test_undial_of_open_unlearning_distils_where_nothing_is_supervised():
    z, r, y = rows(1.0)
    labelled = torch.tensor([True, False, True, False, False, True])
    stats = token_stats(z, y, "kl_qp", reference=r, lowered=torch.where(labelled, 2.0, 0.0))
    frozen = token_stats(r, y, ("logp", "entropy"))
    tensors = (stats.kl_qp[None], frozen.logp[None], frozen.entropy[None])
    ours_ = o.undial(*tensors, preset="open_unlearning", labelled=labelled[None], b=2.0)
    per_token = torch.where(labelled, straight("undial", z, r, y, b=2.0), straight("undial", z, r, y, b=0.0))
    torch.testing.assert_close(ours_, per_token.mean())
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (ours_, per_token.mean())))


def test_flat_tv_is_antisymmetric():
    one, other = -torch.rand(3, 4), -torch.rand(3, 5)
    torch.testing.assert_close(o.flat(one, other), -o.flat(other, one))


def test_flat_divergences_lower_the_answer_and_raise_the_template():
    for divergence in ("tv", "kl", "pearson", "js", "jeffrey"):
        template, answer = (torch.full((1, 3), -0.9, requires_grad=True) for _ in range(2))
        loss = o.flat(template, answer, divergence=divergence)
        of_template, of_answer = torch.autograd.grad(loss, [template, answer])
        assert of_template.max() < 0 < of_answer.min(), divergence


def test_flat_golden():
    """By hand, P_e = .25 (.2 and .3) and P_f = .6; the code's means are over 4 and 3 positions."""
    template, answer = (torch.tensor([values], dtype=torch.float64).log() for values in ([0.2, 0.3], [0.6]))
    want = {
        "tv": (math.tanh(0.6) - math.tanh(0.25)) / 2,
        "kl": -0.25 + math.exp(-0.4),
        "pearson": -0.25 + 0.09 + 0.6,
        "jeffrey": -0.25 + 0.6 + 0.09 + 0.0135,
        "js": math.log((1 + math.exp(-0.25)) * (1 + math.exp(-0.6)) / 4) + 0.6,
    }
    for divergence, value in want.items():
        assert o.flat(template, answer, divergence=divergence).item() == pytest.approx(value, rel=1e-12)
    places = {"refusal_num_positions": 4, "answer_num_positions": 3}
    coded = o.flat(template, answer, preset="flat_code", **places)
    assert coded.item() == pytest.approx((math.tanh(0.2) - math.tanh(0.125)) / 2, rel=1e-12)
