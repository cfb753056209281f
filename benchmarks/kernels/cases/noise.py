"""Perturbing all weights of a model, one draw after another: ours by mode, and the ways it is done elsewhere.

A run goes from the weights of one draw to those of the next. Where that takes a restore of its own (adding the noise,
subtracting the same noise again), the run is both, as in MeZO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyunlearn as pu

from .base import Impl, Shapes, fused

SIGMA, DRAW = 1e-5, 3
SAMPLE = 1 << 20  # elements whose noise is compared with float64
ONE_TENSOR, MANY_TENSORS = "perturb one tensor", "perturb matrices and vectors"


@dataclass
class Perturb(Shapes):
    """Weights N(0, 0.02^2) of these shapes."""

    op = "perturbed"
    weights: nn.ParameterList | None = None
    inside: pu.perturbed | None = None  # ours, between runs

    @property
    def bytes(self) -> int:
        """Weights read, perturbed weights written in float32."""
        return self.n * (self.dtype.itemsize + 4)

    def fresh(self, i: int | None = None) -> dict[str, Any]:
        """Without i new weights, else those that the last run has left: runs after one another are what is measured."""
        if i is None or self.weights is None:
            self.done()
            g = torch.Generator(self.device).manual_seed(0)
            empty = (torch.empty(shape, device=self.device) for shape in self.shapes)
            # bfloat16 numbers in float32 too: every mode can take them
            normal = (t.normal_(0, 0.02, generator=g).bfloat16().to(self.dtype) for t in empty)
            self.weights = nn.ParameterList([*normal])
            self.start = self.weights[0].detach().flatten()[:SAMPLE].double()
        return {"weights": self.weights, "draw": DRAW if i is None else DRAW + 4 + i}  # warm-up counts from -3

    def enter(self, backend: str, mode: str) -> pu.perturbed:
        if self.inside is None:
            assert self.weights is not None
            self.inside = pu.perturbed(self.weights, sigma=SIGMA, draw=None, mode=mode, backend=backend)
            self.inside.__enter__()
        return self.inside

    def sample(self, results: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The noise in what the first tensor has become, in sigma; what ours hold is given back."""
        (moved,) = results
        assert moved is not None
        noise = (moved.detach().flatten()[:SAMPLE].double() - self.start) / SIGMA
        self.done()
        return [noise]

    @property
    def answer(self) -> list[Tensor]:
        size = min(SAMPLE, torch.Size(self.shapes[0]).numel())
        return [pu.gaussian_noise(size, draw=DRAW, name="0", dtype=torch.float64, device=self.device, backend="eager")]

    def done(self) -> None:
        if self.inside is not None:
            self.inside.__exit__(None, None, None)
        self.weights = self.inside = None

    def implementations(self) -> dict[str, Impl]:
        modes = ("overlay", "copy", "snap") if self.dtype == torch.float32 else ("overlay",)
        ours = {f"{name} {mode}": Impl(partial(run, name, mode)) for name in fused(self.device) for mode in modes}
        return {**ours, "randn_like + add_": Impl(randn_like, exact=False), "MeZO": Impl(mezo, exact=False)}


def run(backend: str, mode: str, case: Perturb, t: dict) -> list[Tensor]:
    case.enter(backend, mode).to(t["draw"])
    return [t["weights"][0]]


@torch.no_grad()
def randn_like(case: Perturb, t: dict) -> list[Tensor]:
    """Noise added and never taken off again: half of what is needed."""
    for p in t["weights"]:
        p.add_(torch.randn_like(p), alpha=SIGMA)
    return []


@torch.no_grad()
def mezo(case: Perturb, t: dict) -> list[Tensor]:
    """The noise of a seed parameter by parameter, added, drawn again and subtracted."""
    for scale in (1, -1):
        torch.manual_seed(t["draw"])
        for p in t["weights"]:
            z = torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z * SIGMA
    return []
