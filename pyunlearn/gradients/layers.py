"""Which layers have a ghost norm rule, and what it is: the parts of the gradients of a layer's own parameters."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.ghost import OuterSum

# (parameter, its part: of a matrix an OuterSum, of a vector a function that makes its gradient by position, (B, T, H))
Parts = Iterator[tuple[Any, OuterSum | Callable[[], Tensor]]]


class NoRule(Exception):
    """Parameters that no rule covers after all; none: a layer that takes the tokens of all samples as one list."""

    def __init__(self, *names: str):
        super().__init__(*names)
        self.names = names


class Rule(ABC):
    """Of one layer. `reads` makes of a forward what `parts` is to be given; None where the forward is not what the rule
    is for, which the first one tells. `parts` takes it by position, (B, T, I), and the gradient at the output."""

    def __init__(self, module: Any):
        self.module, self.proven = module, False

    def reads(self, output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        x = next(iter((*args, *kwargs.values())))
        self.proven = self.proven or self.fits(x.detach(), output.detach())
        return x if self.proven else None

    def fits(self, x: Tensor, output: Tensor) -> bool:
        return True

    @abstractmethod
    def parts(self, a: Tensor, b: Tensor) -> Parts: ...


class LinearRule(Rule):
    """nn.Linear, and subclasses that multiply in another way."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        own = type(self.module).forward is nn.Linear.forward
        return own or alike(output, F.linear(x, self.module.weight, self.module.bias).detach())

    def parts(self, a: Tensor, b: Tensor) -> Parts:
        yield self.module.weight, OuterSum(b, a)
        yield self.module.bias, lambda: b


class Conv1DRule(Rule):
    def parts(self, a: Tensor, b: Tensor) -> Parts:
        yield self.module.weight, OuterSum(a, b)
        yield self.module.bias, lambda: b


class EmbeddingRule(Rule):
    """nn.Embedding, and subclasses that look up other rows than their input says, or scale what they find."""

    scale: float = 1.0

    def reads(self, output: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        if type(self.module).forward is nn.Embedding.forward:
            return super().reads(output, args, kwargs)
        with torch.no_grad(), Lookups(self.module.weight) as lookups:
            type(self.module).forward(self.module, *args, **kwargs)
        if len(lookups.found) != 1:
            return None
        ((ids, rows),) = lookups.found
        if not self.proven:
            square = rows.double().square().sum()
            self.scale = float((output.detach().double() * rows.double()).sum() / square) if square else 1.0
            self.proven = alike(output.detach(), self.scale * rows)
        return ids if self.proven else None

    def parts(self, ids: Tensor, b: Tensor) -> Parts:
        if self.module.padding_idx is not None:
            b = b * (ids != self.module.padding_idx).unsqueeze(-1)
        yield self.module.weight, OuterSum(ids, b if self.scale == 1.0 else self.scale * b)


class NormRule(Rule):
    """LayerNorm, RMSNorm and their like: output = gain * normalised(x) + bias, or (1 + gain) * normalised(x) + bias."""

    def fits(self, x: Tensor, output: Tensor) -> bool:
        return affine_in_gain(self.module, x, output)

    def parts(self, x: Tensor, b: Tensor) -> Parts:
        yield self.module.weight, lambda: wide(b) * normalised(self.module, wide(x))
        yield getattr(self.module, "bias", None), lambda: b


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module's own parameters; None for a module without, or one that no rule covers."""
    kind, own = type(module), {name: p.dim() for name, p in module.named_parameters(recurse=False)}
    if not own.keys() <= {"weight", "bias"} or "weight" not in own or own.get("bias", 1) != 1:
        return None
    if isinstance(module, nn.Linear):
        return LinearRule(module)
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is not None or module.scale_grad_by_freq else EmbeddingRule(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return Conv1DRule(module)
    # Its first input tells whether it is affine; those of channels, of axis 1, have a shape of their own.
    if (
        kind.__name__.endswith("Norm")
        and own["weight"] == 1
        and not isinstance(module, nn.GroupNorm | nn.SyncBatchNorm)
    ):
        return NormRule(module)
    return None


class Lookups(TorchFunctionMode):
    """What is looked up in a weight inside: (ids, rows) of each time."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.found = weight, list[tuple[Tensor, Tensor]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.embedding and args[1] is self.weight:
            self.found.append((args[0], result))
        return result


@torch.no_grad()
def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies its gain with: the difference of its outputs for gains of one and zero, without bias."""
    return affine(module, x, 1.0) - affine(module, x, 0.0)


def affine(module: nn.Module, x: Tensor, gain: Tensor | float, bias: Tensor | float = 0.0) -> Tensor:
    """A norm's output with other parameters."""
    twin: Any = copy.copy(module)
    values = {"weight": gain, "bias": bias}
    own = module._parameters.items()
    twin._parameters = {n: None if p is None else torch.zeros_like(p) + values[n] for n, p in own}
    return type(module).forward(twin, x)


@torch.no_grad()
def affine_in_gain(module: Any, x: Tensor, output: Tensor) -> bool:
    """Whether output = gain * normalised(x) + bias, or (1 + gain) * normalised(x) + bias.

    Along the last axis, which gains and biases that are all different tell from others, and of each sample alone.
    """
    size, x, output = module.weight.numel(), by_position(x[:1], 1), by_position(output[:1], 1)
    ramp = torch.linspace(-1, 2, size, dtype=x.dtype, device=x.device)
    bias = getattr(module, "bias", None)
    if size != x.size(-1) or (bias is not None and bias.shape != module.weight.shape):
        return False
    shift = 0 if bias is None else ramp.flip(0)
    pairs = [(affine(module, x, ramp, shift), affine(module, x, 0.0) + ramp * normalised(module, x) + shift)]
    # its own: of no other sample, of no other input
    own = affine(module, x, module.weight, 0 if bias is None else bias)
    pairs.append((own, output))
    return all(alike(actual.to(output.dtype), expected.to(output.dtype)) for actual, expected in pairs)


def alike(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding."""
    eps = max(torch.finfo(dtype).eps for dtype in (expected.dtype, torch.float32))  # transformers' are float32 inside
    tolerance = 16 * eps * float(expected.abs().nan_to_num(0, 0, 0).max())
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


def by_position(x: Tensor, num_samples: int) -> Tensor:
    """(B, ..., d) -> (B, T, d)."""
    return x.reshape(num_samples, -1, x.size(-1))


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
