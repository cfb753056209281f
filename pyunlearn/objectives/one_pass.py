"""What `pyunlearn.value_and_grad` needs of a token-separable objective: its gradient per token in closed form.

A token's gradient is its share of the reduction (1/n for token_mean, ...) times the slope of the objective at the
token, which is a constant, or depends on the token's own logp by a `TokenRule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.one_pass import TokenRule
from .objective import Objective
from .reduction import Count, Layout, TokenInputs, reduce_tokens

Options = Mapping[str, Any]

# objective -> (d(loss of a token) / d(statistic) apart from the rule, the rule)
SLOPES: dict[str, tuple[float, Callable[[Options], TokenRule]]] = {
    "ga": (1.0, lambda o: TokenRule()),
    "wga": (1.0, lambda o: TokenRule(alpha=o["alpha"])),
    "satimp": (1.0, lambda o: TokenRule(alpha=o["beta1"], gamma=o["beta2"])),
    "tnpo": (1.0, lambda o: TokenRule(beta=o["beta"])),
    "wtnpo": (1.0, lambda o: TokenRule(alpha=o["alpha"], beta=o["beta"])),
    "gd": (-1.0, lambda o: TokenRule()),
    "idk": (-1.0, lambda o: TokenRule()),
    "kl": (1.0, lambda o: TokenRule()),
    "me": (1.0, lambda o: TokenRule()),
}


def one_pass(
    objective: Objective,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    count: Count | None = None,
) -> dict[str, Any]:
    """weights, rule and floor for `pyunlearn.value_and_grad`: its d(logits) is then that of the objective's loss.

    Args:
        objective: one of those in `SLOPES`, as `get` gives it.
        mask: (B, T) or flat (N,) bool, the tokens that count; shaped like the targets.
        ref_logp: the same shape, the frozen reference's logp, for `tnpo` and `wtnpo`.
        sequence_ids, num_sequences, count: as in the objective itself.

    Raises: ValueError or TypeError naming what does not fit, or that the objective is not token-separable.

    >>> from pyunlearn import objectives, value_and_grad
    >>> logits, targets = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
    >>> wga = objectives.get("wga", alpha=1.0)
    >>> stats, d_logits = value_and_grad(logits, targets, **one_pass(wga, torch.tensor([[True, True]])))
    >>> d_logits[0, 0].tolist()  # p / 2 at the target's lane, times 1 - p
    [-0.03125, 0.09375, -0.03125, -0.03125]
    """
    if objective.name not in SLOPES:
        raise ValueError(f"{objective.name}: needs a token-separable objective, one of {tuple(SLOPES)}")
    slope, rule_of = SLOPES[objective.name]
    (name,) = objective.outputs
    if name == "entropy":  # `me` falls with it
        slope = -slope
    needs_reference = objective.reference == "logp"
    if needs_reference and ref_logp is None:
        raise ValueError(f"{objective.name} needs ref_logp, the frozen reference's logp per token; got None")
    share = torch.ones(mask.shape, dtype=torch.float32, device=mask.device, requires_grad=True)
    inputs = TokenInputs({name: share}, sequence_ids=sequence_ids, num_sequences=num_sequences, mask=mask)
    layout = Layout.of(inputs, share, name, "")
    with torch.enable_grad():
        total = reduce_tokens(share, layout, objective.reduction, count)
    (weights,) = torch.autograd.grad(total, share)
    rule = rule_of(objective.options)
    floor = None
    if needs_reference and ref_logp is not None:
        floor = rule.beta * layout.fill(ref_logp.detach().float())
        if objective.options["epsilon"] > 0:
            floor = torch.logaddexp(floor, torch.full_like(floor, math.log(objective.options["epsilon"])))
    return {"weights": {name: slope * weights}, "rule": rule, "floor": floor}
