"""Optimisations that decline: the result says so and why, the log does once."""

import logging

import pytest
import torch
from torch import nn

import pyunlearn as pu
from pyunlearn import _declined
from pyunlearn.ops import backends, modes

LOGITS, TARGETS = torch.randn(3, 20), torch.tensor([1, 19, -100])
HIDDEN, WEIGHT = torch.randn(3, 8), torch.randn(2000, 8)


@pytest.fixture
def log(caplog, monkeypatch):
    """What was logged, each line as often as it was."""
    monkeypatch.setattr(_declined, "_logged", set())
    caplog.set_level(logging.INFO, logger="pyunlearn")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "pyunlearn"]


def test_nothing_is_declined_by_default(log):
    x = LOGITS.clone().requires_grad_()
    assert pu.token_stats(x, TARGETS, inplace_backward=True).declined == {}
    assert pu.linear_token_stats(HIDDEN, WEIGHT.clone().requires_grad_(), TARGETS).declined == {}
    assert pu.linear_token_stats(HIDDEN, WEIGHT, TARGETS).declined == {}  # streams, the cheapest way without a graph
    assert pu.token_stats(x, TARGETS, backend="eager").declined == {}  # as was asked for
    with pu.perturbed(nn.Linear(2, 2)) as it:
        assert it.declined is None
    assert log() == []


def test_backward_in_place(log):
    def declined(x, backend=None):
        return pu.token_stats(x, TARGETS, inplace_backward=True, backend=backend).declined

    x = LOGITS.clone().requires_grad_()
    why = "backward is autograd's in the eager twin"
    for _ in range(2):
        assert declined(x, "eager") == {"in-place backward": why}
    why_compiled = torch.compile(declined, fullgraph=True, backend="aot_eager")(x)
    assert why_compiled == {"in-place backward": "torch.compile owns the memory"}
    said = "in-place backward is not used: "
    assert log() == [said + why, said + "torch.compile owns the memory"]


@pytest.mark.parametrize("outputs", ["logp", "topk"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_logits_beyond_the_budget(log, outputs, backend):
    """By slices, and by rows with top k or eagerly."""
    weight = WEIGHT.clone().requires_grad_()
    for _ in range(2):
        stats = pu.linear_token_stats(HIDDEN, weight, TARGETS, outputs=outputs, budget_bytes=4000, backend=backend)
        assert "exceed the budget" in stats.declined["kept logits"]
    assert log() == [f"kept logits is not used: {stats.declined['kept logits']}"]
    assert not pu.linear_token_stats(HIDDEN, weight, TARGETS, outputs=outputs, backend=backend).declined


def test_budget_under_compile():
    def declined(hidden):
        return pu.linear_token_stats(hidden, WEIGHT, TARGETS, budget_bytes=4000).declined

    reasons = torch.compile(declined, fullgraph=True, backend="aot_eager")(HIDDEN)
    assert reasons == {"budget": "torch.compile owns the memory: all logits are made"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(backend="eager"), "backend 'eager' has none"),
        (dict(weights={"kl_pq": torch.ones(3)}, reference=LOGITS), "a reference is read beside the logits"),
        (dict(weights={"topk": torch.ones(3)}, k=2), "top k needs whole rows"),
    ],
)
def test_two_passes(log, options, why):
    for _ in range(2):
        stats, _ = pu.value_and_grad(LOGITS, TARGETS, **{"weights": torch.ones(3), **options})
        assert stats.declined == {"one pass": why}
    assert log() == [f"one pass is not used: {why}"]


def test_two_passes_for_fewer_rows_than_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        few, _ = pu.value_and_grad(LOGITS, TARGETS, torch.ones(3))
        torch.set_num_threads(1)
        many, d_logits = pu.value_and_grad(LOGITS, TARGETS, torch.ones(3))
    finally:
        torch.set_num_threads(threads)
    assert few.declined == {"one pass": "fewer rows than threads, which share rows in two passes"}
    assert many.declined == {}
    assert torch.equal(few.logp, many.logp)
    assert d_logits.shape == LOGITS.shape


def test_overlay_without_room(log, monkeypatch):
    monkeypatch.setattr(modes, "free_bytes", lambda device: 0)  # the machine's memory, which no argument sets
    snappy, model = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    snappy.weight.data.fill_(1.0)
    with torch.no_grad(), pu.perturbed(snappy) as it:
        assert (it.mode, it.declined) == ("snap", "overlay: its scratch needs more than half of the free memory")
    with torch.no_grad(), pu.perturbed(model) as it:
        assert it.mode == "streamed"
        assert it.declined.startswith("overlay: its scratch needs more than half of the free memory; snap: it needs")
    with pu.perturbed(model, mode="copy") as it:
        assert it.declined is None
    assert len(log()) == 2


@pytest.mark.parametrize("op", [pu.token_stats, pu.linear_token_stats, pu.value_and_grad])
def test_eager_for_want_of_kernels(log, monkeypatch, op):
    why = "the native module did not load (gone)"
    monkeypatch.setattr(backends.native, "unavailable", why)
    inputs = {pu.linear_token_stats: (HIDDEN, WEIGHT, TARGETS), pu.value_and_grad: (LOGITS, TARGETS, torch.ones(3))}
    for _ in range(2):
        result = op(*inputs.get(op, (LOGITS, TARGETS)))
        stats = result[0] if isinstance(result, tuple) else result
        assert stats.declined["fused kernels"] == why
    assert log().count(f"fused kernels is not used: {why}") == 1


def test_eager_on_a_gpu_without_triton(log, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        assert backends.choose(None, torch.device("cuda")) == "eager"
    assert log() == ["fused kernels is not used: triton is not installed: pip install triton (Linux)"]
    assert backends.choose(None, torch.device("mps")) == "eager"  # there is nothing else
    assert len(log()) == 1
