"""Bootstrapping: what the model would say instead of the answer is pushed down with it.

Gradient ascent squeezes an answer's probability into its likeliest rephrasings. The belief b_t is the model's own
distribution renormalised on its k likeliest tokens, and constant: `topk` is sum_v b_t(v) log p_t(v).
"""

from __future__ import annotations

from torch import Tensor

from .definition import Positive, Share, TopK
from .forget import npo_weight, weighted
from .registry import register, register_preset

BELIEFS = "LLM Unlearning with LLM Beliefs, ICLR 2026, arXiv:2510.19422"


def mixed(logp: Tensor, topk: Tensor, lam: float) -> Tensor:
    """(1 - lam) logp + lam topk; what has no share counts nothing, be it -inf."""
    return topk if lam == 1 else (1.0 - lam) * logp + lam * topk


@register(
    "bst",
    level="sequence",
    formula="mean over sequences of sum_t sum_v ((1 - lam) [v = y_t] + lam sg(b_t(v))) log p_t(v)",
    source=f"{BELIEFS}, Eq. 6 and 7",
)
def bst(logp: Tensor, topk: Tensor, *, lam: Share = 0.2, k: TopK = 20) -> Tensor:
    """Bootstrapping at token level: ascent on the answer and on the model's own beliefs. Unbounded below.

    lam = 0 is `ga`. k = V would be all that the model believes, whose gradient is 0; k > V is refused where V is known.
    The authors' code (`bs_code`) has the mean over a sequence's tokens, and beside it descent on the retain set, of
    weight 1. `bstw` weighs a sequence as `npo` does, by 2 p^beta / (p^beta + p°^beta).

    >>> logp, topk = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0, -1.0]])
    >>> bst(logp, topk, lam=0.5)
    tensor(-3.)
    """
    return mixed(logp, topk, lam)


@register_preset(
    "bst",
    "bs_code",
    formula="mean over sequences of mean_t sum_v ((1 - lam) [v = y_t] + lam sg(b_t(v))) log p_t(v)",
    reduction="sequence_token_mean",
)
def bst_bs_code(logp: Tensor, topk: Tensor, *, lam: Share = 0.2, k: TopK = 20) -> Tensor:
    return mixed(logp, topk, lam)


@register_preset(
    "bst",
    "bstw",
    formula="mean over sequences of sg(2 sigmoid(beta (L° - L))) times the sum of `bst`, L = -sum_t log p_t(y_t)",
)
def bstw(
    logp: Tensor, topk: Tensor, ref_logp: Tensor, *, lam: Share = 0.2, k: TopK = 20, beta: Positive = 0.1
) -> Tensor:
    return weighted(npo_weight(logp, ref_logp, beta, 0.0), mixed(logp, topk, lam))
