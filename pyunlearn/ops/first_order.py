"""The ops have first derivatives alone, and some none: what asks for more is refused, never given a silent zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SECOND = "pyunlearn's kernels have first derivatives alone: for a second one, token_stats(logits, ..., backend='eager')"
Gradients = tuple[Tensor | None, ...]


class _Refused(torch.autograd.Function):
    """The first `n` tensors as they are, and a graph from all of them on whose backward raises."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(SECOND)


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A Function's backward whose results raise RuntimeError when they are differentiated.

    autograd's once_differentiable does so where the upstream gradient itself requires grad. Under `create_graph=True`
    that of a sum does not, and the second derivative in the op's own inputs would be 0.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor) -> Gradients:
        second = torch.is_grad_enabled()  # create_graph
        inputs = [t for t in (*upstream, *ctx.saved_tensors) if t is not None and t.requires_grad] if second else []
        with torch.no_grad():
            results = backward(ctx, *upstream)
        if not second:
            return results
        made = [t for t in results if t is not None]
        given = iter(_Refused.apply(len(made), *made, *inputs))
        return tuple(None if t is None else next(given) for t in results)

    return wrapped


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where a forward-mode tangent would be dropped."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{op}: has no forward-mode derivative; token_stats(logits, ..., backend='eager') has one")


# ---- torch.func ------------------------------------------------------------------------------------------------------


def in_functions(op: str, backend: str = "", needs: str = "backend='eager'") -> bool:
    """Whether torch.func transforms what is called now. Raises RuntimeError under its grad and jvp, which go by the
    dispatcher's autograd: that of the eager backend alone goes there."""
    functions = () if torch.compiler.is_compiling() else torch._C._functorch.get_interpreter_stack() or ()
    kinds = torch._C._functorch.TransformType
    if backend != "eager" and any(function.key() in (kinds.Grad, kinds.Jvp) for function in functions):
        raise RuntimeError(f"{op}: torch.func's grad and jvp need {needs}; torch.autograd.grad takes every backend")
    return bool(functions)


def refuse_functions(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError for the tensors of torch.func's vmap, grad, ...: they have no memory of their own."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        raise RuntimeError(f"{op}: takes no tensors of torch.func's transforms; give it all of them at once, outside")


def owner(op: str, backend: str, *tensors: Tensor | None) -> str:
    """Who has the tensors' memory, so that the dispatcher must see the op; "" where they have it themselves."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if in_functions(op, backend):
        return "torch.func"
    if torch._C._len_torch_dispatch_stack() or any(t is not None and torch._is_functional_tensor(t) for t in tensors):
        return "a dispatch mode"
    return ""
