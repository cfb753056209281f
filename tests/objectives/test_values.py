"""Value and gradient of every objective, preset and reduction against the straight-line version."""

from __future__ import annotations

import pytest
import torch

from pyunlearn import objectives, token_stats
from pyunlearn.objectives.definition import OUTPUT_OF, REFERENCE, STATISTICS, WIDE
from pyunlearn.ops import OUTPUTS

from .straight import CASES, NAMES, PRESETS, SEQUENCE, batches, equation, inputs, make, straight_loss

OTHER_OPTIONS = {
    "wga": {"alpha": 2.5},
    "npo": {"beta": 0.7},
    "tnpo": {"beta": 1.5, "epsilon": 0.01},
    "wtnpo": {"alpha": 0.5, "beta": 0.25},
    "simnpo": {"beta": 2.0, "margin": 0.6},
    "satimp": {"beta1": 1.5, "beta2": 2.0},
    "dpo": {"beta": 0.4, "factor": 3.0},
    "ap": {"beta": 0.8},
    "rmu": {"c": 0.7, "seed": 3},
    "bst": {"lam": 0.7},
    "undial": {"b": 0.8},
}


def gradients(loss, raw):
    leaves = [each.logits for each in raw.values()]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, grads, strict=True)]


def agree(ours, theirs, raw, **tolerance):
    torch.testing.assert_close(ours, theirs, **tolerance)
    for mine, other in zip(gradients(ours, raw), gradients(theirs, raw), strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, other, **tolerance)


def test_the_straight_version_knows_every_objective():
    assert set(SEQUENCE) == set(NAMES)


@pytest.mark.parametrize(("name", "preset", "reduction"), CASES)
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_value_and_gradient(name, preset, reduction, flat):
    raw = batches(seed=len(name))
    ours = objectives.get(name, preset=preset, reduction=reduction)(inputs(raw, flat))
    agree(ours, straight_loss(name, preset, reduction, raw), raw, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_paper_reduction_is_the_equations(name, flat):
    raw = batches(seed=len(name))
    lengths = {int(n) for n in raw["answer"].mask.sum(-1) if n}
    assert len(lengths) > 1  # else the reductions that differ would agree
    ours = objectives.get(name, reduction="paper")(inputs(raw, flat))
    agree(ours, equation(name, raw), raw, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "preset"), [case for case in PRESETS if case[0] in OTHER_OPTIONS])
def test_options(name, preset):
    raw, options = batches(seed=3), OTHER_OPTIONS[name]
    objective = objectives.get(name, preset=preset, **options)
    theirs = straight_loss(name, preset, objective.reduction, raw, **options)
    agree(objective(inputs(raw, b=objective.lowered)), theirs, raw, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_float32(name, preset):
    exact, single = batches(seed=5), batches(seed=5, dtype=torch.float32)
    objective = objectives.get(name, preset=preset)
    loss = objective(inputs(single, flat=True))
    assert loss.dtype == torch.float32
    want = objective(inputs(exact, flat=True))
    torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=1e-6)
    for mine, other in zip(gradients(loss, single), gradients(want, exact), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-6)


def test_half_precision_statistics_are_summed_in_float32():
    logp = -torch.rand(2, 500, dtype=torch.bfloat16)
    torch.testing.assert_close(objectives.gd(logp), -logp.float().mean())


def test_hidden_states_in_half_precision_and_any_layout():
    """What a bfloat16 model says, in float32; u is the same numbers in every dtype."""
    hidden = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False], [False, True, True]])
    u = 4.0 * torch.rand(8, generator=torch.Generator().manual_seed(5))
    want = ((hidden[mask] - u) ** 2).sum() / 4
    torch.testing.assert_close(objectives.rmu(hidden, mask, c=4.0, seed=5), want)
    torch.testing.assert_close(objectives.rmu(hidden.double(), mask, c=4.0, seed=5), want.double())
    half = hidden.bfloat16()
    want = ((half.float()[mask] - u) ** 2).sum() / 4
    torch.testing.assert_close(objectives.rmu(half[mask], c=4.0, seed=5), want)
    reference = half + 1
    want = (half.float() - reference.float())[mask].square().sum() / 4
    torch.testing.assert_close(objectives.rr(half, reference, mask), want)


def test_on_token_stats():
    raw = make(dtype=torch.float32)
    stats = token_stats(raw.logits, raw.targets, outputs=("logp", "entropy", "kl_pq"), reference=raw.reference)
    reference = token_stats(raw.reference, raw.targets)
    ours = objectives.tnpo(stats.logp, reference.logp, stats.mask) + objectives.kl(stats.kl_pq, stats.mask)
    ours = ours + objectives.me(stats.entropy, stats.mask, vocab_size=raw.logits.size(-1))
    theirs = sum(straight_loss(name, "paper", "token_mean", {"answer": raw}) for name in ("tnpo", "kl", "me"))
    agree(ours, theirs, {"answer": raw}, rtol=1e-4, atol=1e-6)


def test_statistics_are_those_of_the_kernels():
    assert set(STATISTICS) - {*REFERENCE, *WIDE, *OUTPUT_OF} <= set(OUTPUTS)
    assert set(OUTPUT_OF.values()) <= set(OUTPUTS)
    assert {output for name in NAMES for output in objectives.get(name).outputs} <= set(OUTPUTS)
