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
anything else        of a backward of its own        of the gradient itself                     of the gradient itself
used several times   the sum over its uses           all positions of all uses together: for a  the sum over its uses
                                                     head tied to the embedding
                                                     2 sum_st b^head_s[x_t] (h_s . b^emb_t)
                                                     is added
===================  ==============================  =========================================  ========================

Where a parameter has no rule, or a layer takes the tokens of all samples as one list (mixtures of experts), each sample
goes through the model by itself: parameters with a rule have it there too, of the others the gradient is formed.

Inner products are `ops.ghost_dot`'s and norms of b'a float32 products (float64 for float64 models), sums over positions
float64, in a fixed order.
(Goodfellow 2015, arXiv:1510.01799; the form over positions: Li et al. 2022, arXiv:2110.05679.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from .._declined import decline
from ..distributed import is_sharded
from ..ops.ghost import OuterSum, ghost_dot
from ..ops.parameters import canonical
from ..ops.products import wide_product
from ..ops.segment_dot import segment_dot
from .layers import NoRule, by_position, rule_of
from .streamed import streamed

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T", Tensor, dict[str, Tensor])
SumOf = Callable[[slice], Tensor]  # of which samples -> the sum of their losses


# ---- collectors: what becomes of the parts of gradients --------------------------------------------------------------


class Collector(Protocol[T_co]):
    """What a tap brings of one batch of B samples, by parameter name; a tied parameter has its first one."""

    def expect(self, name: str) -> None:
        """In the forward: one more use of a matrix, which `matrix` may bring in the backward."""

    def matrix(self, name: str, use: OuterSum) -> None:
        """One use's part of the gradient: sum_t left_t right_t' of every sample."""

    def vector(self, name: str, gradients: Tensor) -> None:
        """(B, H) float64: one use's part of a gain's or a bias's gradient."""

    def whole(self, name: str, gradient: Tensor) -> None:
        """In the backward of a single sample: the gradient of a parameter that no rule covers."""

    def result(self, num_samples: int, device: torch.device) -> T_co:
        """After all that. device: of the loss."""


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

    def whole(self, name: str, gradient: Tensor) -> None:
        self._add(name, segment_dot([(gradient, gradient)]).dot)

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
        self.whole = self.parts.whole

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

    def whole(self, name: str, gradient: Tensor) -> None:
        self._add(name, segment_dot([(gradient, self.directions[name])]).dot)

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
        model: any module; `layers.rule_of` says of which layers a batch takes one backward. Every sample must be one
            entry of dimension 0 of all inputs, and its loss must depend on no other sample. Gradient checkpointing of
            both kinds is fine.
        parameters: names of the parameters whose gradients count; default those with requires_grad.

    Raises:
        TypeError: a parameter that is a DTensor. ValueError: an unknown name, nothing to differentiate, or a parameter
            without a rule whose post-accumulate-grad hooks its gradients would set off.

    Inside, the model's parameters get no gradients; `requires_grad` and `grad` are as they were on exit.

    declined: why each sample has a backward of its own, logged once; None while batches have one.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> with PerSample(layer) as tap:
    ...     tap.collect(2, lambda rows: layer(x[rows]).sum(), SquaredNorms)
    tensor([25.,  4.], dtype=torch.float64)
    """

    def __init__(self, model: nn.Module, parameters: Collection[str] | None = None):
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
        self.declined: str | None = None
        self._rules = {module: rule for module in model.modules() if (rule := rule_of(module)) is not None}
        self._model, self._names, self._whole = model, names, dict[str, nn.Parameter]()
        self._hooks: list[RemovableHandle] = []
        self._before: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self._anchor = torch.empty(0, requires_grad=True)  # through it the first layer's output gets a graph
        self._batch: _Batch | None = None
        ruled = {id(p) for module in self._rules for p in module.parameters(recurse=False)}
        if others := [name for key, name in reversed(names.items()) if key not in ruled]:
            self._without_rule(others)

    def __enter__(self) -> PerSample:
        self._before = [(p, p.requires_grad, p.grad) for p in self._model.parameters()]
        for parameter, _, _ in self._before:
            # Frozen while its module runs: no weight gradient is computed. Outside of it, a use that no rule sees
            # would bring a gradient here.
            name = self._names.get(id(parameter))
            parameter.requires_grad_(name is not None)
            parameter.grad = None
            if name is not None:
                self._hooks.append(parameter.register_hook(partial(self._leak, name)))
        for module in self._rules:
            self._hooks.append(module.register_forward_pre_hook(lambda m, _: self._freeze(m)))
            # First, so that it sees the layer's own output: what other hooks make of it is another function's.
            watch = module.register_forward_hook(self._watch, with_kwargs=True, always_call=True, prepend=True)
            self._hooks.append(watch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter, required, gradient in self._before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        self._hooks, self._before, self._batch = [], [], None

    def collect(self, num_samples: int, loss: SumOf, collector: Callable[[], Collector[T]]) -> T:
        """Runs `loss`, a forward that returns the sum of the losses of a slice of the samples, and its backward.

        For all samples at once, or for each; what has no rule after all shows in the first batch, which is run anew.
        collector: makes a new one. Returns its result, one entry a sample.
        """
        while True:
            try:
                if self.declined is None or num_samples < 2:
                    return self._run(num_samples, loss, slice(None), collector())
                each = [self._run(1, loss, slice(i, i + 1), collector()) for i in range(num_samples)]
                return joined(each)
            except NoRule as found:
                self._without_rule(found.names)

    def _without_rule(self, names: Collection[str]) -> None:
        """From now on each sample has a backward of its own, in which these parameters have gradients."""
        reason = "a layer takes the tokens of all samples as one list"
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            reason = f"no ghost norm rule covers {', '.join([*names][:3])}{more}"
        self.declined = self.declined or decline("one backward a batch", reason)
        named = {canonical(name): p for name, p in self._model.named_parameters(remove_duplicate=False)}
        for name in names:
            if named[name]._post_accumulate_grad_hooks:
                raise ValueError(f"{name}: has a post-accumulate-grad hook, which would be set off; remove it first")
            self._whole[name] = named[name]

    def _run(self, num_samples: int, loss: SumOf, rows: slice, collector: Collector[T]) -> T:
        batch = self._batch = _Batch(num_samples, collector)
        taken: set[str] = set()

        def take(name: str, gradient: Tensor) -> None:
            if name in taken:
                raise RuntimeError(f"{name}: its gradient comes in parts, needs checkpointing with use_reentrant=False")
            taken.add(name)
            collector.whole(name, gradient)

        try:
            with torch.enable_grad():
                total = loss(rows)
            batch.in_backward = True  # checkpointing runs layers again in there
            if num_samples:  # none has no graph either
                with streamed(self._whole, take):
                    total.backward()
            return collector.result(num_samples, total.device)
        finally:
            self._batch = None

    def _name(self, parameter: Tensor | None) -> str | None:
        """Of a parameter that counts and has a rule."""
        name = self._names.get(id(parameter))
        return None if name in self._whole else name

    def _freeze(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(self._names.get(id(parameter)) in self._whole)

    def _leak(self, name: str, gradient: Tensor) -> None:
        if name not in self._whole:
            raise NoRule(name)  # is used outside of its layer's forward, where no rule sees it

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The layer's output, its gradient watched. Without an output (an exception is on its way) just thaws."""
        own = dict(module.named_parameters(recurse=False))
        for parameter in own.values():
            parameter.requires_grad_(id(parameter) in self._names)
        if not isinstance(output, Tensor):
            return output
        if self._batch is None:
            raise RuntimeError("PerSample: inside the with block layers run within collect(..., loss, ...) only")
        batch, names = self._batch, [name for parameter in own.values() if (name := self._name(parameter)) is not None]
        if output.numel() == 0:
            return output
        given = self._rules[module].reads(output, args, kwargs) if names else output
        if given is None:
            raise NoRule(*names)
        if output.size(0) != batch.num_samples and batch.num_samples > 1:
            if output.size(0) != 1:
                raise NoRule()
            # one for all, such as position embeddings: a row each, so that gradients stay apart
            given, output = (tensor.expand(batch.num_samples, *tensor.shape[1:]) for tensor in (given, output))
        if own["weight"].dim() == 2 and not batch.in_backward and (name := self._name(own["weight"])) is not None:
            batch.collector.expect(name)
        return _Watch.apply(output, self._anchor, partial(self._bring, batch, module), given.detach())

    def _bring(self, batch: _Batch, module: nn.Module, gradients: Tensor, x: Tensor) -> None:
        """The parts of a layer's gradients, for those of its parameters that count."""
        if not any(map(self._name, module.parameters(recurse=False))):
            return
        b = by_position(gradients, batch.num_samples)
        a = by_position(x, batch.num_samples) if x.is_floating_point() else x.reshape(len(b), -1)
        for parameter, part in self._rules[module].parts(a, b):
            name = self._name(parameter)
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
        return torch.ops.aten._unsafe_view(output, output.shape)  # no view to autograd: models change outputs in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.bring(grad, *ctx.saved_tensors)
        return grad, None, None, None


def joined(results: list[T]) -> T:
    """Of single samples: one entry each. A parameter that the loss of some does not reach has 0 for these."""
    if isinstance(results[0], Tensor):
        return cast(T, torch.cat(cast(list[Tensor], results)))
    found = cast(list[dict[str, Tensor]], results)
    nothing = {name: torch.zeros_like(value) for result in found for name, value in result.items()}
    return cast(T, {name: torch.cat([result.get(name, zero) for result in found]) for name, zero in nothing.items()})
