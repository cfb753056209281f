"""Every sample's gradient multiplied with one direction, from one backward and a forward-size product a layer.

With a, b as in `pyunlearn.gradients.per_sample` and R the direction at the parameter: a Linear gives sum_t b_t' R a_t,
an Embedding sum_t b_t . R[x_t], a gain or bias R . (its gradient). The uses of a parameter used several times add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.parameters import canonical
from ..ops.products import wide_product
from ..ops.segment_dot import segment_dot
from .per_sample import GhostNorms


class GhostDots(GhostNorms):
    """As GhostNorms, which has the rules and what they cover: inside, `dots` gives <direction, gradient i>."""

    def __init__(self, model: nn.Module, directions: dict[str, Tensor], strict: bool = True):
        super().__init__(model, parameters=directions, strict=strict)
        self._directions = {
            id(p): (canonical(name), directions[canonical(name)])
            for name, p in model.named_parameters()
            if id(p) in self._counted
        }
        self._dots: dict[str, Tensor] = {}

    def dots(self, num_samples: int, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Parameter -> (num_samples,) float64, of those the loss reaches. Arguments and errors as `squared_norms`."""
        self._dots = {}
        self.squared_norms(num_samples, loss)  # the two methods below take everything: no norms are worked out
        return self._dots

    def _matrix(self, weight: Any, left: Tensor, right: Tensor) -> None:
        if id(weight) in self._directions:
            direction = self._directions[id(weight)][1]
            if left.dim() == 2:
                pairs = zip(right, direction[left], strict=True)
            else:
                pairs = zip(left, wide_product(right.flatten(0, 1), direction.mT).view(left.shape), strict=True)
            self._gather(weight, segment_dot([*pairs]).dot)

    def _vector(self, parameter: Any, gradients: Tensor) -> None:
        if parameter is not None and id(parameter) in self._directions:
            direction = self._directions[id(parameter)][1].double()
            self._gather(parameter, gradients.sum(1, dtype=torch.float64) @ direction)

    def _gather(self, parameter: Any, dots: Tensor) -> None:
        name = self._directions[id(parameter)][0]
        self._dots[name] = self._dots[name] + dots if name in self._dots else dots
