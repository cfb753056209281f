"""Fixtures through which every backend passes the same tests, on the device it serves.

A new fused backend is one entry in FUSED: a context manager that sets it up and gives its name in `pyunlearn.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
import torch

from pyunlearn import _C


@contextmanager
def cpu(instruction_set: str) -> Iterator[str]:
    """One code path of this CPU; on one without AVX2 the name is refused, and the best path runs again."""
    try:
        _C.choose_instruction_set(instruction_set)
    except ValueError:
        _C.choose_instruction_set("auto")
    try:
        yield "cpu"
    finally:
        _C.choose_instruction_set("auto")


FUSED: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "cpu": partial(cpu, "auto"),
    "cpu-avx2": partial(cpu, "avx2"),
    "cpu-portable": partial(cpu, "portable"),
}
BACKENDS = [name for name in FUSED if "-" not in name] + ["eager"]


@pytest.fixture(params=FUSED)
def fused(request):
    """Every code path of every fused backend: for what depends on the arithmetic."""
    with FUSED[request.param]() as name:
        yield name


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every backend once, eager too: for what the op promises whatever computes it."""
    if request.param == "eager":
        yield "eager"
    else:
        with FUSED[request.param]() as name:
            yield name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
