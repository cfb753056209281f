"""How many bytes of tensors are in memory at once, whoever made them: also those that are mapped from files, which no
allocator counts."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def resident() -> dict[int, int]:
    """{address: bytes} of every tensor that Python knows; of what shares its place, the largest."""
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            try:
                place = each.data_ptr()
            except RuntimeError:  # one of a compiler's, that has no memory
                continue
            found[place] = max(found.get(place, 0), each.nbytes)
    return found


class Peak(TorchDispatchMode):
    """Inside, looks at every operation that copies, or each so many of them, as looking takes a while; `bytes` is the
    most there was beyond what was there at the start."""

    def __init__(self, each: int = 1) -> None:
        super().__init__()
        self.each, self.copies = each, 0
        self.start = resident()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            if self.copies % self.each == 0:
                now = resident()
                self.bytes = max(self.bytes, sum(size for place, size in now.items() if place not in self.start))
            self.copies += 1
        return result
