"""pointwise_g_effect: the gradient effect of every sample of a batch (PG-effect), by layer and in total."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import is_sharded
from ..gradients.groups import layer_of
from ..gradients.per_sample import Dots, PerSample
from ..gradients.streamed import (
    Gradients,
    Loss,
    accumulate_gradient,
    check_finite,
    check_gradient,
    probing,
    scalars,
    squared_norms,
)
from ..ops.parameters import canonical
from ..ops.segment_dot import segment_dot

Batch = Mapping[str, Tensor]
SampleLosses = Callable[[nn.Module, Batch], Tensor]


class PointwiseGEffect(NamedTuple):
    """<metric's gradient, gradient of sample i's loss>, float64, on the model's device."""

    total: Tensor  # (B,)
    per_layer: dict[str, Tensor]  # block, or module outside of the blocks -> (B,)
    declined: str | None = None  # why "ghost" took a backward a sample, where it did


def gradient_of(model: nn.Module, loss: Loss) -> Gradients:
    """The gradient of a metric by parameter name, as `pointwise_g_effect` takes it; `p.grad` stays as it was.

    loss(model) gives a scalar or micro-batches of scalars, as in `g_effect`. Parameters it does not reach are left out.
    Raises what `g_effect` raises; ArithmeticError names a parameter whose gradient is not finite.
    """
    with probing(model) as parameters:
        gradients = accumulate_gradient("loss", loss, model, parameters, None)
        check_finite("loss", scalars(squared_norms(gradients, None), parameters))
    return gradients


def pointwise_g_effect(
    model: nn.Module,
    batch: Batch,
    loss_fn: SampleLosses,
    metric_gradient: Gradients,
    method: str = "ghost",
    *,
    per_layer: bool = False,
) -> PointwiseGEffect:
    """Each sample's own G-effect <metric_gradient, grad loss_i>, i = 0 .. B - 1, without per-sample gradients.

    Wang et al. 2025 (Rethinking LLM Unlearning Objectives, ICLR), equation 5: the PG-effect.

    Args:
        model: plain or with adapters, not sharded; its train or eval mode is the caller's.
        batch: tensors whose dimension 0 is the sample (B).
        loss_fn: loss_fn(model, batch) gives the losses (B,); no sample's may depend on another one.
        metric_gradient: by parameter name, from `gradient_of(model, metric)`. Parameters without an entry count 0.
        method: "ghost": one backward and one forward-size product a layer; where a layer has no rule (`PerSample`), a
            backward a sample. "jvp": one forward in forward-mode differentiation (one a layer for per_layer); every
            operation needs a forward-mode rule: attention in plain torch (attn_implementation="eager", or torch's under
            sdpa_kernel(SDPBackend.MATH)), losses too. "loop": a backward a sample, the oracle of the two.
        per_layer: whether to tell the layers apart.

    Returns:
        PointwiseGEffect: .total (B,); .per_layer, {} unless asked for; .declined. "ghost" multiplies in float32 (in
        float64 models float64) and sums over positions in float64, "jvp" works in the model's dtype, "loop" takes
        gradients in it and sums in float64.

    Raises:
        ValueError: an unknown method or parameter name, a shape that does not fit, a frozen parameter, losses that are
            not (B,). TypeError: sharded parameters. ArithmeticError: a sample whose G-effect is not finite. The message
            names it.

    >>> layer, batch = nn.Linear(2, 1, bias=False), {"x": torch.tensor([[1.0, 2.0], [0.0, 3.0]])}
    >>> points = pointwise_g_effect(layer, batch, lambda m, b: m(b["x"]).sum(-1), {"weight": torch.ones(1, 2)})
    >>> points.total
    tensor([3., 3.], dtype=torch.float64)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: needs one of {tuple(METHODS)}")
    parameters = {canonical(name): p for name, p in model.named_parameters()}
    check_gradient("metric_gradient", metric_gradient, parameters)
    if sharded := [name for name in metric_gradient if is_sharded(parameters[name])]:
        raise TypeError(f"model: {sharded[0]!r} is sharded, needs whole parameters")
    layers: dict[str, list[str]] = {}
    for name in metric_gradient:
        layers.setdefault(layer_of(name), []).append(name)
    if method == "jvp":  # its derivatives are of sums over parameters
        parts = layers if per_layer else {"": list(metric_gradient)}
        by_part = {part: jvp(model, batch, loss_fn, metric_gradient, names) for part, names in parts.items()}
        return PointwiseGEffect(total_of(by_part), by_part if per_layer else {})
    dots, declined = METHODS[method](model, batch, loss_fn, metric_gradient, parameters)
    if not dots:
        raise ValueError("loss_fn: its losses reach no parameter of metric_gradient")
    nothing = torch.zeros_like(next(iter(dots.values())))
    by_layer = {
        layer: torch.stack([dots.get(name, nothing).to(nothing.device) for name in names]).sum(0)
        for layer, names in layers.items()
    }
    return PointwiseGEffect(total_of(by_layer), by_layer if per_layer else {}, declined)


def total_of(parts: Mapping[str, Tensor]) -> Tensor:
    """(B,): the sum over layers. Raises ArithmeticError that names the samples where it is not finite."""
    total = torch.stack(list(parts.values())).sum(0)
    if bad := (~total.isfinite()).nonzero().flatten().tolist():
        raise ArithmeticError(f"loss_fn: the G-effect of samples {bad} is not finite")
    return total


def num_samples(batch: Batch) -> int:
    sizes = {name: tensor.size(0) for name, tensor in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"batch: needs tensors of one size in dimension 0, got {sizes}")
    return next(iter(sizes.values()))


def sample_losses(loss_fn: SampleLosses, model: nn.Module, batch: Batch) -> Tensor:
    losses, size = loss_fn(model, batch), num_samples(batch)
    if losses.shape != (size,):
        raise ValueError(f"loss_fn: needs losses of shape ({size},), got {tuple(losses.shape)}")
    return losses


def ghost(
    model: nn.Module, batch: Batch, loss_fn: SampleLosses, metric_gradient: Gradients, parameters: Any
) -> tuple[dict[str, Tensor], str | None]:
    def total(rows: slice) -> Tensor:
        return sample_losses(loss_fn, model, {name: tensor[rows] for name, tensor in batch.items()}).sum()

    with PerSample(model, metric_gradient) as tap:
        dots = tap.collect(num_samples(batch), total, lambda: Dots(metric_gradient))
    return dots, tap.declined


def loop(
    model: nn.Module,
    batch: Batch,
    loss_fn: SampleLosses,
    metric_gradient: Gradients,
    parameters: dict[str, nn.Parameter],
) -> tuple[dict[str, Tensor], str | None]:
    size = num_samples(batch)
    dots: dict[str, Tensor] = {}
    for i in range(size):
        with torch.enable_grad():
            losses = sample_losses(loss_fn, model, {name: tensor[i : i + 1] for name, tensor in batch.items()})
        wanted = [parameters[name] for name in metric_gradient]
        gradients = torch.autograd.grad(losses[0], wanted, allow_unused=True)
        for name, gradient in zip(metric_gradient, gradients, strict=True):
            if gradient is not None:
                dot = segment_dot([(gradient, metric_gradient[name])]).dot[0]
                dots.setdefault(name, dot.new_zeros(size))[i] = dot
    return dots, None


@torch.no_grad()
def jvp(model: nn.Module, batch: Batch, loss_fn: SampleLosses, metric_gradient: Gradients, names: list[str]) -> Tensor:
    """The derivative of all samples' losses along the metric's gradient of the parameters `names`: (B,) float64."""
    primals = {name: p.detach() for name, p in model.named_parameters() if canonical(name) in names}
    tangents = {name: metric_gradient[canonical(name)].to(p.dtype) for name, p in primals.items()}

    def losses(parameters: dict[str, Tensor]) -> Tensor:
        return sample_losses(loss_fn, _Called(model, parameters), batch)

    return torch.func.jvp(losses, (primals,), (tangents,))[1].double()


class _Called(nn.Module):
    """The model with other parameters; attributes are the model's."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]):
        super().__init__()
        self.__dict__.update(_model=model, _replaced=parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._model, self._replaced, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"], name)


METHODS: dict[str, Any] = {"ghost": ghost, "jvp": jvp, "loop": loop}
