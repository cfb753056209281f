"""The contract every backend of the token statistics keeps: names, shapes, dtypes, and the checks at the border.

A row is one target position: logits x of size V, a target id t, and optionally the logits r of a frozen reference.
With z = softcap * tanh(x / softcap) / temperature, p = softmax(z), q = softmax(r likewise), logp_j = log p_j:

===========  =======================================================  =================================
output       value                                                    d / dz_j
===========  =======================================================  =================================
logp         log p_t                                                  [j=t] - p_j
log_nll      log(-log p_t)                                            (p_j - [j=t]) / (-log p_t)
entropy      H = -sum_j p_j logp_j   (nats)                           -p_j (logp_j + H)
variance     sum_j p_j logp_j^2 - H^2                                 none
kl_pq        KL(p || q), current against reference                    p_j (logp_j - logq_j - KL)
kl_qp        KL(q || p), reference against current                    p_j - q_j
uniform_ce   -(1/V) sum_j logp_j                                      p_j - 1/V
lse          log sum_j e^z_j (its square is the z-loss)               p_j
greedy       argmax_j z_j == t (the lowest index wins a tie)          none
topk         sum_{j in top k} b_j logp_j, b = p renormalised there    b_j - p_j   (b is constant)
===========  =======================================================  =================================

The mean of z over the vocabulary is lse - uniform_ce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

OUTPUTS = ("logp", "log_nll", "entropy", "variance", "kl_pq", "kl_qp", "uniform_ce", "lse", "greedy", "topk")
NEEDS_REFERENCE = frozenset({"kl_pq", "kl_qp"})
NO_GRADIENT = frozenset({"variance", "greedy"})
MAX_K = 256  # lanes the kernels set apart
SAVED = 5  # scalars a row keeps for backward: max, log sum, log-odds, reference max, reference log sum
NO_INDEX = -(2**31)  # an ignore_index that is nowhere: no position is looked for
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Options:
    """What a call asks for, apart from its tensors. `outputs` keeps the order of `OUTPUTS`."""

    outputs: tuple[str, ...] = ("logp",)
    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    k: int = 20

    @property
    def bits(self) -> int:
        """`outputs` as a bit mask, bit i for OUTPUTS[i]."""
        return sum(1 << OUTPUTS.index(name) for name in self.outputs)

    def flat(self) -> tuple[int, float, float, int, int]:
        """As an op's schema has them."""
        return self.bits, self.temperature, self.softcap or 0.0, self.ignore_index, self.k

    @staticmethod
    def of(bits: int, temperature: float, softcap: float, ignore_index: int, k: int) -> Options:
        outputs = tuple(name for i, name in enumerate(OUTPUTS) if bits >> i & 1)
        return Options(outputs, temperature, softcap or None, ignore_index, k)


@dataclass(frozen=True)
class TokenRule:
    """What multiplies the weight of a token's logp, held constant: p^alpha (1 - p)^gamma 2 sigmoid(beta logp - floor).

    Without a floor there is no sigmoid. All 0: 1 (gradient ascent and descent); alpha: wga; alpha and gamma: satimp;
    beta with floor = beta logp of the reference: tnpo; and alpha: wtnpo.
    """

    alpha: float = 0.0
    gamma: float = 0.0
    beta: float = 0.0

    def __call__(self, logp: Tensor, floor: Tensor | None = None) -> Tensor:
        """The factor per token, shape of `logp`."""
        weight = power(logp, self.alpha)
        if self.gamma:
            weight = weight * (-torch.expm1(logp)).clamp_min(0.0).pow(self.gamma)
        return weight if floor is None else weight * 2.0 * torch.sigmoid(self.beta * logp - floor)


def power(logp: Tensor, alpha: float) -> Tensor:
    """p^alpha; of alpha = 0 it is 1 for p = 0 too."""
    return (alpha * logp).exp() if alpha else torch.ones_like(logp)


class TokenStats:
    """Per-token statistics as attributes, each shaped like `targets`; 0 (greedy: False) at ignored positions.

    Attributes: one per requested output (`.logp`, `.entropy`, ...) in float32 (float64 for float64 logits; `greedy` is
    bool); `.mask` (bool): the positions whose target is not `ignore_index`; `.declined`: {optimisation: why it was not
    used}, empty where all that were asked for, or are there by default, were.
    """

    def __init__(self, values: dict[str, Tensor], mask: Tensor, declined: dict[str, str] | None = None):
        self._values = values
        self.mask = mask
        self.declined = declined or {}

    def __getattr__(self, name: str) -> Tensor:
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        if name in OUTPUTS:
            raise AttributeError(f"{name!r} was not requested: outputs={tuple(values)}; add it to outputs=")
        raise AttributeError(f"TokenStats has no {name!r}; it has {(*values, 'mask', 'declined')}")

    def as_dict(self) -> dict[str, Tensor]:
        """The requested outputs by name."""
        return dict(self._values)

    def __repr__(self) -> str:
        return f"TokenStats(outputs={tuple(self._values)}, shape={tuple(self.mask.shape)})"


def unpack(
    stacked: Tensor, outputs: tuple[str, ...], mask: Tensor, declined: dict[str, str] | None = None
) -> TokenStats:
    """(len(outputs), ...) stacked statistics -> TokenStats."""
    values = dict(zip(outputs, stacked.unbind(0), strict=True))
    if "greedy" in values:
        values["greedy"] = values["greedy"].detach() > 0
    return TokenStats(values, mask, declined)


def make_options(
    outputs: str | Sequence[str],
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    k: int,
    has_reference: bool,
) -> Options:
    """Checks the arguments that are not tensors. Raises TypeError or ValueError."""
    names = names_of(outputs)
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or not names:
        raise ValueError(f"outputs={names!r}: needs one or more of {OUTPUTS}, got {unknown or 'none'}")
    missing = [name for name in names if name in NEEDS_REFERENCE]
    if missing and not has_reference:
        raise ValueError(f"outputs={names!r}: {missing[0]!r} needs reference=, got None")
    check_number("temperature", temperature, "a finite number > 0")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: needs a finite number > 0")
    if softcap is not None:
        check_number("softcap", softcap, "None or a finite number > 0")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap={softcap!r}: needs None or a finite number > 0")
    check_whole("ignore_index", ignore_index, "a whole number")
    check_whole("k", k, f"a whole number from 1 to {MAX_K}")
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k={k!r}: needs a whole number from 1 to {MAX_K}")
    ordered = tuple(name for name in OUTPUTS if name in names)
    return Options(ordered, float(temperature), None if softcap is None else float(softcap), int(ignore_index), int(k))


def names_of(outputs: str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(outputs, str | Iterable):
        raise TypeError(f"outputs={outputs!r}: needs one or more of {OUTPUTS}, got {type(outputs).__name__}")
    return (outputs,) if isinstance(outputs, str) else tuple(outputs)


def check_number(name: str, value: Any, needed: str) -> None:
    """Raises TypeError for what is no number, and for a tensor that requires grad: none would flow."""
    if type(value) is float or type(value) is int:  # nothing more in the hot path, and under torch.compile
        return
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1 or value.dtype == torch.bool:
            grad = ", which requires grad" if value.requires_grad else ""
            raise TypeError(f"{name}: needs {needed}, got a tensor of shape {tuple(value.shape)}{grad}")
    elif not is_real(value):
        raise TypeError(f"{name}={value!r}: needs {needed}, got {type(value).__name__}")


def check_whole(name: str, value: Any, needed: str) -> None:
    """Raises TypeError for what is no whole number, and ValueError for a number between two."""
    if type(value) is int:
        return
    check_number(name, value, needed)
    if not value % 1 == 0:
        raise ValueError(f"{name}={value!r}: needs {needed}")


def check_tensors(**given: Any) -> None:
    """Raises TypeError for what is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: needs a tensor, got {type(value).__name__}")


def check_lowered(lowered: float | Tensor, targets: Tensor, options: Options, has_reference: bool) -> Tensor | None:
    """One a target, or None where nothing is lowered. Raises TypeError or ValueError."""
    if isinstance(lowered, Tensor):
        if not lowered.is_floating_point():
            raise TypeError(f"lowered: needs a floating dtype, got {lowered.dtype}")
        if lowered.shape != targets.shape:
            raise ValueError(
                f"lowered: needs a number or the shape of targets {tuple(targets.shape)}, got {tuple(lowered.shape)}"
            )
        check_same_device("lowered", lowered, "targets", targets)
        less = lowered.detach()
    else:
        if not is_real(lowered) or not -math.inf < lowered < math.inf:
            raise ValueError(f"lowered={lowered!r}: needs a finite number, or a tensor shaped like targets")
        if lowered == 0:
            return None
        less = torch.full(targets.shape, float(lowered), dtype=torch.float64, device=targets.device)
    if not has_reference:
        raise ValueError("lowered: needs reference=, whose logits of the targets it lowers, got None")
    return None if NEEDS_REFERENCE.isdisjoint(options.outputs) else less


def is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def statistics_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def check_logits(logits: Tensor, targets: Tensor, reference: Tensor | None, options: Options) -> None:
    """Checks shapes, dtypes and devices of `token_stats`' tensors. Raises TypeError or ValueError."""
    check_tensors(logits=logits, targets=targets)
    if logits.dim() < 1 or logits.size(-1) < 1:
        raise ValueError(f"logits: needs shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    check_dtype("logits", logits)
    check_layout("logits", logits)
    check_targets(targets, logits.shape[:-1], "logits", logits)
    if logits.stride(-1) != 1 and logits.size(-1) > 1 and logits.numel() > 0:
        raise ValueError(
            f"logits: the last dimension needs stride 1, got strides {logits.stride()}; call .contiguous()"
        )
    if reference is not None:
        check_tensors(reference=reference)
        check_layout("reference", reference)
        if reference.shape != logits.shape:
            raise ValueError(
                f"reference: needs the shape of logits {tuple(logits.shape)}, got {tuple(reference.shape)}"
            )
        check_dtype("reference", reference)
        check_same_device("reference", reference, "logits", logits)
    if "topk" in options.outputs and options.k > logits.size(-1):
        raise ValueError(f"k={options.k}: needs at most V={logits.size(-1)}")


def check_targets(targets: Tensor, shape: torch.Size, owner: str, like: Tensor) -> None:
    if targets.shape != shape:
        raise ValueError(
            f"targets: needs shape {tuple(shape)} (that of {owner} without its last), got {tuple(targets.shape)}"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: needs int64 or int32, got {targets.dtype}")
    check_same_device("targets", targets, owner, like)


def check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: needs bfloat16, float16, float32 or float64, got {tensor.dtype}")


def check_layout(name: str, tensor: Tensor) -> None:
    """Kernels read addresses: of what lies elsewhere than it seems to, they would read something else."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: needs a dense tensor, got {tensor.layout}")
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise ValueError(f"{name}: is a lazily negated view; call .resolve_neg()")


def shares_memory(tensor: Tensor) -> bool:
    """Whether two elements may lie at one address: where a step of some dimension does not pass all of those below."""
    reach = 0
    for stride, size in sorted((step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False


def check_same_device(name: str, tensor: Tensor, owner: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: needs the device of {owner}, {like.device}, got {tensor.device}")


def check_range(targets: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Raises IndexError with the first row whose target is outside [0, vocabulary). On a GPU it would be a sync."""
    while torch._C._functorch.is_batchedtensor(targets):  # vmap takes no decisions
        targets = torch._C._functorch.get_unwrapped(targets)
    flat = targets.reshape(-1)
    bad = ((flat < 0) | (flat >= vocabulary)) & (flat != ignore_index)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise IndexError(
            f"targets: row {row} holds {int(flat[row])}, needs 0 <= target < {vocabulary} "
            f"or ignore_index={ignore_index}"
        )
