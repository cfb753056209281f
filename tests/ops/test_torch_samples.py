"""linear_token_stats on the samples that torch tests its own linear_cross_entropy with."""

from __future__ import annotations

import importlib
import sys
import unittest
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import pyunlearn as pu

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has none before 2.13")


@pytest.fixture(scope="module")
def samples_of():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)  # for this process's other tests too
        if not importlib.util.find_spec("expecttest"):  # torch's test classes derive from it; none is used here
            patch.setitem(sys.modules, "expecttest", SimpleNamespace(TestCase=unittest.TestCase))
        return importlib.import_module("torch.testing._internal.common_methods_invocations")


def loss_of(sample, hidden, head, bias, budget, backend):
    """By per-token statistics, or None for what they do not cover: losses of several classes a position."""
    (_, targets), options = sample.args, sample.kwargs
    if targets.is_floating_point() or head.dim() != 2:
        return None
    ignored = options.get("ignore_index", -100)
    stats = pu.linear_token_stats(
        hidden, head, targets, bias, ignore_index=ignored, budget_bytes=budget, backend=backend
    )
    weights = stats.mask.to(stats.logp.dtype)
    if options.get("weight") is not None:
        weights = weights * options["weight"][targets.where(stats.mask, 0)]
    losses, reduction = -stats.logp * weights, options.get("reduction", "mean")
    return losses if reduction == "none" else losses.sum() / (weights.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_linear_cross_entropy(samples_of, dtype, budget, backend):
    covered = 0
    for make in ("", "_chunked", "_chunked_none"):
        make_samples = getattr(samples_of, f"sample_inputs_linear_cross_entropy{make}", None)
        for sample in make_samples(None, "cpu", dtype, True) if make_samples else ():
            leaves = [sample.input, sample.args[0], sample.kwargs.get("linear_bias")]
            mine = loss_of(sample, *leaves, budget, backend)
            if mine is None:
                continue
            right = F.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
            torch.testing.assert_close(mine, right)
            upstream, wanted = torch.rand_like(right), [leaf for leaf in leaves if leaf is not None]
            grads = (torch.autograd.grad(loss, wanted, upstream) for loss in (mine, right))
            for ours, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(ours, theirs)
            covered += 1
    assert covered > 20
