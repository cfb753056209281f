"""What a perturbation is told of: noise, and the runs of a parameter's elements that it goes to."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


def parameter_id(name: str) -> int:
    """CRC-32 (IEEE 802.3) of the name in UTF-8: 32 bits, the counter's fourth word."""
    return zlib.crc32(name.encode())
