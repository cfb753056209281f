"""Arguments that are not what they are called are named, with what came and what is needed."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from pyunlearn import linear_token_stats, token_stats
from pyunlearn.ops import value_and_grad

X, Y = torch.zeros(3, 5), torch.tensor([0, 1, 2])
H, W = torch.zeros(3, 4), torch.zeros(5, 4)
OPS = {
    "token_stats": partial(token_stats, X, Y),
    "linear_token_stats": partial(linear_token_stats, H, W, Y),
    "value_and_grad": partial(value_and_grad, X, Y, torch.ones(3)),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("temperature", "2", TypeError, r"temperature='2': needs a finite number > 0, got str"),
        ("temperature", True, TypeError, "temperature=True: needs a finite number > 0, got bool"),
        ("temperature", math.nan, ValueError, "temperature=nan: needs a finite number > 0"),
        ("temperature", torch.tensor(2.0, requires_grad=True), TypeError, "temperature: .* which requires grad"),
        (
            "temperature",
            torch.ones(3),
            TypeError,
            r"temperature: needs a finite number > 0, got a tensor of shape \(3,\)",
        ),
        ("softcap", "5", TypeError, "softcap='5': needs None or a finite number > 0, got str"),
        ("k", 3.9, ValueError, "k=3.9: needs a whole number from 1 to 256"),
        ("k", math.inf, ValueError, "k=inf: needs a whole number from 1 to 256"),
        ("k", None, TypeError, "k=None: needs a whole number from 1 to 256, got NoneType"),
        ("ignore_index", 1.5, ValueError, "ignore_index=1.5: needs a whole number"),
        ("ignore_index", "pad", TypeError, "ignore_index='pad': needs a whole number, got str"),
        ("outputs", 3, TypeError, "outputs=3: needs one or more of"),
        ("reference", 3, TypeError, "reference: needs a t.* got int"),
        ("lowered", 1.0, ValueError, "lowered: needs reference=, whose logits of the targets it lowers, got None"),
        ("lowered", "1", ValueError, "lowered='1': needs a finite number, or a tensor shaped like targets"),
        ("lowered", torch.ones(2), ValueError, r"lowered: needs a number or the shape of targets \(3,\), got \(2,\)"),
        ("lowered", torch.ones(3, dtype=torch.int64), TypeError, "lowered: needs a floating dtype, got torch.int64"),
    ],
)
@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats", "value_and_grad"])
def test_options(op, name, value, error, message):
    if name == "lowered" and op == "value_and_grad":
        error, message = TypeError, "unexpected keyword argument 'lowered'"
    with pytest.raises(error, match=message):
        OPS[op](**{name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: token_stats(X, [0, 1, 2]), "targets: needs a tensor, got list"),
        (lambda: token_stats([[1.0, 2.0]], Y), "logits: needs a tensor, got list"),
        (lambda: token_stats(X, Y, outputs=None), "outputs=None: needs one or more of"),
        (lambda: token_stats(X, Y, ignore_index=None), "ignore_index=None: needs a whole number, got NoneType"),
        (lambda: linear_token_stats(H.tolist(), W, Y), "hidden: needs a tensor, got list"),
        (lambda: linear_token_stats(H, W.tolist(), Y), "weight: needs a tensor, got list"),
        (lambda: linear_token_stats(H, W, Y.tolist()), "targets: needs a tensor, got list"),
        (lambda: linear_token_stats(H, W, Y, bias=[0.0] * 5), "bias: needs a tensor, got list"),
        (lambda: linear_token_stats(H, W, Y, reference=(H,)), r"\(ref_hidden, ref_weight\) .* got a tuple of 1"),
        (lambda: linear_token_stats(H, W, Y, reference=[H, W]), "got a list of 2"),
        (lambda: linear_token_stats(H, W, Y, reference=(H, 3)), r"reference\[1\]: needs a tensor, got int"),
        (lambda: linear_token_stats(H, W, Y, adapter=(H,)), r"adapter: needs a tuple \(x, B\), got a tuple of 1"),
        (
            lambda: linear_token_stats(H, W, Y, budget_bytes="1 GB"),
            "budget_bytes='1 GB': needs None or a number",
        ),
        (lambda: value_and_grad(X, Y, torch.ones(3), rule=None), "rule: needs a TokenRule, got NoneType"),
        (lambda: value_and_grad(X, Y.tolist(), torch.ones(3)), "targets: needs a tensor, got list"),
    ],
)
def test_tensors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_what_is_a_number_stays_one():
    numbers = torch.tensor(2.0), 2, 2.0
    told = [token_stats(X, Y, temperature=value, k=3.0, outputs=("logp", "topk")).logp for value in numbers]
    assert torch.equal(told[0], told[1]) and torch.equal(told[0], told[2])  # noqa: PT018
    assert linear_token_stats(H, W, Y, budget_bytes=1e9, ignore_index=None).mask.all()


def test_compiled_into_one_graph():
    x, r = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)

    def loss(x, temperature, lowered):
        how = {"outputs": ("logp", "kl_qp"), "reference": r, "temperature": temperature}
        stats = token_stats(x, Y, lowered=lowered, **how)
        return (stats.logp + stats.kl_qp).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for temperature, lowered in ((1.0, 0.0), (2.0, 3.0), (1.5, torch.rand(3))):
        one, other = (f(x, temperature, lowered) for f in (loss, compiled))
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (one, other)))
