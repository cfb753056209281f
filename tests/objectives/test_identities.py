"""What the papers say of the objectives: closed forms, special cases, bounds, gradients."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunlearn import objectives as o

from .straight import BATCHES, CONSTANT, PRESETS, STOPPED, batches, inputs, make

EXTREME = (1e-7, 0.0, -1e-9, -1e-4, -0.7, -16.0, -88.0, -120.0, -1e4)


def logps(seed=0, shape=(3, 6)):
    """(logp, ref_logp), float64; logp needs a gradient."""
    g = torch.Generator().manual_seed(seed)
    logp, reference = (-3 * torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return logp.requires_grad_(), reference


def grad(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def same(one, other, leaf, **tolerance):
    torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(grad(one, leaf), grad(other, leaf), **tolerance)


def test_ga_is_minus_gd():
    logp, _ = logps()
    same(o.ga(logp), -o.gd(logp), logp)
    same(o.idk(logp), o.gd(logp), logp)


def test_wga_without_weights_is_ga():
    logp, _ = logps()
    same(o.wga(logp, alpha=0.0), o.ga(logp), logp)


def test_satimp_without_importance_is_wga():
    logp, _ = logps()
    same(o.satimp(logp, beta1=2.0, beta2=0.0), o.wga(logp, alpha=2.0), logp)


def test_satimp_keeps_its_digits_near_certainty():
    """1 - p from expm1: at p = 1 - 1e-9 a float32 1 - p would be 0."""
    logp = torch.tensor([-1e-9])
    weight = o.satimp(logp, beta1=0.0, beta2=1.0) / logp
    assert weight.item() == pytest.approx(1e-9, rel=1e-6)


def test_tnpo_at_the_reference_is_ga():
    logp, _ = logps()
    same(o.tnpo(logp, logp), o.ga(logp), logp)


def test_tnpo_of_the_authors_code_at_the_reference():
    """Their epsilon turns the weight 1 into .34 at p = .04."""
    logp = torch.tensor([0.04], dtype=torch.float64).log()
    weight = o.tnpo(logp, logp, preset="g_effect_code") / logp
    torch.testing.assert_close(weight.item(), 2 * 0.04**4 / (2 * 0.04**4 + 1e-5))
    assert round(weight.item(), 2) == 0.34


def test_wtnpo_without_confidence_is_tnpo():
    logp, reference = logps()
    same(o.wtnpo(logp, reference, alpha=0.0, beta=4.0), o.tnpo(logp, reference, beta=4.0), logp)


def test_wtnpo_weight_is_the_product_of_both():
    logp, reference = logps()
    weight = o.tnpo(logp, reference, beta=5.0, reduction="sum")
    ours = grad(o.wtnpo(logp, reference, alpha=1.5, beta=5.0, reduction="sum"), logp)
    torch.testing.assert_close(ours, grad(weight, logp) * logp.detach().exp() ** 1.5)


def test_npo_at_the_reference():
    logp, _ = logps()
    loss = o.npo(logp, logp, beta=0.3)
    torch.testing.assert_close(loss.item(), 2 / 0.3 * math.log(2))
    torch.testing.assert_close(grad(loss, logp), grad(o.ga(logp, reduction="sequence_mean"), logp))


@pytest.mark.parametrize("reduction", o.REDUCTIONS)
def test_npo_gradient_becomes_that_of_ga_as_beta_vanishes(reduction):
    """Same factor too, in every reduction: a sequence's value stands for the sum over its tokens."""
    logp, reference = logps()
    npo = grad(o.npo(logp, reference, beta=1e-9, reduction=reduction), logp)
    torch.testing.assert_close(npo, grad(o.ga(logp, reduction=reduction), logp), rtol=1e-7, atol=0.0)


def test_npo_gradient_is_weighted_ga():
    """G-effect paper, Eq. 4: weight 2 p^beta / (p^beta + p°^beta) of the whole sequence."""
    logp, reference = logps()
    beta = 0.5
    p, q = logp.detach().sum(-1).exp() ** beta, reference.sum(-1).exp() ** beta
    want = (2 * p / (p + q) / len(logp))[:, None].expand_as(logp)
    torch.testing.assert_close(grad(o.npo(logp, reference, beta=beta), logp), want)


def test_npo_needs_only_the_ratio():
    """Shifting both log-probabilities alike changes nothing, however small the probabilities are."""
    logp, reference = logps()
    torch.testing.assert_close(o.npo(logp - 500, reference - 500), o.npo(logp, reference))


def test_simnpo_presets_differ_in_the_margins_place():
    logp, _ = logps()
    outside = o.simnpo(logp, beta=4.5, margin=4.5 * 0.3, preset="paper")
    same(o.simnpo(logp, beta=4.5, margin=0.3, preset="open_unlearning"), outside, logp)
    same(o.simnpo(logp), o.simnpo(logp, preset="open_unlearning"), logp)


def test_simnpo_does_not_feel_the_length():
    logp = torch.tensor([[-1.0, -2.0]])
    torch.testing.assert_close(o.simnpo(logp), o.simnpo(logp.repeat(1, 9)))


def test_dpo_at_the_reference():
    logp, _ = logps()
    refusal, _ = logps(seed=1, shape=(3, 4))
    loss = o.dpo(refusal, logp, refusal, logp, beta=0.1)
    torch.testing.assert_close(loss.item(), 2 / 0.1 * math.log(2))
    standard = o.dpo(refusal, logp, refusal, logp, beta=0.1, preset="standard")
    torch.testing.assert_close(standard, loss / 2)


def test_dpo_without_a_change_of_the_refusals_is_npo():
    logp, reference = logps()
    refusal, _ = logps(seed=1)
    dpo = o.dpo(refusal.detach(), logp, refusal.detach(), reference, beta=0.2)
    same(dpo, o.npo(logp, reference, beta=0.2), logp)


def test_ap_gradient():
    """Closer look, Eq. 9: weight 1 / (1 + (p(answer) / p(refusal))^beta), + on refusals, - on answers."""
    answer, _ = logps()
    refusal, _ = logps(seed=1, shape=(3, 4))
    beta = 0.6
    ratio = (answer.detach().sum(-1) - refusal.detach().sum(-1)).exp()
    weight = (1 / (1 + ratio**beta) / 3)[:, None]
    loss = o.ap(refusal, answer, beta=beta)
    of_refusal, of_answer = torch.autograd.grad(loss, [refusal, answer])
    torch.testing.assert_close(of_refusal, weight.expand_as(refusal))
    torch.testing.assert_close(of_answer, -weight.expand_as(answer))


def test_me_is_log_v_minus_entropy():
    entropy = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = o.me(entropy, vocab_size=50)
    torch.testing.assert_close(loss.item(), math.log(50) - 1.0)
    torch.testing.assert_close(grad(loss, entropy), torch.full((1, 3), -1 / 3, dtype=torch.float64))


def test_me_vanishes_on_uniform_predictions_in_both_directions():
    raw = make()
    raw.logits = torch.zeros_like(raw.logits).requires_grad_()
    for preset in ("paper", "closer_look_code"):
        assert abs(o.get("me", preset=preset)(inputs({"answer": raw})).item()) < 1e-12


def test_kl_vanishes_at_the_reference():
    raw = make()
    raw.reference = raw.logits.detach()
    for preset in ("paper", "open_unlearning"):
        loss = o.get("kl", preset=preset)(inputs({"answer": raw}))
        assert loss.item() == pytest.approx(0.0, abs=1e-12)
        assert grad(loss, raw.logits).abs().max() < 1e-12


@settings(max_examples=50)
@given(
    st.lists(st.floats(-50, 0), min_size=1, max_size=8),
    st.floats(-50, 0),
    st.floats(0.01, 9),
    st.floats(0, 9),
)
def test_bounds(values, reference, beta, alpha):
    logp = torch.tensor([values], dtype=torch.float64)
    ref_logp = torch.full_like(logp, reference)
    ga, wga = o.ga(logp), o.wga(logp, alpha=alpha)
    assert ga <= wga <= 0
    assert alpha == 0 or wga >= -1 / (math.e * alpha) - 1e-12  # x e^(alpha x) is least at x = -1/alpha
    assert 2 * ga <= o.tnpo(logp, ref_logp, beta=beta) <= 0
    assert o.tnpo(logp, ref_logp, beta=beta) <= o.tnpo(logp, ref_logp, beta=beta, preset="g_effect_code")
    assert 2 * wga <= o.wtnpo(logp, ref_logp, alpha=alpha, beta=beta) <= 0
    assert o.wga(logp, alpha=5.0) <= o.satimp(logp) <= 0
    for positive in (
        o.npo(logp, ref_logp, beta=beta),
        o.simnpo(logp, beta=beta),
        o.ap(logp, ref_logp, beta=beta),
    ):
        assert positive >= 0


@pytest.mark.parametrize("name", STOPPED)
def test_weights_have_no_gradient(name):
    """The gradient of each token is its weight, value / logp: nothing flows through sg."""
    logp, reference = logps()
    tensors = (logp, reference) if o.get(name).reference else (logp,)
    token_losses = [getattr(o, name)(*(tensor.flatten()[i : i + 1] for tensor in tensors)) for i in range(logp.numel())]
    weights = torch.stack(token_losses).view_as(logp) / logp
    summed = getattr(o, name)(*tensors, reduction="sum")
    torch.testing.assert_close(grad(summed, logp), weights.detach())


@pytest.mark.parametrize(("name", "preset"), [case for case in PRESETS if case[0] not in CONSTANT])
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_gradcheck(name, preset, flat):
    """Through the logits, in float64. (Stopped gradients cannot agree with finite differences: see above.)"""
    raw = {batch: make(3, length, 4, seed=7, empty=1) for batch, length in zip(BATCHES, (4, 3, 3, 4), strict=True)}
    objective = o.get(name, preset=preset)

    def loss(*logits):
        for batch, own in zip(used, logits, strict=True):
            raw[batch].logits = own
        return objective(inputs(raw, flat))

    used = objective.batches
    leaves = [raw[batch].logits for batch in used]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n, p in PRESETS if o.get(n, preset=p).outputs == ("logp",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_probabilities(name, preset, dtype):
    """From certain (and a rounding error beyond) to all but impossible, in every pairing: all finite."""
    now, before = torch.tensor(list(product(EXTREME, EXTREME)), dtype=dtype).split(1, dim=1)
    now = now.clone().requires_grad_()
    stats = {batch: o.TokenInputs({"logp": now}, before, num_positions=3) for batch in BATCHES}
    loss = o.get(name, preset=preset)(stats)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad(loss, now)).all()


@pytest.mark.parametrize(("name", "preset"), PRESETS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_on_the_way_back(name, preset):
    """Not even one that a mask would hide again, such as 0/0 of an empty sequence."""
    with torch.autograd.detect_anomaly():
        for flat in (False, True):
            raw = batches(seed=1)
            o.get(name, preset=preset)(inputs(raw, flat)).backward()
            assert any(each.logits.grad is not None for each in raw.values())


def test_rmu_and_rr_vanish_where_they_lead():
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)
    u = torch.rand(8, generator=torch.Generator().manual_seed(2))
    assert o.rmu((6.0 * u.double()).expand(3, 5, 8), c=6.0, seed=2).item() == 0
    assert o.rmu((u / u.norm()).expand(3, 5, 8), c=1.0, seed=2, preset="wmdp").item() == 0
    assert o.rmu(hidden, seed=2) != o.rmu(hidden, seed=3)
    assert o.rr(hidden, hidden).item() == 0
    torch.testing.assert_close(o.rr(hidden, hidden + 1), torch.tensor(8.0, dtype=torch.float64))


def test_rmu_and_rr_have_one_scale():
    """Eq. 8 and Eq. 19 of the G-effect paper: the same step away from where they vanish costs the same."""
    u = torch.rand(576, generator=torch.Generator().manual_seed(0))
    goal = (4.0 * u).expand(2, 3, 576)
    for preset, divisor in (("paper", 1), ("g_effect_code", 576)):
        assert o.rmu(goal + 1.5, c=4.0, preset=preset).item() == pytest.approx(1.5**2 * 576 / divisor)
    assert o.rr(goal + 1.5, goal).item() == pytest.approx(1.5**2 * 576)


def test_open_unlearnings_rmu_multiplies_two_means():
    """Sums (B,) over lengths (B, 1): mean(sum) * mean(1/n), not the mean of sum / n."""
    hidden = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    u = torch.rand(8, generator=torch.Generator().manual_seed(0))
    squares = (hidden - 2 * u / u.norm()).square()
    want = ((squares * mask[..., None]).mean(2).sum(1) / mask.sum(-1, keepdim=True)).mean()  # as coded there
    torch.testing.assert_close(o.rmu(hidden, mask, preset="open_unlearning"), want)
    ones, zeros = torch.ones(2, 6, 8), torch.zeros(2, 6, 8)
    assert o.rr(ones, zeros, mask, preset="open_unlearning").item() == pytest.approx(4 / 3)  # a mean of ratios: 1


def test_reference_gets_no_gradient():
    logp, reference = logps()
    reference.requires_grad_()
    losses = (o.npo(logp, reference), o.tnpo(logp, reference), o.dpo(logp, logp, reference, reference))
    for loss in (*losses, o.rr(logp[..., None], reference[..., None])):
        assert torch.autograd.grad(loss, reference, allow_unused=True) == (None,)


def test_batches_hold_pairs_with_one_side_empty():
    raw = batches()
    tokens = {batch: each.mask.any(-1) for batch, each in raw.items()}
    assert (tokens["answer"] != tokens["refusal"]).sum() == 2
