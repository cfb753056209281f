"""What every sample of a batch does to every parameter, from one backward, without any gradient of a parameter.

With a (B, T, I) what a layer got and b (B, T, O) the gradient of the summed losses at its output, sample i's gradient
is a function of row i alone. A tap (`PerSample`) hands the parts of it to a collector, which says what becomes of them:
`SquaredNorms` makes inner products between positions t, s of a row (`SquaredNormsByParameter` tells parameters
apart), `Dots` multiplies with a direction R.

===================  ==============================  =========================================  ========================
parameter            gradient of sample i            its squared norm                           its product with R
===================  ==============================  =========================================  ========================
Linear (O, I)        sum_t b_t a_t'                  sum_ts (a_t . a_s)(b_t . b_s);             sum_t b_t' R a_t
                                                     of b'a if T (I + O) >= I O
Conv1D (I, O)        sum_t a_t b_t'                  the same                                   sum_t a_t' R b_t
Embedding (V, H)     sum_t onehot(x_t) b_t'          sum_ts [x_t = x_s] b_t . b_s               sum_t b_t . R[x_t]
gain of a norm (H,)  sum_t b_t * xhat_t              of the vector                              of the vector
bias (O,)            sum_t b_t                       of the vector                              of the vector
used several times   the sum over its uses           all positions of all uses together: for a  the sum over its uses
                                                     head tied to the embedding
                                                     2 sum_st b^head_s[x_t] (h_s . b^emb_t)
                                                     is added
===================  ==============================  =========================================  ========================

Inner products are `ops.ghost_dot`'s and norms of b'a float32 products (float64 for float64 models), sums over positions
float64, in a fixed order.
(Goodfellow 2015, arXiv:1510.01799; the form over positions: Li et al. 2022, arXiv:2110.05679.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from ..distributed import is_sharded
from ..ops.ghost import OuterSum, ghost_dot
from ..ops.parameters import canonical
from ..ops.products import wide_product
from ..ops.segment_dot import segment_dot
from .layers import by_position, check_gain, rule_of

T_co = TypeVar("T_co", covariant=True)


# ---- collectors: what becomes of the parts of gradients --------------------------------------------------------------


class Collector(Protocol[T_co]):
    """What a tap brings of one batch of B samples, by parameter name; a tied parameter has its first one."""

    def expect(self, name: str) -> None:
        """In the forward: one more use of a matrix, which `matrix` may bring in the backward."""

    def matrix(self, name: str, use: OuterSum) -> None:
        """One use's part of the gradient: sum_t left_t right_t' of every sample."""

    def vector(self, name: str, gradients: Tensor) -> None:
        """(B, H) float64: one use's part of a gain's or a bias's gradient."""

    def result(self, num_samples: int, device: torch.device) -> T_co:
        """After the backward. device: of the loss."""


class SquaredNormsByParameter:
    """Parameter -> (B,) float64: every sample's squared norm of its gradient, of parameters that the loss reaches."""

    def __init__(self) -> None:
        self.expected: dict[str, int] = {}
        self.waiting: dict[str, list[OuterSum]] = {}  # uses of matrices that wait for the others of their matrix
        self.vectors: dict[str, Tensor] = {}
        self.squared: dict[str, Tensor] = {}

    def expect(self, name: str) -> None:
        self.expected[name] = self.expected.get(name, 0) + 1

    def matrix(self, name: str, use: OuterSum) -> None:
        uses = self.waiting.setdefault(name, [])
        uses.append(use)
        if len(uses) == self.expected[name]:
            self._finish(name, self.waiting.pop(name))

    def vector(self, name: str, gradients: Tensor) -> None:
        self.vectors[name] = self.vectors[name] + gradients if name in self.vectors else gradients

    def result(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        for name, uses in self.waiting.items():  # those of which another use led nowhere
            self._finish(name, uses)
        for name, gradients in self.vectors.items():
            self._add(name, gradients.square().sum(1))
        return self.squared

    def _finish(self, name: str, uses: list[OuterSum]) -> None:
        for i, use in enumerate(uses):
            self._add(name, squared_norm(use))
            for other in uses[:i]:
                self._add(name, 2 * ghost_dot(use, other))

    def _add(self, name: str, squared: Tensor) -> None:
        self.squared[name] = self.squared[name] + squared if name in self.squared else squared


class SquaredNorms:
    """(B,) float64: every sample's squared gradient norm, over all parameters."""

    def __init__(self) -> None:
        self.parts = SquaredNormsByParameter()
        self.expect, self.matrix, self.vector = self.parts.expect, self.parts.matrix, self.parts.vector

    def result(self, num_samples: int, device: torch.device) -> Tensor:
        squared = self.parts.result(num_samples, device).values()
        return (
            torch.stack([*squared]).sum(0) if squared else torch.zeros(num_samples, dtype=torch.float64, device=device)
        )


class Dots:
    """Parameter -> (B,) float64: its gradient of every sample times a direction, of parameters that the loss reaches.

    directions: by name, for all parameters that count. A forward-size product a layer.
    """

    def __init__(self, directions: Mapping[str, Tensor]):
        self.directions = directions
        self.dots: dict[str, Tensor] = {}

    def expect(self, name: str) -> None:
        pass  # uses add up: none waits for another

    def matrix(self, name: str, use: OuterSum) -> None:
        direction = self.directions[name]
        if use.one_hot:
            pairs = zip(use.right, direction[use.left], strict=True)
        else:
            products = wide_product(use.right.flatten(0, 1), direction.mT).view(use.left.shape)
            pairs = zip(use.left, products, strict=True)
        self._add(name, segment_dot([*pairs]).dot)

    def vector(self, name: str, gradients: Tensor) -> None:
        self._add(name, gradients @ self.directions[name].double())

    def result(self, num_samples: int, device: torch.device) -> dict[str, Tensor]:
        return self.dots

    def _add(self, name: str, dots: Tensor) -> None:
        self.dots[name] = self.dots[name] + dots if name in self.dots else dots


def squared_norm(use: OuterSum) -> Tensor:
    """(B,) float64: ||sum_t left_t right_t'||^2, by whichever way multiplies less."""
    if not use.one_hot:
        p, d, length = use.left.size(-1), use.right.size(-1), use.left.size(1)
        if length * (p + d) >= p * d:
            sums = (wide_product(l.t(), r) for l, r in zip(use.left, use.right, strict=True))
            return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in sums]).square()
    return ghost_dot(use)


# ---- the tap ---------------------------------------------------------------------------------------------------------


class PerSample:
    """Context manager: inside, `collect` brings every sample's part of every parameter's gradient to a collector.

    Args:
        model: any module of Linear, Embedding, LayerNorm, RMSNorm (torch's, and classes like LlamaRMSNorm: one gain,
            named ...Norm) and transformers' Conv1D. Every sample must be one entry of dimension 0 of all inputs, and
            its loss must depend on no other sample. Gradient checkpointing of both kinds is fine.
        parameters: names of the parameters whose gradients count; default those with requires_grad.
        strict: a parameter that no rule covers raises; False leaves it out. `.uncovered` names them.

    Raises:
        TypeError: strict, and a parameter is uncovered; the message names them. A parameter that is a DTensor.
        ValueError: an unknown name, or nothing to differentiate.

    Inside, the model's parameters get no gradients; `requires_grad` is as it was on exit.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> with PerSample(layer) as tap:
    ...     tap.collect(2, lambda: layer(x).sum(), SquaredNorms())
    tensor([25.,  4.], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, parameters: Collection[str] | None = None, strict: bool = True):
        named = {canonical(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        if parameters is not None and (unknown := sorted(set(parameters) - set(named))):
            raise ValueError(f"parameters: the model has none of the name {unknown[0]!r}")
        names = {
            id(p): name
            for name, p in reversed(named.items())  # tied: the first name
            if (p.requires_grad if parameters is None else name in parameters)
        }
        if sharded := [name for name, p in named.items() if id(p) in names and is_sharded(p)]:
            raise TypeError(f"{sharded[0]}: is sharded; ghost norms need whole weights")
        if not names:
            raise ValueError("parameters: nothing to differentiate; name some, or set requires_grad")
        self._rules = {module: rule for module in model.modules() if (rule := rule_of(module)) is not None}
        covered = {id(p) for module in self._rules for p in module.parameters(recurse=False)}
        self.uncovered = [name for key, name in reversed(names.items()) if key not in covered]
        if strict and self.uncovered:
            more = f" and {len(self.uncovered) - 3} more" if len(self.uncovered) > 3 else ""
            raise TypeError(
                f"{', '.join(self.uncovered[:3])}{more}: no ghost norm rule covers it (Linear, Embedding, LayerNorm, "
                "RMSNorm, Conv1D); leave it out by parameters= or strict=False"
            )
        self._names = {key: name for key, name in names.items() if key in covered}
        self._model, self._checked = model, set[nn.Module]()
        self._hooks: list[RemovableHandle] = []
        self._trainable: list[tuple[nn.Parameter, bool]] = []
        self._anchor = torch.empty(0, requires_grad=True)  # through it the first layer's output gets a graph
        self._batch: _Batch | None = None

    def __enter__(self) -> PerSample:
        self._trainable = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in self._trainable:
            # Frozen while its module runs: no weight gradient is computed. Outside of it, a use that no rule sees
            # would bring a gradient here.
            name = self._names.get(id(parameter))
            parameter.requires_grad_(name is not None)
            if name is not None:
                self._hooks.append(parameter.register_hook(partial(leak, name)))
        for module in self._rules:
            self._hooks.append(module.register_forward_pre_hook(lambda m, _: freeze(m)))
            # First, so that it sees the layer's own output: what other hooks make of it is another function's.
            watch = module.register_forward_hook(self._watch, with_kwargs=True, always_call=True, prepend=True)
            self._hooks.append(watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, was in self._trainable:
            parameter.requires_grad_(was)
        self._hooks, self._trainable, self._batch = [], [], None

    def collect(self, num_samples: int, loss: Callable[[], Tensor], collector: Collector[T_co]) -> T_co:
        """Runs `loss`, a forward that returns the sum of the samples' losses, and its backward; the result collected.

        collector: a new one each time. Raises RuntimeError for a parameter used outside of its layer's forward,
        ValueError for a layer whose input is not one entry a sample, TypeError for a norm that is not affine in its
        gain.
        """
        batch = self._batch = _Batch(num_samples, collector)
        try:
            with torch.enable_grad():
                total = loss()
            batch.in_backward = True  # checkpointing runs layers again in there
            if num_samples:  # none has no graph either
                total.backward()
            return collector.result(num_samples, total.device)
        finally:
            self._batch = None

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The layer's output, its gradient watched. Without an output (an exception is on its way) just thaws."""
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            parameter.requires_grad_(id(parameter) in self._names)
        if not isinstance(output, Tensor):
            return output
        if self._batch is None:
            raise RuntimeError("PerSample: inside the with block layers run within collect(..., loss) only")
        batch, (x, *_) = self._batch, (*args, *kwargs.values())
        if output.numel() == 0:
            return output
        if output.size(0) != batch.num_samples and batch.num_samples > 1:
            if output.size(0) != 1:
                name = next(name for name, other in self._model.named_modules() if other is module)
                raise ValueError(
                    f"{name}: needs {batch.num_samples} samples in dimension 0, got an output of shape "
                    f"{tuple(output.shape)}; leave its parameters out by parameters="
                )
            # one for all, such as position embeddings: a row each, so that gradients stay apart
            x, output = (tensor.expand(batch.num_samples, *tensor.shape[1:]) for tensor in (x, output))
        weight = own["weight"]
        if weight.dim() == 2:
            if not batch.in_backward and id(weight) in self._names:
                batch.collector.expect(self._names[id(weight)])
        elif module not in self._checked:
            check_gain(module, x.detach(), output.detach())
            self._checked.add(module)
        return _Watch.apply(output, self._anchor, partial(self._bring, batch, module), x.detach())

    def _bring(self, batch: _Batch, module: nn.Module, gradients: Tensor, x: Tensor) -> None:
        """The parts of a layer's gradients, for those of its parameters that count."""
        b = by_position(gradients, batch.num_samples)
        a = by_position(x, batch.num_samples) if x.is_floating_point() else x.reshape(len(b), -1)
        for parameter, part in self._rules[module](module, a, b):
            name = self._names.get(id(parameter))
            if name is None:
                continue
            if isinstance(part, OuterSum):
                batch.collector.matrix(name, part)
            else:
                batch.collector.vector(name, part().sum(1, dtype=torch.float64))


class _Batch:
    def __init__(self, num_samples: int, collector: Collector[Any]):
        self.num_samples, self.collector, self.in_backward = num_samples, collector, False


class _Watch(torch.autograd.Function):
    """The identity; its backward brings the gradient and what was saved. Checkpointing may drop what is saved."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, bring: Callable[..., None], saved: Tensor) -> Tensor:
        ctx.bring = bring
        ctx.save_for_backward(saved)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.bring(grad, *ctx.saved_tensors)
        return grad, None, None, None


def freeze(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)


def leak(name: str, gradient: Tensor) -> None:
    raise RuntimeError(
        f"{name}: is used outside of its layer's forward, where no ghost norm rule sees it; leave it out by parameters="
    )
