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
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import choose, perturb_kernel

SEEDS, DRAWS, ELEMENTS = 1 << 64, 1 << 32, 1 << 62
LARGEST = math.sqrt(66 * math.log(2))  # |z| at most: -2 ln 2^-33
CHUNK = 32768  # elements a block (GPU) or a piece of a thread's work (CPU) takes
EAGER_CHUNK = 1 << 20  # a hundred bytes of temporaries for each


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


def parameter_id(name: str) -> int:
    """CRC-32 (IEEE 802.3) of the name in UTF-8: 32 bits, the counter's fourth word."""
    return zlib.crc32(name.encode())


def check_range(argument: str, value: int, end: int) -> None:
    """Raises TypeError or ValueError unless `value` is a whole number in [0, end)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}={value!r}: needs a whole number, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{argument}={value}: needs 0 <= {argument} < 2^{math.log2(end):g}")


# ---- one launch over everything --------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """scale * z, z being draw `draw`."""

    draw: int
    scale: float


@dataclass(frozen=True)
class Piece:
    """Runs of `length` consecutive elements of one parameter: run j begins at its logical element starts[j].

    `source` and `target` hold the runs one after the other, flat and contiguous; where `places` is given, run j is at
    element places[j] of `target`. Without a source the noise itself is written.
    """

    source: Tensor | None
    target: Tensor
    parameter: int
    starts: Tensor  # int64
    length: int
    places: Tensor | None = None

    @property
    def kind(self) -> tuple[torch.device, torch.dtype | None, torch.dtype]:
        return self.target.device, None if self.source is None else self.source.dtype, self.target.dtype

    def chunks(self, most: int) -> tuple[Tensor, ...]:
        """Of `most` elements at most: offset in the source, offset in the target, logical element, count."""
        inside = torch.arange(0, self.length, most)
        at = torch.arange(len(self.starts)) * self.length
        places = at if self.places is None else self.places.cpu()
        count = (self.length - inside).clamp(max=most).expand(len(self.starts), -1)
        return (*((first[:, None] + inside).flatten() for first in (at, places, self.starts)), count.flatten())

    def table(self) -> Tensor:
        """A row of csrc/cpu/perturb.h's Chunk for every chunk: (chunks, 5) int64."""
        at, place, first, count = self.chunks(CHUNK)
        source = 0 if self.source is None else self.source.data_ptr()
        rows = torch.empty(len(at), 5, dtype=torch.int64)
        rows[:, 0] = source + at * (0 if self.source is None else self.source.element_size())
        rows[:, 1] = self.target.data_ptr() + place * self.target.element_size()
        rows[:, 2], rows[:, 3], rows[:, 4] = first, count, self.parameter
        return rows


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
            table = torch.cat([piece.table() for piece in pieces]).to(device) if backend != "eager" else torch.empty(0)
            self.groups.append((backend, pieces, table))

    def run(self, seed: int, add: Noise | None = None, remove: Noise | None = None) -> None:
        """target = source + add, or bfloat16(source - remove) + add; a bitwise copy where there is neither."""
        for backend, pieces, table in self.groups:
            _, source, target = pieces[0].kind
            if backend == "eager":
                for piece in pieces:
                    eager(piece, seed, add, remove)
            else:
                with torch.cuda.device_of(table):
                    perturb_kernel(backend)(table, source, target, seed, remove, add)


# ---- the eager twin --------------------------------------------------------------------------------------------------


@torch.no_grad()
def eager(piece: Piece, seed: int, add: Noise | None, remove: Noise | None) -> None:
    """What the kernels do with a piece, in plain PyTorch."""
    device, parameter = piece.target.device, piece.parameter

    dtype = torch.float64 if piece.target.dtype == torch.float64 else torch.float32

    def noise(step: Noise, first: int, count: int) -> Tensor:
        return normals(seed, step.draw, parameter, first, count, device).float().to(dtype) * step.scale

    for at, place, first, count in zip(*(column.tolist() for column in piece.chunks(EAGER_CHUNK)), strict=True):
        target = piece.target[place : place + count]
        if target.dtype == torch.int32:
            assert add is not None
            target.copy_(words(seed, add.draw, parameter, first, count, device))
            continue
        if piece.source is None:
            assert add is not None
            target.copy_(noise(add, first, count))
            continue
        value = piece.source[at : at + count]
        if add is not None or remove is not None:
            value = value.to(dtype)
        if remove is not None:
            value = (value - noise(remove, first, count)).bfloat16().float()
        if add is not None:
            value = value + noise(add, first, count)
        target.copy_(value)


def philox(counter: Sequence[Tensor | int], key: int) -> list[Tensor]:
    """Ten rounds of Philox4x32: four words from four, as int64 in [0, 2^32). At least counter[0] is a tensor."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    for i in range(10):
        p, q = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits: the sign bit is one of them
        k0, k1 = (key + i * 0x9E3779B9) & low, ((key >> 32) + i * 0xBB67AE85) & low
        c0, c1, c2, c3 = (q >> 32 & low) ^ c1 ^ k0, q & low, (p >> 32 & low) ^ c3 ^ k1, p & low
    return [c0, c1, c2, c3]


def words(seed: int, draw: int, parameter: int, first: int, count: int, device: torch.device) -> Tensor:
    """The words behind elements first .. first + count - 1 as int64, (count,)."""
    block = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    four = philox((block & 0xFFFFFFFF, block >> 32, draw, parameter), seed)
    return torch.stack(torch.broadcast_tensors(*four), -1).flatten()[first % 4 : first % 4 + count]


def normals(seed: int, draw: int, parameter: int, first: int, count: int, device: torch.device) -> Tensor:
    """The normals of elements first .. first + count - 1 in float64, (count,)."""
    begin, end = first // 4 * 4, (first + count + 3) // 4 * 4
    u, v = ((words(seed, draw, parameter, begin, end - begin, device).double() + 0.5) / 2**32).view(-1, 2).unbind(-1)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()
    return z[first - begin : first - begin + count]
