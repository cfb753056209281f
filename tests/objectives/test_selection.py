"""Likelihood selection: which tokens count, in both forms, and that nothing else of a batch matters to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunlearn import objectives as o
from pyunlearn.objectives.reduction import Selection

from .straight import NAMES, inputs, make


def chosen(losses, skip, keep, largest):
    """Places of one sequence's tokens, straight from the words."""
    left = list(range(skip, len(losses)))
    count = max(1, int(keep * len(left))) if left else 0
    return sorted(sorted(left, key=lambda t: -losses[t] if largest else losses[t])[:count])


SEQUENCES = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 4.0, torch.inf]), max_size=9), min_size=1, max_size=4
)


@settings(max_examples=80, deadline=None)
@given(SEQUENCES, st.integers(0, 3), st.floats(0.01, 1.0), st.booleans())
def test_tokens_are_the_likeliest_of_their_sequence(sequences, skip, keep, largest):
    """Ties go to the first; rows are padded with what would be chosen first."""
    width = max(map(len, sequences)) + 1
    mask = torch.tensor([[t < len(each) for t in range(width)] for each in sequences])
    losses = torch.full(mask.shape, -torch.inf if not largest else torch.inf, dtype=torch.float64)
    for row, each in enumerate(sequences):
        losses[row, : len(each)] = torch.tensor(each, dtype=torch.float64)
    want = torch.zeros_like(mask)
    for row, each in enumerate(sequences):
        want[row, chosen(each, skip, keep, largest)] = True
    selection = Selection(skip, keep, largest)
    counts = selection.num_kept(mask.sum(-1))
    assert counts.tolist() == want.sum(-1).tolist()
    for flat in (False, True):
        stats = o.TokenInputs({"logp": -losses}, mask=mask)
        if flat:
            ids = mask.nonzero()[:, 0]
            stats = o.TokenInputs({"logp": -losses[mask]}, sequence_ids=ids, num_sequences=len(mask))
        logp = stats.values["logp"]
        layout = o.reduction.Layout.of(stats, logp, "logp", "").select(selection, logp)
        kept = torch.ones_like(logp, dtype=torch.bool) if layout.mask is None else layout.mask
        assert torch.equal(kept, want[mask] if flat else want)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", ["smallest", "largest"])
def test_any_objective_on_what_is_kept_is_the_objective_of_that_alone(name, kept):
    batch, *others = o.get(name).batches
    raw = {batch: make(length=7, seed=1, empty=1)} | {each: make(length=5, seed=2, empty=2) for each in others}
    own = {
        batch: -each.logits.log_softmax(-1).gather(-1, each.targets.clamp_min(0)[..., None])[..., 0].detach()
        for batch, each in raw.items()
    }
    alone = {}
    for batch, each in raw.items():
        targets = each.targets.clone()
        for row, mask in enumerate(each.mask):
            at = mask.nonzero()[:, 0]
            targets[row] = -100
            places = at[chosen(own[batch][row, at].tolist(), 0, 0.6, kept == "largest")]
            targets[row, places] = each.targets[row, places]
        alone[batch] = type(each)(each.logits, each.reference, targets)
    assert any((alone[batch].mask != raw[batch].mask).any() for batch in raw)
    want = o.get(name)(inputs(alone))
    for flat in (False, True):
        ours = o.get(name, keep=0.6, kept=kept)(inputs(raw, flat))
        torch.testing.assert_close(ours, want)
        for each in raw.values():
            one, other = (
                torch.autograd.grad(x, each.logits, allow_unused=True, retain_graph=True)[0] for x in (ours, want)
            )
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other)


def test_one_pass_and_trainers_that_count_all_tokens_refuse():
    from pyunlearn.integrations.transformers import loss_func

    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="ga: needs keep=1 and skip=0"):
        o.one_pass(o.get("ga", keep=0.5), mask)
    assert o.one_pass(o.get("ga", temperature=2.0), mask)["temperature"] == 2.0
    with pytest.raises(ValueError, match=r"ce_u: needs keep=1 and skip=0, got keep=1 and skip=1: Trainer counts all"):
        loss_func("ce_u", preset="open_unlearning")


@pytest.mark.parametrize("ids", [[0, 3], [0, 2], [0, -1]])
def test_a_sequence_that_is_not_there_is_named(ids):
    with pytest.raises(IndexError, match="sequence_ids: needs 0 <= id < num_sequences=2"):
        o.ga(torch.tensor([-1.0, -2.0]), sequence_ids=torch.tensor(ids), num_sequences=2, keep=0.5)


def test_a_function_without_logp_among_its_statistics_is_told_it():
    """The likelier token of each row counts."""
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]])
    each = torch.tensor([[1.0, 10.0], [100.0, 3.0]])
    assert o.kl(each, keep=0.5, logp=logp).item() == 2
    assert o.kl(each, keep=0.5, kept="largest", logp=logp).item() == 55
    assert o.me(-each, vocab_size=1, keep=0.5, logp=logp, reduction="sum").item() == 4
    assert o.pdu(each, torch.zeros(2, 2), keep=0.5, logp=logp).item() == 5
    hidden = each[..., None] * torch.ones(4)
    assert o.rr(hidden, torch.zeros(2, 2, 4), keep=0.5, logp=logp).item() == 4 * (1 + 9) / 2
