"""g_effect: how much an unlearning objective's gradient step changes each metric, per group of layers and in total."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.groups import Groups, assign_groups, layer_of
from ..gradients.streamed import (
    Gradients,
    Loss,
    accumulate_gradient,
    backwards,
    check_finite,
    check_gradient,
    probing,
    scalars,
    squared_norms,
    streamed,
    summed,
)
from ..ops.parameters import canonical
from ..ops.segment_dot import segment_dot


@dataclass(frozen=True)
class GEffect:
    """Dot products of the objective's gradient with every metric's, per parameter, and their sums.

    Attributes:
        per_parameter: metric -> parameter -> <metric's gradient, objective's gradient>.
        groups: group -> names of its parameters. Groups need not cover all of them.
        objective_squares: parameter -> squared norm; None where the gradient was streamed in parts (see `g_effect`).
        metric_squares: metric -> parameter -> squared norm.
    """

    per_parameter: dict[str, dict[str, float]]
    groups: dict[str, list[str]]
    objective_squares: dict[str, float] | None
    metric_squares: dict[str, dict[str, float]]

    @property
    def total(self) -> dict[str, float]:
        """Metric -> G-effect: negative where a step down the objective raises the metric."""
        return {metric: math.fsum(dots.values()) for metric, dots in self.per_parameter.items()}

    @property
    def per_layer(self) -> dict[str, dict[str, float]]:
        """Metric -> block, or module outside of the blocks -> G-effect."""
        return self._over(self.layers)

    @property
    def per_group(self) -> dict[str, dict[str, float]]:
        """Metric -> group -> G-effect."""
        return self._over(self.groups)

    @property
    def layers(self) -> dict[str, list[str]]:
        """Block, or module outside of the blocks -> names of its parameters."""
        layers: dict[str, list[str]] = {}
        for name in next(iter(self.per_parameter.values())):
            layers.setdefault(layer_of(name), []).append(name)
        return layers

    @property
    def objective_norm(self) -> float:
        return math.sqrt(math.fsum(self._squares().values()))

    @property
    def metric_norm(self) -> dict[str, float]:
        return {metric: math.sqrt(math.fsum(squares.values())) for metric, squares in self.metric_squares.items()}

    @property
    def cosine(self) -> dict[str, float]:
        """Metric -> cosine of the angle between the two gradients; 0 where one of them is 0."""
        return {metric: self._cosine(metric, list(dots)) for metric, dots in self.per_parameter.items()}

    def cosines(self, parts: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
        """Metric -> part -> cosine, for `groups`, `layers` or any other mapping from part to parameter names."""
        return {
            metric: {part: self._cosine(metric, list(n)) for part, n in parts.items()} for metric in self.per_parameter
        }

    def as_dict(self) -> dict[str, Any]:
        """What a log line holds: plain numbers, by metric."""
        known = {} if self.objective_squares is None else {"cosine": self.cosine, "objective_norm": self.objective_norm}
        return {"total": self.total, "per_group": self.per_group, "metric_norm": self.metric_norm, **known}

    def _over(self, parts: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
        return {
            metric: {part: math.fsum(dots[name] for name in names) for part, names in parts.items()}
            for metric, dots in self.per_parameter.items()
        }

    def _squares(self) -> dict[str, float]:
        if self.objective_squares is None:
            raise ValueError(
                "the objective's gradient came in parts (micro-batches or reentrant checkpointing), so its norm is not "
                "known; pass accumulate=True to g_effect, at one more stored gradient"
            )
        return self.objective_squares

    def _cosine(self, metric: str, names: list[str]) -> float:
        mine, theirs = self._squares(), self.metric_squares[metric]
        norms = math.sqrt(math.fsum(mine[n] for n in names)) * math.sqrt(math.fsum(theirs[n] for n in names))
        return math.fsum(self.per_parameter[metric][n] for n in names) / norms if norms else 0.0


def g_effect(
    model: nn.Module,
    objective: Loss,
    metrics: Mapping[str, Loss | Gradients],
    groups: Groups = "paper",
    *,
    accumulate: bool = False,
    ema: float | None = None,
    backend: str | None = None,
) -> GEffect:
    """The gradient effect <grad metric, grad objective> of an unlearning objective on every metric.

    Wang et al. 2025 (Rethinking LLM Unlearning Objectives, ICLR), Definition 1. With the negative log-likelihood of the
    forget set as the metric it is the unlearning G-effect (removal wants it far below 0), with that of the retain set
    the retaining G-effect (retention wants it at 0 or above). A step of size lr down the objective changes the metric
    by -lr times the G-effect, to first order.

    Each metric's gradient is kept; the objective's is streamed: a parameter's is multiplied with the kept ones as it
    completes, and dropped. The memory on top of the model and activations is one gradient a metric and that of the
    layer in progress.

    Args:
        model: plain, with gradient checkpointing of either kind, with adapters, or sharded by `fully_shard` (FSDP2:
            every rank calls with its own data, gradients are means over ranks, all ranks get the result). Only
            parameters with requires_grad count; tied ones once. Its train or eval mode is the caller's.
        objective: objective(model) gives a scalar loss, or an iterable of scalars (a generator, say): micro-batches,
            each of which is differentiated before the next is asked for. Their gradients add up.
        metrics: name -> function of the same kind, or its gradient from `gradient_of`, which several calls can share.
        groups: "paper" (embed, shallow, middle, deep, lm_head; `assign_groups` has the rule) or a mapping from group to
            patterns of parameter names.
        accumulate: keep the objective's gradient too, so that its norm and the cosines are known where it comes in
            parts (micro-batches, or reentrant checkpointing); one more gradient in memory.
        ema: for comparison with the authors' code, which smooths: each side's gradient is an exponential average of its
            micro-batches' gradients, average = ema * average + (1 - ema) * gradient from the second one on (theirs:
            0.6), in the gradients' dtype. 0 <= ema < 1; implies accumulate; one more gradient while averaging.
        backend: of `segment_dot`.

    Returns:
        GEffect: .total[metric], .per_group, .per_layer, .per_parameter, .cosine, .objective_norm, .metric_norm; floats.
        A parameter that one side does not reach counts 0. Sums are float64 and the same bits on every run whose
        gradients are.

    Hooks and `p.grad` are afterwards what they were before, also after an exception.

    Raises:
        ValueError: no metric, a group without trainable parameters, a loss that is no scalar or reaches no parameter of
            the model, an objective and a metric with no parameter in common. ArithmeticError: a gradient that is not
            finite. The message names the argument, metric or parameter. TypeError: DDP and the like.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    >>> metrics = {"forget": lambda m: m(x).sum(), "retain": lambda m: m(y).sum()}
    >>> effect = g_effect(layer, lambda m: -m(x).sum(), metrics, groups={"all": "*"})
    >>> effect.total
    {'forget': -5.0, 'retain': -1.0}
    """
    if not metrics:
        raise ValueError("metrics: needs at least one function, got none")
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema={ema!r}: needs 0 <= ema < 1, or None")
    with probing(model) as parameters:
        grouped = assign_groups(model, list(parameters), groups)
        stored: dict[str, Gradients] = {}
        metric_squares: dict[str, dict[str, float]] = {}
        for metric, loss in metrics.items():
            what = f"metrics[{metric!r}]"
            if isinstance(loss, Mapping):  # its gradient
                check_gradient(what, loss, {canonical(name): p for name, p in model.named_parameters()})
                stored[metric] = dict(loss)
            else:
                stored[metric] = accumulate_gradient(what, loss, model, parameters, ema)
            squares = scalars(squared_norms(stored[metric], backend), parameters)
            check_finite(what, squares)
            metric_squares[metric] = dict.fromkeys(parameters, 0.0) | squares
        stream = _Stream(stored, backend)
        if accumulate or ema is not None:
            for name, gradient in accumulate_gradient("objective", objective, model, parameters, ema).items():
                stream.take(name, gradient)
        else:
            with streamed(parameters, stream.take):
                for _ in backwards("objective", objective, model):
                    pass
        sums = summed({name: torch.stack(parts).sum(0) for name, parts in stream.parts.items()}, parameters)
    if not sums:
        raise ValueError("objective: its loss reaches no trainable parameter of this model")
    squares = {name: row[-1] for name, row in sums.items()}
    check_finite("objective", squares)
    dots = {}
    for k, metric in enumerate(stored):
        if not stored[metric].keys() & sums.keys():
            raise ValueError(f"metrics[{metric!r}]: has no parameter in common with the objective")
        dots[metric] = {name: sums[name][k] if name in sums else 0.0 for name in parameters}
    whole = all(len(parts) == 1 for parts in stream.parts.values())
    return GEffect(dots, grouped, dict.fromkeys(parameters, 0.0) | squares if whole else None, metric_squares)


class _Stream:
    """Multiplies the objective's gradients with the metrics' as they come; nothing waits for the device."""

    def __init__(self, stored: dict[str, Gradients], backend: str | None):
        self.stored, self.backend = stored, backend
        self.parts: dict[str, list[Tensor]] = {}  # by parameter: its dots and its square, (metrics + 1,) float64

    def take(self, name: str, gradient: Tensor) -> None:
        reached = [metric for metric, gradients in self.stored.items() if name in gradients]
        pairs = [(gradient, self.stored[metric][name]) for metric in reached]
        dots = segment_dot(pairs or [(gradient, gradient)], self.backend)
        known = dict(zip(reached, dots.dot, strict=False))
        nothing = dots.dot.new_zeros(())
        row = [known.get(metric, nothing) for metric in self.stored]
        self.parts.setdefault(name, []).append(torch.stack([*row, dots.a_squared[0]]))
