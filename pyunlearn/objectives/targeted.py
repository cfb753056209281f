"""Targeted forget objectives: teach an answer to give instead, a refusal drawn for each forget question."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .definition import Positive
from .forget import CLOSER_LOOK
from .registry import register


@register(
    "idk",
    batch="refusal",
    paper_reduction="sequence_mean",
    formula="mean of l_t over the refusals' tokens",
    source=f"Maini et al., TOFU, COLM 2024 (as PO); {CLOSER_LOOK}, Eq. 3",
    presets={"g_effect_code": {}, "closer_look_code": {}},
    slope=-1.0,
)
def idk(logp: Tensor) -> Tensor:
    """Fine-tune on refusals ("I don't know.") to the forget questions.

    >>> idk(torch.tensor([[-1.0, -3.0]]))
    tensor(2.)
    """
    return -logp


@register(
    "dpo",
    level="sequence",
    formula="-(factor/beta) mean over pairs of log sigmoid(beta ((L°_w - L_w) - (L°_l - L_l))), "
    "w = refusal, l = answer",
    source=f"Rafailov et al., Direct Preference Optimization, NeurIPS 2023; {CLOSER_LOOK}, Section 2.3",
    presets={"standard": {"factor": 1.0}, "closer_look_code": {}, "open_unlearning": {}},
)
def dpo(
    refusal_logp: Tensor,
    answer_logp: Tensor,
    refusal_ref_logp: Tensor,
    answer_ref_logp: Tensor,
    *,
    beta: Positive = 0.1,
    factor: Positive = 2.0,
) -> Tensor:
    """Direct preference optimization: prefer the refusal to the true answer.

    Sequence i of the refusals pairs with sequence i of the answers; a pair counts if both hold a token. The
    preset `standard` drops the 2 and keeps 1/beta, as the NPO paper writes it; the loss of Rafailov et al.,
    without 1/beta, is that with coefficient beta. At the reference the loss is (factor/beta) log 2.

    >>> logp = torch.tensor([[-1.0, -3.0]])
    >>> dpo(logp, logp, logp, logp, beta=1.0)  # 2 log 2
    tensor(1.3863)
    """
    gained = (refusal_logp - refusal_ref_logp) - (answer_logp - answer_ref_logp)
    return -factor / beta * F.logsigmoid(beta * gained)
