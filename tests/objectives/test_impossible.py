"""Tokens with p = 0, a lane at -inf: what there is to forget of them is 0, on every backend."""

from __future__ import annotations

import pytest
import torch

from pyunlearn import objectives as o
from pyunlearn import token_stats, value_and_grad

INF = torch.inf
FADING = [
    ("wga", {}),
    ("npo", {}),
    ("tnpo", {}),
    ("tnpo", {"epsilon": 1e-5}),
    ("wtnpo", {}),
    ("wtnpo", {"alpha": 0.0}),
    ("satimp", {}),
    ("simnpo", {}),
    ("bst", {"preset": "bstw"}),
]


def loss_of(name, x, y, reference, backend=None, **options):
    objective = o.get(name, **options)
    how = {} if objective.k is None else {"k": 3}
    how |= {"lowered": objective.lowered} if objective.lowered else {}
    how |= {"reference": reference} if objective.reference == "kl" else {}
    frozen = token_stats(reference, y, ("logp", "entropy"), backend=backend)
    stats = token_stats(x, y, objective.outputs, backend=backend, **how)
    told = o.TokenInputs(stats.as_dict(), ref_logp=frozen.logp, ref_entropy=frozen.entropy, vocab_size=x.size(-1))
    return objective(dict.fromkeys(objective.batches, told))


def impossible(dtype):
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[0, 0, 2] = -INF
    return x.requires_grad_(), torch.tensor([[2]])


@pytest.mark.parametrize(("name", "options"), FADING)
@pytest.mark.parametrize("same", [False, True], ids=["reference", "the model itself"])
@pytest.mark.parametrize("backend", ["eager", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_to_forget(name, options, same, backend, dtype):
    x, y = impossible(dtype)
    reference = x.detach().clone() if same else torch.zeros_like(x)
    loss = loss_of(name, x, y, reference, backend, **options)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_undial_of_what_is_impossible_for_both():
    x, y = impossible(torch.float64)
    loss = loss_of("undial", x, y, x.detach().clone())
    q = x.detach()[0, 0, [i for i in range(8) if i != 2]].softmax(-1)
    assert loss.item() == pytest.approx(-(q * q.log()).sum().item(), rel=1e-9)
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-12


def test_without_a_weight_it_is_the_limit():
    x, y = impossible(torch.float64)
    for name, options in (("ga", {}), ("wga", {"alpha": 0.0}), ("satimp", {"beta1": 0.0}), ("bst", {"k": 3})):
        loss = loss_of(name, x, y, x.detach(), **options)
        assert loss.item() == -INF, name
        assert torch.autograd.grad(loss, x)[0].isfinite().all(), name
    loss = loss_of("bst", x, y, x.detach(), k=3, lam=1.0)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@pytest.mark.parametrize("name", ["dpo", "altpo", "ap"])
def test_of_two_impossible_texts_the_wanted_one_is_to_be_learned(name):
    x, y = impossible(torch.float64)
    loss = loss_of(name, x, y, x.detach().clone())
    assert loss.item() == INF
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()
    assert gradient[0, 0, 2] < 0


@pytest.mark.parametrize("name", ["dpo", "altpo"])
def test_an_impossible_answer_leaves_nothing_to_prefer(name):
    logp, impossible_ = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-INF]], requires_grad=True)
    for reference in (torch.tensor([[-2.0]]), torch.tensor([[-INF]])):
        loss = getattr(o, name)(logp, impossible_, torch.tensor([[-1.0]]), reference)
        assert loss.item() == 0
        assert [g.item() for g in torch.autograd.grad(loss, (logp, impossible_))] == [0, 0]


@pytest.mark.parametrize(("name", "options"), [("ga", {}), ("wga", {}), ("satimp", {}), ("satimp", {"beta1": 0.0}),
                                               ("tnpo", {}), ("wtnpo", {})])  # fmt: skip
@pytest.mark.parametrize("ref_logp", [-1.0, -INF])
def test_one_pass_agrees_on_every_backend(name, options, ref_logp):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    x[0, 2] = -INF
    y, objective = torch.tensor([2, 1]), o.get(name, **options)
    told = torch.full((2,), ref_logp) if objective.reference else None
    given = o.one_pass(objective, torch.ones(2, dtype=torch.bool), ref_logp=told)
    found = [value_and_grad(x, y, backend=backend, **given)[1] for backend in ("eager", None)]
    leaf = x.clone().requires_grad_()
    inputs = o.TokenInputs(token_stats(leaf, y).as_dict(), ref_logp=told)
    found.append(torch.autograd.grad(objective({"answer": inputs}), leaf)[0])
    for each in found:
        assert each.isfinite().all()
        torch.testing.assert_close(each, found[0])
