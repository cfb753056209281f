"""Fixtures through which every backend passes the same tests, on the device it serves.

A new fused backend is one entry in FUSED: a context manager that sets it up and gives its name in `pyunlearn.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from pyunlearn import _C
from pyunlearn.ops import backends
from pyunlearn.ops.backends import interpreting

from .. import cuda_on_cpu


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


@functools.cache
def kernels_on_cpu() -> ModuleType:
    return cuda_on_cpu.load()


@contextmanager
def cuda() -> Iterator[str]:
    """The CUDA kernels: on the GPU where there is one, else built for the CPU and let take its tensors."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.native, "_C", kernels_on_cpu())
        usual = backends.unavailable
        patch.setattr(backends, "unavailable", lambda backend: "" if backend == "cuda" else usual(backend))
        patch.setitem(backends.ORDER, "cpu", ("cuda", "eager"))
        yield "cuda"


@contextmanager
def triton() -> Iterator[str]:
    """On a GPU, or in Python on the CPU. There, two thirds of the time would go into patching triton's language again
    in every call of a device function: the first call from each module does."""
    if not interpreting():
        yield "triton"
        return
    from triton.runtime.interpreter import InterpretedFunction

    patched, call = set(), InterpretedFunction.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(self.fn.__module__)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", called)
        yield "triton"


FUSED: dict[str, Callable[[], AbstractContextManager[str]]] = {
    "cpu": partial(cpu, "auto"),
    "cpu-avx2": partial(cpu, "avx2"),
    "cpu-portable": partial(cpu, "portable"),
    "cuda": cuda,
    "triton": triton,
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
