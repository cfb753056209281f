"""Which layers have a ghost norm rule, and what it is: the parts of the gradients of a layer's own parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.ghost import OuterSum

# (parameter, its part: of a matrix an OuterSum, of a vector a function that makes its gradient by position, (B, T, H))
Parts = Iterator[tuple[Any, OuterSum | Callable[[], Tensor]]]


def linear_parts(module: Any, a: Tensor, b: Tensor) -> Parts:
    yield module.weight, OuterSum(b, a)
    yield module.bias, lambda: b


def conv1d_parts(module: Any, a: Tensor, b: Tensor) -> Parts:
    yield module.weight, OuterSum(a, b)
    yield module.bias, lambda: b


def embedding_parts(module: Any, ids: Tensor, b: Tensor) -> Parts:
    if module.padding_idx is not None:
        b = b * (ids != module.padding_idx).unsqueeze(-1)
    yield module.weight, OuterSum(ids, b)


def norm_parts(module: Any, x: Tensor, b: Tensor) -> Parts:
    yield module.weight, lambda: wide(b) * normalised(module, wide(x))
    yield getattr(module, "bias", None), lambda: b


def rule_of(module: nn.Module) -> Callable[[Any, Tensor, Tensor], Parts] | None:
    """What gives the parts of a module's own parameters; None for a module without, or one that no rule covers."""
    kind, own = type(module), {name: p.dim() for name, p in module.named_parameters(recurse=False)}
    if not own.keys() <= {"weight", "bias"} or "weight" not in own or own.get("bias", 1) != 1:
        return None
    if kind.forward is nn.Linear.forward:
        return linear_parts
    if kind.forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return embedding_parts
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return conv1d_parts
    # Its first input tells whether it is affine; those of channels, of axis 1, have a shape of their own.
    if (
        kind.__name__.endswith("Norm")
        and own["weight"] == 1
        and not isinstance(module, nn.GroupNorm | nn.SyncBatchNorm)
    ):
        return norm_parts
    return None


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
def check_gain(module: Any, x: Tensor, output: Tensor) -> None:
    """Raises TypeError unless output = gain * normalised(x) + bias, or (1 + gain) * normalised(x) + bias.

    Along the last axis, which gains and biases that are all different tell from others, and of each sample alone.
    """
    size, x, output = module.weight.numel(), by_position(x[:1], 1), by_position(output[:1], 1)
    ramp = torch.linspace(-1, 2, size, dtype=x.dtype, device=x.device)
    bias = getattr(module, "bias", None)
    if size == x.size(-1) and (bias is None or bias.shape == module.weight.shape):
        shift = 0 if bias is None else ramp.flip(0)
        pairs = [(affine(module, x, ramp, shift), affine(module, x, 0.0) + ramp * normalised(module, x) + shift)]
        # its own: of no other sample, of no other input
        own = affine(module, x, module.weight, 0 if bias is None else bias)
        pairs.append((own, output))
        if all(alike(actual.to(output.dtype), expected.to(output.dtype)) for actual, expected in pairs):
            return
    raise TypeError(
        f"{type(module).__name__}: its output is not affine in its gain along the last axis, sample by sample, so no "
        "ghost norm rule covers it; leave its parameters out by parameters="
    )


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
