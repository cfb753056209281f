"""Untargeted forget objectives: push the model away from the answers of the forget set.

Per supervised token: l_t = -logp_t, p_t = exp(logp_t); a sequence has n of them and L = sum_t l_t. A ° marks
the frozen reference, sg the stop-gradient. Weights stay in log space until the last step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.contract import TokenRule, power
from .closed_form import not_infinite, sigmoid_floor
from .definition import Masked, NonNegative, Positive
from .registry import register, register_preset

G_EFFECT = "Wang et al., Rethinking LLM Unlearning Objectives: A Gradient Perspective, ICLR 2025"
CLOSER_LOOK = "Yuan et al., A Closer Look at Machine Unlearning for LLMs, ICLR 2025"


def weighted(weight: Tensor, logp: Tensor) -> Tensor:
    """weight * logp, 0 where the weight is, of logp = -inf too: of what has p = 0 there is nothing to forget."""
    return torch.where(weight != 0, weight * logp, 0.0)


@register(
    "ga",
    paper_reduction="sequence_mean",
    formula="mean of -l_t",
    source=f"{CLOSER_LOOK}, Eq. 1; {G_EFFECT}, Section 4.1",
    presets={"g_effect_code": {}, "closer_look_code": {}, "open_unlearning": {}},
    slope=1.0,
)
def ga(logp: Tensor) -> Tensor:
    """Gradient ascent: maximise the loss on the forget set. Unbounded below.

    >>> ga(torch.tensor([[-1.0, -3.0]]))
    tensor(-2.)
    """
    return logp


@register(
    "wga",
    paper_reduction="sequence_mean",
    formula="mean of -sg(p_t^alpha) l_t",
    source=f"{G_EFFECT}, Eq. 2 and Appendix D.1",
    presets={"g_effect_code": {"alpha": 5.0}, "open_unlearning": {}},
    slope=1.0,
    rule=lambda o: TokenRule(alpha=o["alpha"]),
)
def wga(logp: Tensor, *, alpha: NonNegative = 1.0) -> Tensor:
    """Weighted gradient ascent: each token counts by its own confidence, and stops once forgotten.

    alpha = 0 is `ga`. The paper runs TOFU with alpha 5 (1 % and 5 %) and 7 (10 %).

    >>> wga(torch.tensor([[0.5, 0.25]]).log(), alpha=1.0)
    tensor(-0.3466)
    """
    return weighted(power(logp.detach(), alpha), logp)


@register(
    "npo",
    level="sequence",
    formula="-(2/beta) mean over sequences of log sigmoid(beta (L - L°))",
    source=f"Zhang et al., Negative Preference Optimization, COLM 2024; {G_EFFECT}, Eq. 3; {CLOSER_LOOK}, Eq. 2",
    presets={"g_effect_code": {"beta": 0.5}, "closer_look_code": {}, "open_unlearning": {}},
)
def npo(logp: Tensor, ref_logp: Tensor, *, beta: Positive = 0.1) -> Tensor:
    """Negative preference optimization: gradient ascent that fades as a sequence falls below the reference.

    Its gradient is that of -L times 2 p^beta / (p^beta + p°^beta): 1 at the reference and as beta -> 0.

    >>> npo(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.0]]), beta=1.0)  # 2 log 2
    tensor(1.3863)
    """
    return -2.0 / beta * F.logsigmoid(beta * (not_infinite(ref_logp) - logp))


def npo_weight(logp: Tensor, ref_logp: Tensor, beta: float, epsilon: float) -> Tensor:
    """2 p^beta / (p^beta + p°^beta + epsilon), detached."""
    return 2.0 * torch.sigmoid(beta * logp.detach() - sigmoid_floor(ref_logp, beta, epsilon))


@register(
    "tnpo",
    paper_reduction="sequence_mean",
    formula="mean of -sg(w_t) l_t, w_t = 2 p_t^beta / (p_t^beta + p°_t^beta + epsilon)",
    source=f"{G_EFFECT}, Eq. 6 and Appendix D.2",
    presets={"g_effect_code": {"epsilon": 1e-5}},
    slope=1.0,
    rule=lambda o: TokenRule(beta=o["beta"]),
)
def tnpo(logp: Tensor, ref_logp: Tensor, *, beta: Positive = 4.0, epsilon: NonNegative = 0.0) -> Tensor:
    """Token-wise NPO: the NPO weight at every token instead of every sequence.

    w_t is 1 at the reference. The authors' code has epsilon = 1e-5, which makes that .34 at p = p° = .04. The
    paper's beta is 4 (1 % and 5 % of TOFU) and 5 (10 %).

    >>> tnpo(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0, -3.0]]))
    tensor(-2.)
    """
    return weighted(npo_weight(logp, ref_logp, beta, epsilon), logp)


@register(
    "wtnpo",
    paper_reduction="sequence_mean",
    formula="mean of -sg(w_t) l_t, w_t = 2 p_t^(beta+alpha) / (p_t^beta + p°_t^beta + epsilon)",
    source=f"{G_EFFECT}, Appendix D.2",
    presets={"g_effect_code": {"beta": 4.0, "epsilon": 1e-5}},
    slope=1.0,
    rule=lambda o: TokenRule(alpha=o["alpha"], beta=o["beta"]),
)
def wtnpo(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    alpha: NonNegative = 1.5,
    beta: Positive = 5.0,
    epsilon: NonNegative = 0.0,
) -> Tensor:
    """Weighted token-wise NPO: the weights of `tnpo` times those of `wga`.

    alpha = 0 is `tnpo`. The paper's beta is 5 (1 % and 5 % of TOFU) and 7 (10 %); its code's default is 4.

    >>> wtnpo(torch.tensor([[0.5]]).log(), torch.tensor([[0.5]]).log(), alpha=1.0)
    tensor(-0.3466)
    """
    return weighted(npo_weight(logp, ref_logp, beta, epsilon) * power(logp.detach(), alpha), logp)


@register(
    "simnpo",
    level="sequence",
    formula="-(2/beta) mean over sequences of log sigmoid(beta L/n - margin)",
    source="Fan et al., Simplicity Prevails: Rethinking Negative Preference Optimization, NeurIPS 2025",
)
def simnpo(logp: Tensor, *, num_tokens: Tensor, beta: Positive = 4.5, margin: float = 0.0) -> Tensor:
    """NPO without a reference: the length-normalised loss takes the place of the log-ratio.

    The paper has the margin outside beta, the authors' code and OpenUnlearning inside (preset `open_unlearning`,
    which weighs it 0.125 beside a retain loss of weight 1).

    >>> simnpo(torch.tensor([[-2.0, -4.0]]), beta=1.0)
    tensor(0.0972)
    """
    return -2.0 / beta * F.logsigmoid(-beta * logp / num_tokens - margin)


@register_preset(
    "simnpo", "open_unlearning", formula="-(2/beta) mean over sequences of log sigmoid(beta (L/n - margin))"
)
def simnpo_open_unlearning(logp: Tensor, *, num_tokens: Tensor, beta: Positive = 4.5, margin: float = 0.0) -> Tensor:
    return -2.0 / beta * F.logsigmoid(beta * (-logp / num_tokens - margin))


@register(
    "satimp",
    paper_reduction="sequence_mean",
    formula="mean of -sg(p_t^beta1 (1 - p_t)^beta2) l_t",
    source="Yang et al., Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning, ICML 2025",
    presets={"open_unlearning": {"beta2": 1.0}},
    slope=1.0,
    rule=lambda o: TokenRule(alpha=o["beta1"], gamma=o["beta2"]),
)
def satimp(logp: Tensor, *, beta1: NonNegative = 5.0, beta2: NonNegative = 0.1) -> Tensor:
    """Saturation and importance: tokens that are well known, but not certain, count most.

    beta2 = 0 is `wga` with alpha = beta1: SimSat, saturation alone; beta1 = 0 is SimImp, importance alone. The paper
    weighs the retain loss 0.1 beside it; OpenUnlearning's settings weigh this one 0.1 beside a retain loss of weight 1.

    >>> satimp(torch.tensor([[0.5]]).log(), beta1=1.0, beta2=1.0)
    tensor(-0.1733)
    """
    fixed = logp.detach()
    # 1 - p as -expm1(log p): right for p near 1, where 1 - exp(log p) has no digits left.
    return weighted(power(fixed, beta1) * (-torch.expm1(fixed)).clamp_min(0.0).pow(beta2), logp)


@register(
    "me",
    positions="real",
    paper_reduction="sequence_token_mean",
    formula="mean over all tokens, the question's too, of KL(p_t || U) = log V - H_t",
    source=f"{CLOSER_LOOK}, Eq. 6",
    slope=-1.0,
)
def me(entropy: Tensor, *, vocab_size: int, positions: Masked = "real") -> Tensor:
    """Maximising entropy: towards the uniform distribution at every position. Bounded: 0 <= loss <= log V.

    The paper weighs it 0.1 against the retain loss (1.0 continual, 0.5 real-world). The authors' code turns the
    divergence around and counts padding: every row is padded with EOS to 500 tokens (300 real-world), and all 499
    predictions weigh alike, which makes an answer's about 499/n times weaker than the equation does. The preset
    `closer_look_code` counts the padding that the batch has: for theirs pad alike, by `unlearn.pad_to: 500` in a run
    or `ForgetRetainDataset(pad_to=500)`, with EOS as the pad token. Rows padded to their batch's longest make it
    depend on how a step is split. The 1e-12 that the code adds inside the log is left out. Where a model is run for
    it, `positions="supervised"` leaves the question out (Appendix E.5: less stable on the retain set), and
    `positions="template_free"` the prompt format's own tokens: tags, system prompt, special tokens, the answer's end.

    >>> me(torch.tensor([[0.0, math.log(4.0)]]), vocab_size=4)  # half of log 4
    tensor(0.6931)
    """
    return math.log(vocab_size) - entropy


@register_preset(
    "me",
    "closer_look_code",
    formula="mean over all positions but the last, prompt and padding too, of KL(U || p_t) = uniform_ce_t - log V",
    positions="followed",
    slope=1.0,
)
def me_closer_look_code(uniform_ce: Tensor, *, vocab_size: int) -> Tensor:
    return uniform_ce - math.log(vocab_size)
