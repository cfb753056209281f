"""Objectives on text that a model has written: what they are made of, and what bad input says."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pyunlearn import objectives as o
from pyunlearn.objectives import Samples


def logps(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(-3 * torch.rand(3, 6, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("factor", [2.0, 1.0])
def test_altpo_is_dpo_whose_winners_are_alternates(factor):
    tensors = logps(4)
    ours, theirs = (kind(*tensors, beta=0.3, factor=factor) for kind in (o.altpo, o.dpo))
    assert torch.equal(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(loss, tensors[:2]) for loss in (ours, theirs)), strict=True):
        assert torch.equal(one, other)
    assert o.altpo(*tensors[:2], *tensors[:2], beta=0.3).item() == pytest.approx(2 / 0.3 * math.log(2))


def test_whp_is_descent_on_the_labels():
    (logp,) = logps(1)
    assert torch.equal(o.whp(logp), o.gd(logp))


def test_bss_is_two_terms_of_one_objective():
    (answers, share), (samples, other) = o.bss(of="npo", weight=0.25, samples=5, beta=0.3, reduction="sum")
    assert (share, other) == (0.75, 0.25)
    assert answers == o.get("npo", beta=0.3, reduction="sum")
    assert samples != answers
    assert (samples.name, samples.options, samples.reduction) == ("npo", {"beta": 0.3}, "sum")
    assert (answers.kinds, samples.kinds) == ({"answer": ""}, {"answer": "_sample"})
    assert (answers.written, samples.written) == ({}, {"_sample": Samples(5, 1.0, 200, 2)})


def test_bss_presets_and_ends():
    assert [part.name for part, _ in o.bss()] == ["bst", "bst"]
    assert [part.name for part, _ in o.bss(preset="bs_code")] == ["ga", "ga"]
    assert [part.name for part, _ in o.bss(preset="bs_code", of="npo")] == ["npo", "npo"]
    assert o.bss(weight=0.0) == [(o.get("bst"), 1.0)]  # nothing is drawn
    ((only, share),) = o.bss(weight=1.0)
    assert (share, only.samples is None) == (1.0, False)


def test_what_text_a_training_has_to_write():
    assert o.get("altpo", alternates=2, sampling_temperature=0.5).written == {"_alternate": Samples(2, 0.5, 200, 0)}
    assert o.get("idk").written == o.get("whp").written == {}
    assert o.get("whp").kinds == {"generic": "_generic"}
    assert o.weighted("ga") == [(o.get("ga"), 1.0)]
    assert o.weighted("bss", of="ga") == o.bss(of="ga")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "nop"}, "bss: of='nop': did you mean npo?"),
        ({"of": "kl"}, "bss: of='kl': needs one of"),
        ({"samples": 0}, "bss: samples=0: needs a whole number >= 1"),
        ({"samples": 1.5}, "bss: samples=1.5: needs a whole number >= 1"),
        ({"samples": True}, "bss: samples=True: needs a whole number >= 1"),
        ({"weight": 1.5}, "bss: weight=1.5: needs a number from 0 to 1"),
        ({"sampling_temperature": 0}, "bss: sampling_temperature=0: needs a finite number > 0"),
        ({"max_new_tokens": -1}, "bss: max_new_tokens=-1: needs a whole number >= 1"),
        ({"refresh_epochs": 0.5}, "bss: refresh_epochs=0.5: needs a whole number >= 0"),
        ({"preset": "code"}, "bss: preset='code'"),
        ({"of": "npo", "betta": 0.1}, "bss: option='betta': did you mean beta?"),
        ({"of": "npo", "beta": -1.0}, "npo: beta=-1.0: needs a finite number > 0"),
        ({"of": "npo", "reduction": "mean"}, "npo: reduction='mean'"),
    ],
)
def test_bad_options_of_bss(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        o.bss(**options)


@pytest.mark.parametrize("options", [{"alternates": 0}, {"max_new_tokens": 0}, {"sampling_temperature": 0.0}])
def test_bad_options_of_altpo(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"altpo: {name}={value}: needs"):
        o.get("altpo", **options)
