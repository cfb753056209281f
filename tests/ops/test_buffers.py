"""Memory that is taken and not cleared never shows: with NaN in all of it every result has the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import pyunlearn as pu
from pyunlearn.ops import OUTPUTS, OuterSum

from .perturbed_model import IDS, make
from .rows import device_of, rows, runs

ONE_PASS = ("logp", "entropy", "uniform_ce", "lse")


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def statistics(backend):
    """Some rows ignored, some of zero upstream gradient, a vocabulary that fills no vector."""
    logits, reference, targets = rows("random", 5, 133)
    targets[1] = -100
    up = torch.tensor([1.0, 1.0, 0.0, -2.0, 0.0])
    upstreams = [{"logp": 0 * up, "kl_pq": 0 * up}, {"logp": up}, {"topk": up}]
    stats, grads = runs(logits, targets, reference, upstreams, backend=backend, k=3)
    x, t, w = (tensor.to(device_of(backend)) for tensor in (logits, targets, up))
    once, d_logits = pu.value_and_grad(x, t, dict.fromkeys(ONE_PASS, w), backend=backend)
    return [*stats.values(), *grads, *once.as_dict().values(), d_logits]


def projections(backend):
    device = device_of(backend)
    hidden, weight, x, b = (torch.randn(shape, device=device) for shape in ((5, 8), (600, 8), (5, 2), (600, 2)))
    targets = torch.tensor([3, -100, 599, 0, 7], device=device)
    up = torch.tensor([1.0, 1, 0, -2, 0], device=device)
    results = []
    for budget in (None, 0):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, x, b)]
        outputs = OUTPUTS[:-1] if budget == 0 else OUTPUTS
        stats = pu.linear_token_stats(
            *leaves[:2], targets, outputs=outputs, reference=(hidden + 1, weight), budget_bytes=budget, k=3,
            backend=backend, adapter=(leaves[2], leaves[3]),
        )  # fmt: skip
        results += stats.as_dict().values()
        results += torch.autograd.grad(((stats.logp + stats.kl_pq) * up).sum(), leaves)
    return results


def inner_products(backend):
    a, b = (torch.randn(n, 5, 3, device=device_of(backend)) for n in (4, 4))
    ends = torch.tensor([0, 2, 2, 20])
    packed = OuterSum(a.flatten(0, 1), b.flatten(0, 1), ends)
    dots = pu.segment_dot([(a, b), (a[:0], b[:0]), (a[1], b[2])], backend=backend)
    return [*dots, pu.ghost_dot(OuterSum(a, b), backend=backend), pu.ghost_dot(packed, backend=backend)]


@pytest.mark.parametrize("results_of", [statistics, projections, inner_products])
def test_nothing_leaks(results_of, fused):
    torch.manual_seed(0)
    plain = results_of(fused)
    torch.manual_seed(0)
    with poisoned():
        again = results_of(fused)
    for mine, right in zip(again, plain, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, right)


@pytest.mark.parametrize("mode", ["overlay", "snap", "copy", "streamed"])
def test_no_scratch_shows(mode):
    def outputs():
        model = make(bfloat16_numbers=True)
        with torch.no_grad(), pu.perturbed(model, sigma=0.1, mode=mode) as it:
            moved = [model(IDS)]
            it.to(None)
            return [*moved, model(IDS), pu.gaussian_noise(7, offset=3)]

    plain = outputs()
    with poisoned():
        again = outputs()
    assert all(map(torch.equal, again, plain))
