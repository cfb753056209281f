"""Forget objectives on the whole distribution at each position: what it is to become instead, or how flat.

Each is algebra on numbers that one read of the logits gives, so that no target distribution is ever held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .definition import Positive, Whole
from .registry import register, register_preset

OPEN_UNLEARNING = "Dorna et al., OpenUnlearning, 2025"
FAR = 1e4  # a loss that has no other gradient than an infinite one


def lowered_entropy(ref_logp: Tensor, ref_entropy: Tensor, b: float) -> Tensor:
    """Entropy of the reference with its logit of the target less by b, from what it is of the reference as it is.

    With t its share of the target, and u the reference over all other tokens: h(t) + (1 - t) H(u), h that of a coin.
    No 1 - q_y is a difference.
    """
    tiny = torch.finfo(ref_logp.dtype).tiny
    rest = -torch.expm1(ref_logp)  # 1 - q_y, right for q_y near 1 too
    log_rest = rest.clamp_min(tiny).log()
    coin = -(entropy_term(ref_logp) + rest * log_rest)
    others = ((ref_entropy - coin) / rest.clamp_min(tiny)).clamp_min(0.0)  # H(u); 0 where 1 - q_y underflows
    log_share, log_other = (ref_logp - b), torch.where(rest > 0, log_rest, -torch.inf)
    total = torch.logaddexp(log_share, log_other)  # log(1 - q_y (1 - e^-b))
    log_share, log_other = log_share - total, log_other - total
    return log_other.exp() * others - entropy_term(log_share) - entropy_term(log_other)


def entropy_term(log_p: Tensor) -> Tensor:
    """p log p, 0 for p = 0."""
    return torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)


@register(
    "undial",
    paper_reduction="sequence_mean",
    formula="mean of the cross-entropy of p_t to softmax(z°_t - b [v = y_t])",
    source="Dong et al., UNDIAL: Self-Distillation with Adjusted Logits, NAACL 2025",
)
def undial(lowered_kl_qp: Tensor, ref_logp: Tensor, ref_entropy: Tensor, *, b: Positive = 10.0) -> Tensor:
    """Self-distillation from the reference with its logit of the answer's token lowered by b. Bounded below.

    As b -> 0 it is distillation from the reference, with gradient 0 at the start. The KL is that of `token_stats` to
    the lowered reference (`lowered=b`), which gives the gradient p - target; ref_logp and ref_entropy, of the reference
    as it is, add the target's entropy, a constant. From a KL to the reference as it is the loss would need factors of
    up to e^b for a token that the reference is sure of, whose rounding is larger than the gradient. No retain term in
    the paper.

    The code of OpenUnlearning (`open_unlearning`) masks nothing: its mean is over prompt and padding too, where the
    reference's own distribution is the target: `lowered=torch.where(labelled, b, 0.0)`. There it also lowers the logit
    of token V - 100, the label -100 read as an index, which is left out here.

    >>> half = torch.tensor([[0.5]]).log()  # p = q = (1/2, 1/2), and b large: all mass to the other token
    >>> undial(-half, half, -half, b=50.0)
    tensor(0.6931)
    """
    return lowered_kl_qp + lowered_entropy(ref_logp, ref_entropy, b)


@register_preset(
    "undial",
    "open_unlearning",
    formula="mean over all positions but the last, prompt and padding too, of the cross-entropy of p_t to "
    "softmax(z°_t - b [v = y_t]), b = 0 where nothing is supervised",
    positions="followed",
)
def undial_open_unlearning(
    lowered_kl_qp: Tensor, ref_logp: Tensor, ref_entropy: Tensor, *, labelled: Tensor, b: Positive = 10.0
) -> Tensor:
    return lowered_kl_qp + torch.where(labelled, lowered_entropy(ref_logp, ref_entropy, b), ref_entropy)


@register(
    "ce_u",
    paper_reduction="sequence_mean",
    formula="mean of the cross-entropy of p_t to sg(p_t(v) / (1 - p_t(y_t))), v other than y_t",
    source=f"CE-U: Cross Entropy Unlearning, 2025; {OPEN_UNLEARNING}",
    presets={"open_unlearning": {"skip": 1}},
)
def ce_u(log_nll: Tensor, entropy: Tensor, *, skip: Whole = 0) -> Tensor:
    """Cross-entropy to the model's own distribution without the answer's token: ascent that stops by itself.

    Its gradient is that of w log p_y, w = p_y / (1 - p_y) held constant, and bounded: p - target. It goes through
    log(-log p_y), and is right for tokens that the model is sure of, too. Its value, (H + p_y log p_y) / (1 - p_y), is
    -log(1 - p_y) alone where 1 - p_y underflows. skip: so many tokens at an answer's start do not count, in
    OpenUnlearning 1. No retain term in the paper.

    >>> half = torch.tensor([[0.5]]).log()  # p = (1/2, 1/2): the other token's log-probability
    >>> ce_u((-half).log(), -half)
    tensor(0.6931)
    """
    known = torch.where(log_nll.isfinite(), log_nll, 0.0)  # p_y = 0: there is nothing to forget
    nll = log_nll.detach().exp().clamp(max=FAR)
    other = -torch.expm1(-nll)  # 1 - p_y
    tiny = torch.finfo(nll.dtype).tiny
    rest = (entropy.detach() - (-nll).exp() * nll) / other.clamp_min(tiny)
    value = torch.where(other > tiny, rest, -log_nll.detach())
    weight = torch.where(nll > tiny, nll / torch.expm1(nll).clamp_min(tiny), 1.0)  # of log(-log p_y): w times -log p_y
    return value - weight * (known - known.detach())


@register(
    "pdu",
    paper_reduction="sequence_mean",
    formula="mean of (max_v z_t(v) - mean_v z_t(v))^2",
    source="Entesari et al., Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models, 2025; "
    + OPEN_UNLEARNING,
)
def pdu(max_logp: Tensor, uniform_ce: Tensor) -> Tensor:
    """Flat logits: the largest comes down to the mean of all. Bounded: 0 <= loss.

    A constant added to the logits changes nothing, a factor does. Beside it stands a retain loss with a dual variable
    for its coefficient: `unlearn.dual` in a run, which has the settings of OpenUnlearning. OpenUnlearning judges a
    position by its own token's label, one too late; here, as everywhere, by that of the token it predicts.

    >>> pdu(torch.tensor([[-1.0]]), torch.tensor([[3.0]]))  # max z - mean z = max log p - mean log p
    tensor(4.)
    """
    return (max_logp + uniform_ce).square()
