"""IEEE float32 inside, whatever the caller has switched on: TF32 or bfloat16 noise is larger than what sigma moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast on `device`, no TF32 and no bfloat16 inside float32 products; the caller's settings on exit."""
    backends: Any = torch.backends
    each: list[Any] = []
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        each = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        each += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    before = [(setting, setting.fp32_precision) for setting in each]
    try:
        older = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer names only
        older = None
    # Both names are set: a library that asks for the older one inside gets an answer.
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = False
    for setting in each:
        setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            backends.cudnn.allow_tf32 = older[1]
        for setting, value in before:
            setting.fp32_precision = value
