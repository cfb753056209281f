"""What `pyunlearn.value_and_grad` needs of a token-separable objective: its gradient per token in closed form.

A token's gradient is its share of the reduction (1/n for token_mean, ...) times the slope of the objective at the
token, a constant, times a `TokenRule` where it depends on the token's own logp. Both are given to `register`, or to
`register_preset` for another formula.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import DTYPES
from .closed_form import check_gradient, sigmoid_floor
from .definition import Variant
from .objective import DEFINITIONS, HAD, Objective
from .reduction import Count, Layout, Selection, TokenInputs, check_matches, reduce_tokens


def one_pass(
    objective: Objective,
    mask: Tensor,
    ref_logp: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    count: Count | None = None,
) -> dict[str, Any]:
    """weights, rule and floor (and a temperature other than 1) for `pyunlearn.value_and_grad`: its d(logits) is then
    that of the objective's loss.

    Args:
        objective: as `get` gives it, one that is registered with a slope (and a rule).
        mask: (B, T) or flat (N,) bool, the tokens that count; shaped like the targets.
        ref_logp: the same shape, the frozen reference's logp, for `tnpo` and `wtnpo`.
        sequence_ids, num_sequences, count: as in the objective itself.

    Raises: ValueError or TypeError naming what does not fit, that tokens are selected, that the objective (or its
        preset) has no slope, or that slope and rule are not its gradient for these options.

    >>> from pyunlearn import objectives, value_and_grad
    >>> logits, targets = torch.zeros(1, 2, 4), torch.tensor([[1, 2]])
    >>> wga = objectives.get("wga", alpha=1.0)
    >>> stats, d_logits = value_and_grad(logits, targets, **one_pass(wga, torch.tensor([[True, True]])))
    >>> d_logits[0, 0].tolist()  # p / 2 at the target's lane, times 1 - p
    [-0.03125, 0.09375, -0.03125, -0.03125]
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: needs an Objective, as objectives.get gives it, got {type(objective).__name__}")
    variant = objective.variant
    if variant.slope is None:
        able = ", ".join(name for name in DEFINITIONS if DEFINITIONS[name].variant(None)[1].slope is not None)
        raise ValueError(
            f"{objective.name}, preset={objective.preset!r}: needs a token-separable objective such as {able}; one of "
            "your own becomes one by slope=, d(loss of a token)/d(statistic), and rule= where it is registered"
        )
    if objective.selection != Selection():
        raise ValueError(f"{objective.name}: needs keep=1 and skip=0: which tokens count is known after a first pass")
    check_options(objective, variant)
    (name,) = objective.outputs
    needs_reference = objective.reference == "logp"
    if needs_reference and ref_logp is None:
        had = HAD["ref_logp"]
        raise ValueError(
            f"{objective.name} needs ref_logp, the frozen reference's logp per token; got None; it is {had}"
        )
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: needs a bool tensor, shaped like the targets, got {type(mask).__name__}")
    share = torch.ones(mask.shape, dtype=torch.float64, device=mask.device, requires_grad=True)
    inputs = TokenInputs({name: share}, sequence_ids=sequence_ids, num_sequences=num_sequences, mask=mask)
    layout = Layout.of(inputs, share, name, "")
    with torch.enable_grad():
        total = reduce_tokens(share, layout, objective.reduction, count)
    (weights,) = torch.autograd.grad(total, share)
    rule = variant.token_rule(objective.options)
    floor = None
    if needs_reference and ref_logp is not None:
        check_matches("ref_logp", ref_logp, "mask", share, DTYPES)
        floor = sigmoid_floor(layout.fill(ref_logp.detach().double()), rule.beta, objective.options.get("epsilon", 0.0))
    scaled = {} if objective.temperature == 1 else {"temperature": objective.temperature}
    return {"weights": {name: variant.slope * weights}, "rule": rule, "floor": floor, **scaled}


@lru_cache(maxsize=256)
def check_options(objective: Objective, variant: Variant) -> None:
    """`check_gradient` for other options than the defaults, which are checked where the objective is registered."""
    check_gradient(objective.name, objective.preset, variant, objective.options)
