"""Unlearning with control: the largest part of an unlearning that leaves enough of what should stay.

Wang et al. (2025), Towards Effective Evaluations and Comparisons for LLM Unlearning Methods: parameters are mixed as
(1 - a) before + a unlearned, and methods are compared at the a where each keeps the same share of what the model knew
of the retain set, as extraction strength. The authors' code calls u = 1 - a, the original's part, `update_`, and
searches by hand.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from .._files import SEAL, seal, write_folder
from ..model.lora import WEIGHTS
from ..model.tensors import Tensors, stored
from ..store import save_tensors

FACTOR = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(\.|$)")  # what a plain LoRA adapter is made of
LAST = re.compile(r"\.lora_(B|embedding_B)(\.|$)")  # the one of the two factors that is scaled


@dataclass(frozen=True)
class Search:
    """a: the largest found whose score is `limit` at least, 0 the original, 1 the unlearned. scores: of every a that
    was measured, by a, in their order. limit: the share of the original's score that was asked for."""

    a: float
    limit: float
    scores: Mapping[float, float]

    @property
    def monotone(self) -> bool:
        """Whether no a above one that fails passes."""
        passing = [score >= self.limit for score in self.scores.values()]
        return passing == sorted(passing, reverse=True)


MOST_POINTS = 1000


def search(score: Callable[[float], float], share: float, *, points: int = 10, tolerance: float = 0.01) -> Search:
    """The largest a in [0, 1] whose score is at least `share` of that of a = 0.

    All of 0, 1/points, ..., 1 are measured, since the score need not fall all the way; the largest that passes is kept,
    and the next step of the grid, whose far end fails, is halved until it is no wider than `tolerance`.

    Raises ValueError for a share outside of (0, 1], points outside of 1 to 1000, tolerance <= 0, and a score that is no
    number >= 0.
    """
    if not 0 < share <= 1:
        raise ValueError(f"target={share:g}: needs a share of the score before unlearning, above 0 and 1 at most")
    if not 1 <= points <= MOST_POINTS:
        raise ValueError(f"points={points}: needs 1 to {MOST_POINTS} steps of the grid, all of which are measured")
    if not tolerance > 0:
        raise ValueError(f"tolerance={tolerance:g}: needs a number above 0")
    scores: dict[float, float] = {}

    def measure(a: float) -> float:
        value = score(a)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"score({a:g})={value}: needs a number >= 0")
        scores[a] = value
        return value

    grid = [i / points for i in range(points + 1)]
    limit = share * measure(0.0)
    passing = [0, *(i for i, a in enumerate(grid) if i and measure(a) >= limit)]
    low, high = grid[passing[-1]], grid[min(passing[-1] + 1, points)]
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) >= limit else (low, middle)
    return Search(low, limit, dict(sorted(scores.items())))


def blend(before: Tensor, after: Tensor, a: float) -> Tensor:
    """before + a (after - before), in the dtype of `before`, computed in float32 at least; at a = 0 and 1 the one or
    the other to the bit, and where they are the same, that.

    Raises ValueError for integers that differ, which have nothing in between.
    """
    if a in (0, 1):
        return after.to(before.dtype) if a else before
    if not before.is_floating_point():
        if not torch.equal(before, after):
            raise ValueError(f"a={a:g}: tensors of {before.dtype} differ, which cannot be mixed")
        return before
    wide = torch.promote_types(before.dtype, torch.float32)
    start = before.to(wide)
    return after.to(wide, copy=True).sub_(start).mul_(a).add_(start).to(before.dtype)


@torch.no_grad()
def mix(model: nn.Module, before: Tensors, after: Tensors, a: float) -> None:
    """Makes `model`, in place, the mixture of the two: (1 - a) before + a after, a tensor at a time.

    Raises ValueError for a outside of [0, 1], and as `blend` with the tensor's name.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a={a:g}: needs a number from 0, the original, to 1, the unlearned model")
    for name, (tensor, names) in stored(model).items():
        try:
            mixed = blend(before.read(names).to(tensor.dtype), after.read(names).to(tensor.dtype), a)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        tensor.copy_(mixed)


def is_plain(adapter: Path) -> bool:
    """Whether an adapter folder is plain LoRA, two factors a layer and nothing else, whose change can be scaled."""
    with safe_open(str(adapter / WEIGHTS), framework="pt") as file:
        return all(FACTOR.search(name) for name in file.keys())  # noqa: SIM118


def scale_adapter(adapter: Path, out: Path, a: float) -> None:
    """Writes an adapter folder whose change of its base is `a` times that of `adapter`; the rest is copied.

    Raises ValueError for an adapter that is more than two factors a layer.
    """
    if not is_plain(adapter):
        raise ValueError(f"{adapter / WEIGHTS}: has more than two factors a layer, its change is not scaled with one")

    def fill(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SEAL, WEIGHTS))
        tensors = load_file(adapter / WEIGHTS)
        scaled = {name: tensor * a if LAST.search(name) else tensor for name, tensor in tensors.items()}
        save_tensors(scaled, folder / WEIGHTS, {"format": "pt"}, out / WEIGHTS)
        seal(folder)

    write_folder(out, fill)
