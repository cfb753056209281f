"""Gaussian noise addressed by what it perturbs: seed, draw, parameter name, element. One stream, the same everywhere.

Element i of a parameter gets normal i % 4 of the Philox4x32-10 words (Salmon et al. 2011)

    philox(counter = (b low, b high, draw, parameter id), key = (seed low, seed high)),    b = i // 4,

by Box-Muller, two words (x, y) to two normals, with u = (x + 1/2) / 2^32 and v = (y + 1/2) / 2^32:

    sqrt(-2 ln u) cos(2 pi v),   sqrt(-2 ln u) sin(2 pi v).

i is the element's index in the whole parameter, row-major, whatever its strides, shards or chunks; the parameter id is
the CRC-32 of its name. So z depends on nothing else: not on dtype, device, threads, blocks or what was drawn before.
The words are the same bits on every backend. The normals are float32, on the CPU 1e-6 from the exact ones and the same
bits for every instruction set, on a GPU within 2e-5 of these; |z| <= 6.77. torch's global generator is never touched.
(The GPU kernels are compiled, and their values tested on the CPU; they have not run on a GPU yet.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .backends import choose, kernels, tables
from .backends.eager import normals
from .pieces import Noise, Piece, parameter_id

SEEDS, DRAWS, ELEMENTS = 1 << 64, 1 << 32, 1 << 62
LARGEST = math.sqrt(66 * math.log(2))  # |z| at most: -2 ln 2^-33


def gaussian_noise(
    numel: int,
    seed: int = 0,
    draw: int = 0,
    name: str = "",
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Elements offset .. offset + numel - 1 of the standard normal noise that `perturbed` adds to parameter `name`.

    Args:
        numel: how many, >= 0. offset: the first one's row-major index in the whole parameter, >= 0.
        seed: 0 <= seed < 2^64. draw: 0 <= draw < 2^32.
        name: the parameter's canonical name, as in `perturbed`.
        device: where the result goes; default the CPU.
        dtype: float32, or bfloat16 and float16 (rounded from it). float64: the normals of the same words in double
            precision, the oracle of the tests; computed eagerly.
        backend: None (the device's default), "cpu", "cuda", "triton" or "eager".

    Returns:
        (numel,) tensor.

    Raises:
        ValueError: an argument out of range; the message names it. TypeError: another dtype.
        RuntimeError: a backend that is not available here.

    >>> whole = gaussian_noise(10, seed=1, name="w")
    >>> torch.equal(gaussian_noise(4, seed=1, name="w", offset=3), whole[3:7])
    True
    """
    check_range("numel", numel, ELEMENTS)
    check_range("offset", offset, ELEMENTS - numel + 1)
    check_range("seed", seed, SEEDS)
    check_range("draw", draw, DRAWS)
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: needs bfloat16, float16, float32 or float64, got {dtype}")
    if dtype == torch.float64:
        choose(backend, torch.device(device or "cpu"))
        return normals(seed, draw, parameter_id(name), offset, numel, torch.device(device or "cpu"))
    z = torch.empty(numel, dtype=torch.float32, device=device)
    fill(z, seed, draw, parameter_id(name), offset, backend)
    return z.to(dtype)


def fill(out: Tensor, seed: int, draw: int, parameter: int, offset: int = 0, backend: str | None = None) -> None:
    """Writes noise into `out` (n,) float32, or the Philox words themselves into int32."""
    Plan([Piece(None, out, parameter, torch.tensor([offset]), out.numel())], backend).run(seed, add=Noise(draw, 1.0))


def check_range(argument: str, value: int, end: int) -> None:
    """Raises TypeError or ValueError unless `value` is a whole number in [0, end)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}={value!r}: needs a whole number, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{argument}={value}: needs 0 <= {argument} < 2^{math.log2(end):g}")


# ---- one launch over everything --------------------------------------------------------------------------------------


@dataclass
class Plan:
    """Where noise goes, made once; `run` is one launch for each device and pair of dtypes among the pieces."""

    pieces: Sequence[Piece]
    backend: str | None = None
    groups: list[tuple[str, list[Piece], Tensor]] = field(init=False)  # backend, pieces of a kind, their table

    def __post_init__(self) -> None:
        kinds: dict[tuple, list[Piece]] = {}
        for piece in self.pieces:
            if piece.target.numel() > 0 and len(piece.starts) > 0:
                kinds.setdefault(piece.kind, []).append(piece)
        self.groups = []
        for (device, *_), pieces in kinds.items():
            backend = choose(self.backend, device)
            table = torch.empty(0) if backend == "eager" else tables.chunk_table(pieces)
            self.groups.append((backend, pieces, table))

    def run(self, seed: int, add: Noise | None = None, remove: Noise | None = None) -> None:
        """target = source + add, or bfloat16(source - remove) + add; a bitwise copy where there is neither."""
        for backend, pieces, table in self.groups:
            kernels(backend).perturb(pieces, table, seed, add, remove)
