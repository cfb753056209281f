"""What an objective says of itself, tried on four tokens (or sequences): a loss each, slope times rule its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..ops.contract import TokenRule
from .definition import REFERENCE, WIDE, Options, Variant

LOGP = (-0.01, -0.4, -2.0, -7.0)
Differentiate = Callable[[Callable[[Tensor], Any], Tensor, Tensor], Tensor]


def sigmoid_floor(ref_logp: Tensor, beta: float, epsilon: float = 0.0) -> Tensor:
    """log(p°^beta + epsilon), without ever leaving log space."""
    floor = not_infinite(beta * ref_logp)
    return torch.logaddexp(floor, torch.full_like(floor, math.log(epsilon))) if epsilon > 0 else floor


def not_infinite(ref_logp: Tensor) -> Tensor:
    """What is impossible for the reference, as what is all but impossible: from a model's own p = 0 it is far."""
    return ref_logp.clamp_min(torch.finfo(ref_logp.dtype).min)


def without_both(against: Tensor, wanted_logp: Tensor, other_logp: Tensor) -> Tensor:
    """`against`, but 0 where both texts have p = 0: there only what is wanted is still to be learned."""
    return torch.where((wanted_logp == -torch.inf) & (other_logp == -torch.inf), 0.0, against)


def gained_over(wanted_logp: Tensor, answer_logp: Tensor, wanted_ref_logp: Tensor, answer_ref_logp: Tensor) -> Tensor:
    """(log p_w - log p°_w) - (log p_l - log p°_l)."""
    lost = answer_logp - not_infinite(answer_ref_logp)
    return (wanted_logp - not_infinite(wanted_ref_logp)) - without_both(lost, wanted_logp, answer_logp)


def check_definition(name: str, preset: str, level: str, variant: Variant) -> None:
    """Raises ValueError for a function that gives no loss a token (or sequence) and for a wrong slope or rule.

    Slopes of the package itself are left to their first use, and to tests: what differentiates here takes a second or
    more to import.
    """
    options = {key: option.default for key, option in variant.options.items()}
    with on_the_side():
        loss = loss_of(name, preset, variant, options, *trial_values(variant))
    if not isinstance(loss, Tensor) or loss.shape != (len(LOGP),):
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"{name}, preset={preset!r}: needs to return the loss of each {level}, ({len(LOGP)},) for four, got {came}"
        )
    if variant.slope is not None and not variant.function.__module__.startswith(f"{__package__}."):
        check_gradient(name, preset, variant, options, in_forward_mode)


def in_forward_mode(function: Callable[[Tensor], Any], values: Tensor, direction: Tensor) -> Tensor:
    """Where an objective is registered: a process may fork after that, and autograd's engine must not be running."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(values, direction))).tangent
    return torch.zeros_like(values) if tangent is None else tangent


def by_autograd(function: Callable[[Tensor], Any], values: Tensor, direction: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = values.clone().requires_grad_()
        return torch.autograd.grad((direction * function(leaf)).sum(), leaf)[0]


def check_gradient(
    name: str, preset: str, variant: Variant, options: Options, differentiate: Differentiate = by_autograd
) -> None:
    """Raises ValueError unless slope times rule is d(loss of a token)/d(statistic)."""
    statistic = next(each.name for each in variant.statistics if each.name != "ref_logp")
    is_logp, needs_reference = statistic == "logp", any(each.name == "ref_logp" for each in variant.statistics)
    with on_the_side():
        values, ref_logp = trial_values(variant)
        direction = torch.arange(1.0, 1.0 + len(LOGP), dtype=torch.float64)
        gradient = differentiate(lambda x: loss_of(name, preset, variant, options, x, ref_logp), values, direction)
        try:
            rule = variant.token_rule(options)
        except Exception as error:
            raise ValueError(f"{name}, preset={preset!r}: its rule fails for {dict(options)}: {error!r}") from error
        if not isinstance(rule, TokenRule):
            raise ValueError(f"{name}, preset={preset!r}: its rule needs to give a TokenRule, got {rule!r}")
        floor = sigmoid_floor(ref_logp, rule.beta, options.get("epsilon", 0.0)) if needs_reference else None
        wrong = rule != TokenRule() and (not is_logp or (rule.beta > 0 and floor is None))
        factor = rule(values, floor) if is_logp and not wrong else torch.ones_like(values)
        claimed = direction * (variant.slope or 0.0) * factor
    if wrong or not torch.allclose(claimed, gradient, rtol=1e-6, atol=1e-12):
        raise ValueError(
            f"{name}, preset={preset!r}: slope={variant.slope} and rule={rule} need to be "
            f"d(loss of a token)/d({statistic}), for {dict(options)}: {(gradient / direction).tolist()} where it is "
            f"differentiated, got {(claimed / direction).tolist()}"
        )


def trial_values(variant: Variant) -> tuple[Tensor, Tensor]:
    """The model's statistic, whichever it is, and the reference's log-probabilities, (4,) float64 each."""
    logp = torch.tensor(LOGP, dtype=torch.float64)
    return logp if any(each.name == "logp" for each in variant.statistics) else -logp, logp.flip(0) - 0.3


def loss_of(name: str, preset: str, variant: Variant, options: Options, values: Tensor, ref_logp: Tensor) -> Any:
    """What the function returns. Raises ValueError with what it raises."""
    tensors = [
        tensor.unsqueeze(-1) if each.name in WIDE else tensor
        for each in variant.statistics
        for tensor in [ref_logp if each.name in REFERENCE else values]
    ]
    context = {
        "vocab_size": 50,
        "num_tokens": torch.arange(1, 1 + len(LOGP)),
        "num_positions": 9,
        "inverse_length": torch.tensor(0.3),
        "labelled": torch.ones(len(LOGP), dtype=torch.bool),
    }
    try:
        told = {variant.prefix(batch) + key: context[key] for batch, key in variant.context}
        return variant.function(*tensors, **options, **told)
    except Exception as error:
        raise ValueError(f"{name}, preset={preset!r}: fails on four tokens for {dict(options)}: {error!r}") from error


@contextmanager
def on_the_side() -> Iterator[None]:
    """Whatever the caller's default device and grad mode."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        yield
