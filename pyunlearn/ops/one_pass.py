"""value_and_grad: statistics and d(logits) in one go, where the gradient per token is known from the token alone.

Logits are read from memory once and the gradient is written once, 2 N V of traffic: on the CPU the row stays in the
cache, on a GPU with thread block clusters (sm_90 and newer, backend "cuda") on chip. Everywhere else, and with a
reference or top k, it is the forward and the backward kernel, 3 N V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._declined import decline
from .backends import choose, kernels, native, why_eager
from .contract import (
    NO_GRADIENT,
    OUTPUTS,
    Options,
    TokenRule,
    TokenStats,
    check_logits,
    check_same_device,
    make_options,
    names_of,
    statistics_dtype,
    unpack,
)
from .first_order import in_functions, owner, refuse_tangents
from .from_logits import check_writable, forward, in_rows, stacked_stats
from .memory import empty

FACTOR_ONE = TokenRule()


def value_and_grad(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | Mapping[str, Tensor],
    rule: TokenRule = FACTOR_ONE,
    floor: Tensor | None = None,
    outputs: str | Sequence[str] | None = None,
    reference: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    k: int = 20,
    backend: str | None = None,
) -> tuple[TokenStats, Tensor]:
    """Statistics, and d(logits) of sum over tokens and outputs of sg(weight) * statistic.

    For every token-separable objective `pyunlearn.objectives.one_pass` gives weights, rule and floor.
    Nothing is recorded for autograd: pass the gradient on with `logits.backward(d_logits)`.

    Args:
        logits, targets, reference, temperature, softcap, ignore_index, k, backend: as in `token_stats`.
        weights: (...) the weight of each token's logp, or for several outputs by name, {"logp": ..., "entropy": ...}.
        rule: a further factor on logp's weight that depends on the token's own logp.
        floor: (...) for the rule's sigmoid, or None (no sigmoid).
        outputs: statistics to return; default those that have weights.
        inplace: write d(logits) into the memory of `logits`, which must not be used afterwards.

    Returns:
        (TokenStats, d_logits): d_logits has logits' shape and dtype and is 0 at ignored positions. Where two
        passes were made, `.declined["one pass"]` says why.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `token_stats`; the message names the argument.

    >>> logits = torch.zeros(1, 4, requires_grad=True)
    >>> stats, d_logits = value_and_grad(logits, torch.tensor([1]), torch.tensor([-1.0]))
    >>> stats.logp.tolist(), d_logits.tolist()
    ([-1.3862943649291992], [[0.25, -0.75, 0.25, 0.25]])
    """
    weights = by_name(weights)
    names = wanted(weights, outputs)
    options = make_options(names, temperature, softcap, ignore_index, k, reference is not None)
    check_logits(logits, targets, reference, options)
    check_weights(weights, rule, floor, targets)
    if inplace:
        check_writable("inplace=True", logits)
    in_functions("value_and_grad", needs="token_stats(logits, ..., backend='eager')")
    refuse_tangents("value_and_grad", logits)
    chosen = choose(backend, logits.device)
    declined = why_eager(logits.device) if backend is None and chosen == "eager" else {}

    shape = targets.shape
    source, targets, reference = in_rows(logits.detach(), targets, reference)
    ups, floor = per_token(weights, floor, options, targets.shape, statistics_dtype(logits))
    with torch.no_grad():
        out = source if inplace else None
        stats, d_logits, reason = at_once(source, targets, reference, ups, rule, floor, options, chosen, out)
    if reason:
        declined = {**declined, "one pass": decline("one pass", reason)}
    if inplace:
        torch.autograd.graph.increment_version(logits)
    mask = (targets != ignore_index).view(shape)
    stats = stats.view(len(options.outputs), *shape)
    return unpack(stats, options.outputs, mask, declined), d_logits.reshape(logits.shape)


def by_name(weights: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(weights, Tensor):
        return {"logp": weights}
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: needs a tensor shaped like targets, or tensors by output, got {weights!r}")
    return dict(weights)


def wanted(weights: Mapping[str, Tensor], outputs: str | Sequence[str] | None) -> tuple[str, ...]:
    """Outputs to return, and those that have weights."""
    names = tuple(weights) if outputs is None else names_of(outputs)
    return (*names, *weights)


def per_token(
    weights: Mapping[str, Tensor], floor: Tensor | None, options: Options, shape: torch.Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Upstream gradients (outputs, *shape), 0 where an output has no weight, and the floor."""

    def of(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).reshape(shape).contiguous()

    like = next(iter(weights.values())) if weights else torch.empty(shape)
    lines = [of(weights[n]) if n in weights else like.new_zeros(shape, dtype=dtype) for n in options.outputs]
    # a floor of -inf, the reference's p = 0, against -inf of the model's own would be NaN
    return torch.stack(lines), None if floor is None else of(floor).clamp_min(torch.finfo(dtype).min)


def at_once(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    ups: Tensor,
    rule: TokenRule,
    floor: Tensor | None,
    options: Options,
    backend: str,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, str]:
    """The statistics, d(logits), which is written into `out`, if there is one (it may be `logits`), and why two passes
    were made, or ""."""
    owned = owner("value_and_grad", backend, logits, targets, reference)
    reason = why_not(backend, reference, options) or ("the dispatcher sees two ops" if owned else "")
    if not reason:
        stats, d_logits = torch.empty_like(ups), new_like(logits) if out is None else out
        reason = native.value_and_grad(logits, targets, ups, rule, floor, options, stats, d_logits)
        if not reason:
            return stats, d_logits, ""
    rest = (rule, floor, options, backend, out, bool(owned))
    return *two_passes(logits, targets, reference, ups, *rest), reason


def why_not(backend: str, reference: Tensor | None, options: Options) -> str:
    """Why two passes are made whatever the device and the shapes, or ""."""
    if backend not in ("cpu", "cuda"):
        return f"backend {backend!r} has none"
    if reference is not None:
        return "a reference is read beside the logits"
    return "top k needs whole rows" if "topk" in options.outputs else ""


def two_passes(
    logits: Tensor,
    targets: Tensor,
    reference: Tensor | None,
    ups: Tensor,
    rule: TokenRule,
    floor: Tensor | None,
    options: Options,
    backend: str,
    out: Tensor | None,
    owned: bool,
) -> tuple[Tensor, Tensor]:
    """The statistics and d(logits), which is written into `out`, if there is one; it may be `logits`."""

    def upstream(stats: Tensor) -> Tensor:
        if "logp" not in options.outputs or (rule == FACTOR_ONE and floor is None):
            return ups
        line = options.outputs.index("logp")
        factor = rule(stats[line], floor)
        return torch.stack([up * factor if i == line else up for i, up in enumerate(ups)])

    if backend == "eager" or owned:
        flat = (*options.flat(), backend)
        if backend == "eager":
            stats, pull, *_ = torch.func.vjp(lambda x: stacked_stats(x, targets, reference, options, backend), logits)
            (grad,) = pull(upstream(stats))
        else:
            stats, *kept = torch.ops.pyunlearn.token_stats.default(logits, targets, reference, *flat)
            saved, *belief = kept
            rest = (stats, saved, logits, targets, reference, *belief, *flat)
            grad = torch.ops.pyunlearn.token_stats_backward.default(upstream(stats), *rest)
        return stats, grad if out is None else out.copy_(grad)
    out = new_like(logits) if out is None else out
    stats, saved, index, belief = forward(logits, targets, reference, options, backend)
    kernels(backend).backward(upstream(stats), stats, saved, logits, targets, reference, index, belief, options, out)
    return stats, out


def new_like(logits: Tensor) -> Tensor:
    return empty(logits.shape, logits.dtype, logits.device)


def check_weights(weights: Mapping[str, Tensor], rule: TokenRule, floor: Tensor | None, targets: Tensor) -> None:
    for name, weight in weights.items():
        if name not in OUTPUTS or name in NO_GRADIENT:
            able = tuple(n for n in OUTPUTS if n not in NO_GRADIENT)
            raise ValueError(f"weights: needs names of differentiable outputs {able}, got {name!r}")
        check_per_token(f"weights[{name!r}]", weight, targets)
    if not isinstance(rule, TokenRule):
        raise TypeError(f"rule: needs a TokenRule, got {type(rule).__name__}")
    if floor is not None:
        check_per_token("floor", floor, targets)
    if "logp" not in weights and (rule != FACTOR_ONE or floor is not None):
        raise ValueError(f"rule={rule}: needs a weight for 'logp', got weights for {tuple(weights)}")


def check_per_token(name: str, tensor: Tensor, targets: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name}: needs a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    if tensor.shape != targets.shape:
        raise ValueError(f"{name}: needs the shape of targets {tuple(targets.shape)}, got {tuple(tensor.shape)}")
    check_same_device(name, tensor, "targets", targets)
