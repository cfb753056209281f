"""Masks, forms, counts: (B, T) against flat, micro-batches against the whole, nothing supervised, no sync."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyunlearn import objectives as o
from pyunlearn.objectives import TokenInputs
from pyunlearn.objectives.definition import GIVEN

from .straight import BATCHES, BROADCAST, CASES, PRESETS, batches, from_logp, inputs, make

PLAIN = [case for case in CASES if case[1] == o.get(case[0]).preset]


def leaves(raw):
    return [each.logits for each in raw.values()]


@pytest.mark.parametrize(("name", "preset", "reduction"), CASES)
def test_forms_agree(name, preset, reduction):
    """(B, T) with a mask, flat in order, flat in any order, and flat without num_sequences."""
    raw = batches(seed=11)
    objective = o.get(name, preset=preset, reduction=reduction)
    rows, flat = objective(inputs(raw)), inputs(raw, flat=True)
    torch.testing.assert_close(objective(flat), rows)
    if not objective.selection.skip:  # which is of the first in reading order
        torch.testing.assert_close(objective({batch: shuffled(each) for batch, each in flat.items()}), rows)
    unsized = {batch: replace(each, num_sequences=None) for batch, each in flat.items()}
    torch.testing.assert_close(objective(unsized), rows)


def shuffled(each: TokenInputs) -> TokenInputs:
    order = torch.randperm(len(each.sequence_ids), generator=torch.Generator().manual_seed(0))
    values = {name: value[order] for name, value in each.values.items()}
    flat = {name: getattr(each, name)[order] for name in ("ref_logp", "ref_hidden", "ref_entropy", "sequence_ids")}
    return replace(each, values=values, **flat)


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_public_function_is_the_objective(name, preset):
    """By position and by keyword, in both forms."""
    objective = o.get(name, preset=preset)
    function = getattr(o, name)
    for flat in (False, True):
        stats = inputs(batches(seed=2), flat)
        tensors, layout = [], {"num_sequences": 5} if flat else {}
        for statistic in objective.variant.statistics:
            each = stats[statistic.batch]
            own = getattr(each, statistic.name, None)
            tensors.append(each.values[statistic.name] if own is None else own)
        for batch, prefix in objective.variant.prefixes.items():
            layout[prefix + "mask"] = stats[batch].mask
            if flat:
                layout[prefix + "sequence_ids"] = stats[batch].sequence_ids
        for batch, told in objective.variant.context:
            if told in GIVEN:
                layout[objective.variant.prefix(batch) + told] = getattr(stats[batch or "answer"], told)
        want = objective(stats)
        by_name = dict(zip(objective.variant.tensors, tensors, strict=True))
        torch.testing.assert_close(function(*tensors, preset=preset, **layout), want)
        torch.testing.assert_close(function(**by_name, preset=preset, **layout), want)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_forms_agree_on_any_mask(batch, length, data):
    size = batch * length
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(batch, length)
    logp = -torch.rand(batch, length, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    logp.requires_grad_()
    ids = mask.nonzero()[:, 0]
    for name, _, reduction in PLAIN:
        objective = o.get(name, reduction=reduction)
        rows = from_logp(objective, logp, logp - 0.5, mask=mask, vocab_size=9)
        flat = from_logp(objective, logp[mask], logp[mask] - 0.5, sequence_ids=ids, num_sequences=batch, vocab_size=9)
        one, other = (objective(dict.fromkeys(BATCHES, each)) for each in (rows, flat))
        torch.testing.assert_close(one, other)
        one, other = (torch.autograd.grad(loss, logp)[0] for loss in (one, other))
        torch.testing.assert_close(one, other)
        assert (one[~mask] == 0).all()


@pytest.mark.parametrize(("name", "preset", "reduction"), [case for case in CASES if case[:2] not in BROADCAST])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_micro_batches_add_up(name, preset, reduction, as_tensor):
    """Each part divided by the count of the whole step: value and gradient are those of the full batch."""
    raw = batches(seed=4)
    objective = o.get(name, preset=preset, reduction=reduction)
    whole = objective(inputs(raw))
    used = [objective.selection.num_kept(raw[batch].mask.sum(-1)) for batch in objective.batches]
    count = used[0].sum() if objective.unit == "tokens" else (torch.stack(used) > 0).all(0).sum()
    count = count if as_tensor else int(count)
    parts = [slice(0, 2), slice(2, 3), slice(3, 5)]
    split = sum(
        objective(inputs({batch: each.part(rows) for batch, each in raw.items()}, flat=True), count=count)
        for rows in parts
    )
    torch.testing.assert_close(split, whole)
    for one, other in zip(
        torch.autograd.grad(split, leaves(raw), allow_unused=True),
        torch.autograd.grad(whole, leaves(raw), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("name", "preset"), BROADCAST)
def test_mean_lengths_are_a_micro_batchs_own(name, preset):
    """As in the code base: each part has its mean of 1/n, so that the sum depends on how the step is split."""
    raw, objective = batches(seed=4), o.get(name, preset=preset)
    count = int(raw["answer"].mask.any(-1).sum())
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        stats = [inputs({"answer": raw["answer"].part(rows)}) for rows in parts]
        shares = [objective(each) * each["answer"].mask.any(-1).sum() / count for each in stats]
        torch.testing.assert_close(sum(objective(each, count=count) for each in stats), sum(shares))


def test_what_the_reductions_divide_by():
    logp = -torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    want = {
        "sum": 10.0,
        "token_mean": 10.0 / 4,
        "sequence_mean": 10.0 / 2,
        "sequence_token_mean": (2.0 + 4.0) / 2,
    }
    assert set(want) == set(o.REDUCTIONS)
    for reduction, value in want.items():
        assert o.gd(logp, mask, reduction=reduction).item() == pytest.approx(value)
        halved = value / 5 * (4 if reduction == "token_mean" else 2)
        expected = value if reduction == "sum" else halved
        assert o.gd(logp, mask, reduction=reduction, count=5).item() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "preset", "reduction"), CASES)
def test_nothing_supervised(name, preset, reduction):
    """0 with a graph and zero gradients, though what stands at the ignored positions is NaN."""
    raw = batches()
    for each in raw.values():
        each.targets[:] = -100
    objective = o.get(name, preset=preset, reduction=reduction)
    for flat in (False, True):
        loss = objective(inputs(raw, flat))
        assert loss.shape == ()
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, leaves(raw), allow_unused=True):
            assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("name", o.names())
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_tensors(name, shape):
    logp = torch.zeros(shape, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64) if len(shape) == 1 else None
    objective = o.get(name)
    each = from_logp(objective, logp, logp.detach(), sequence_ids=ids, vocab_size=3)
    loss = objective(dict.fromkeys(BATCHES, each))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logp)[0].shape == shape


@pytest.mark.parametrize(("name", "preset", "reduction"), CASES)
def test_no_host_sync(name, preset, reduction):
    """On the meta device there are no numbers to wait for: any `.item()` or `if tensor` would raise."""
    raw = batches()
    keep = 1.0 if o.get(name, preset=preset).positions in ("all", "followed") else 0.5
    objective = o.get(name, preset=preset, reduction=reduction, keep=keep)
    for flat in (False, True):
        stats = {batch: on_meta(each) for batch, each in inputs(raw, flat).items()}
        loss = objective(stats, count=torch.tensor(3, device="meta"))
        loss.backward()
        assert loss.shape == ()
        assert objective(stats).device.type == "meta"


def on_meta(each: TokenInputs) -> TokenInputs:
    def move(tensor):
        return None if tensor is None else tensor.detach().to("meta")

    values = {name: move(value).requires_grad_() for name, value in each.values.items()}
    return replace(
        each,
        values=values,
        ref_logp=move(each.ref_logp),
        ref_hidden=move(each.ref_hidden),
        ref_entropy=move(each.ref_entropy),
        labelled=move(each.labelled),
        sequence_ids=move(each.sequence_ids),
        mask=move(each.mask),
    )


def test_count_below_one_counts_as_one():
    logp = torch.full((1, 4), -1.0)
    assert o.gd(logp, count=0).item() == 4
    assert o.gd(logp, count=torch.tensor(0)).item() == 4


def test_int32_sequence_ids():
    raw = make()
    flat = raw.inputs(flat=True)
    want = o.get("npo")({"answer": flat})
    narrow = replace(flat, sequence_ids=flat.sequence_ids.int())
    torch.testing.assert_close(o.get("npo")({"answer": narrow}), want)
