"""Retain objectives: keep what is not to be forgotten."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .closed_form import without_both
from .definition import Positive
from .forget import CLOSER_LOOK, G_EFFECT
from .registry import register, register_preset


@register(
    "gd",
    role="retain",
    paper_reduction="sequence_mean",
    formula="mean of l_t",
    source=f"{CLOSER_LOOK}, Eq. 4; {G_EFFECT}, Eq. 17",
    presets={"g_effect_code": {}, "closer_look_code": {}, "open_unlearning": {}},
    slope=-1.0,
)
def gd(logp: Tensor) -> Tensor:
    """Gradient descent: the usual loss, on the retain set.

    >>> gd(torch.tensor([[-1.0, -3.0]]))
    tensor(2.)
    """
    return -logp


@register(
    "kl",
    role="retain",
    paper_reduction="sequence_mean",
    formula="mean over supervised tokens of KL(p_t || p°_t)",
    source=f"{CLOSER_LOOK}, Eq. 5; {G_EFFECT}, Eq. 18",
    slope=1.0,
)
def kl(kl_pq: Tensor) -> Tensor:
    """Stay close to the reference's distributions on the retain set.

    The public code bases compute the other direction, over all positions, prompt and padding too (the presets). Rows
    are padded to the longest of their batch, so that theirs depends on how a step is split: a step of one batch of 8
    and one of 8 batches of 1 have other counts and other losses.

    >>> kl(torch.tensor([[0.5, 1.5]]))
    tensor(1.)
    """
    return kl_pq


@register_preset(
    "kl",
    "open_unlearning",
    "closer_look_code",
    "g_effect_code",
    formula="mean over all positions, prompt and padding too, of KL(p°_t || p_t)",
    positions="all",
    slope=1.0,
)
def kl_open_unlearning(kl_qp: Tensor) -> Tensor:
    return kl_qp


@register(
    "ap",
    role="retain",
    level="sequence",
    formula="-(1/beta) mean over pairs of log sigmoid(beta (L_refusal - L_answer))",
    source=f"{CLOSER_LOOK}, Eq. 8",
    presets={"closer_look_code": {}},
)
def ap(refusal_logp: Tensor, answer_logp: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """Answer preservation: on retain questions the answer stays likelier than a refusal. Needs no reference.

    Sequence i of the refusals pairs with sequence i of the answers; a pair counts if both hold a token.

    >>> ap(torch.tensor([[-2.0]]), torch.tensor([[-2.0]]), beta=1.0)  # log 2
    tensor(0.6931)
    """
    return -1.0 / beta * F.logsigmoid(beta * (answer_logp - without_both(refusal_logp, answer_logp, refusal_logp)))
