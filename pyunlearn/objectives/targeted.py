"""Targeted forget objectives: teach an answer to give instead, a refusal drawn for each forget question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .closed_form import gained_over
from .definition import Domain, Positive
from .forget import CLOSER_LOOK
from .registry import register, register_preset


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
    gained = gained_over(refusal_logp, answer_logp, refusal_ref_logp, answer_ref_logp)
    return -factor / beta * F.logsigmoid(beta * gained)


FLAT = "Wang et al., LLM Unlearning via Loss Adjustment with Only Forget Data, ICLR 2025"
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of the template's probability and of the answer's
    "tv": lambda e, f: (torch.tanh(f) - torch.tanh(e)) / 2,
    "kl": lambda e, f: (f - 1).exp() - e,
    "pearson": lambda e, f: f.square() / 4 + f - e,
    "js": lambda e, f: F.softplus(-e) + F.softplus(-f) + f - 2 * math.log(2),
    "jeffrey": lambda e, f: f + f.square() / 4 + f**3 / 16 - e,
}
INVERTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # as coded, these lower e, and the first two raise f
    "reverse_kl": lambda e, f: torch.expm1(e) - f,
    "hellinger": lambda e, f: torch.expm1(e) - torch.expm1(f) * (-f).exp(),
    "neyman": lambda e, f: torch.expm1(e) + 2 - 2 * (1 - f).clamp_min(torch.finfo(f.dtype).eps).sqrt(),
}


def one_of(names: Iterable[str]) -> Any:
    return Domain(f"one of {tuple(names)}", tuple(names).__contains__)


@register(
    "flat",
    level="sequence",
    each=torch.exp,
    formula="mean over pairs of -g(P_e) + f*(P_f), P_e and P_f the mean probability of a token of the template answer "
    "(refusal) and of the answer; tv: (tanh P_f - tanh P_e) / 2",
    source=f"{FLAT}, and its code",
)
def flat(
    refusal_logp: Tensor,
    answer_logp: Tensor,
    *,
    refusal_num_tokens: Tensor,
    answer_num_tokens: Tensor,
    divergence: Annotated[str, one_of(DIVERGENCES)] = "tv",
) -> Tensor:
    """Loss adjustment with forget data alone: a template answer gains what the answer loses, by an f-divergence.

    No retain term and no reference. Sequence i of the refusals pairs with sequence i of the answers; a pair counts if
    both hold a token. The code (`flat_code`) divides by all positions of the padded rows, so that P depends on their
    padding; it averages P over a batch's rows before the divergence, here each pair has its own, which is the same for
    one row a batch. It has three more divergences, whose signs raise the answer or lower the template.

    >>> flat(torch.tensor([[0.5]]).log(), torch.tensor([[0.5, 0.5]]).log())
    tensor(0.)
    """
    return DIVERGENCES[divergence](refusal_logp / refusal_num_tokens, answer_logp / answer_num_tokens)


@register_preset(
    "flat",
    "flat_code",
    formula="mean over pairs of -g(P_e) + f*(P_f), P_e and P_f sums of the tokens' probabilities divided by all "
    "positions of the row but the last, prompt and padding too",
)
def flat_code(
    refusal_logp: Tensor,
    answer_logp: Tensor,
    *,
    refusal_num_positions: int,
    answer_num_positions: int,
    divergence: Annotated[str, one_of([*DIVERGENCES, *INVERTED])] = "tv",
) -> Tensor:
    loss = (DIVERGENCES | INVERTED)[divergence]
    return loss(refusal_logp / refusal_num_positions, answer_logp / answer_num_positions)
