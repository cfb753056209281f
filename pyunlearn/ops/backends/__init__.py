"""Where each op runs, and why it cannot run elsewhere.

`backend=None` takes the first available backend of the tensor's device in `ORDER`. Missing pieces raise when they are
asked for by name, never at import.

`kernels(name)` is a backend's module. All have perturb, segment_dot and ghost_dot. The fused ones have five calls over
one streaming state per row, new_state, accumulate, finish, topk and backward, as `native` has them (which also has
value_and_grad); the eager twin has token_stats, of which autograd makes the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from ..._declined import decline
from . import eager, native

# The CUDA kernels serve when asked for by name; they become the default once they have been measured on a GPU.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("triton", "eager", "cuda")}
NAMES = ("triton", "cuda", "cpu", "eager")
OPS = ("token_stats", "linear_token_stats", "gaussian_noise", "segment_dot", "ghost_dot")


def unavailable(backend: str) -> str:
    """Why `backend` cannot run here, or "" when it can."""
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: needs one of {', '.join(map(repr, NAMES))} or None")
    if backend == "eager":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton (Linux)"
        if torch.cuda.is_available() or interpreting():
            return ""
        return "no CUDA device is visible to torch (TRITON_INTERPRET=1, set before Python starts, runs it on the CPU)"
    if backend == "cpu" or native.unavailable:
        return native.unavailable
    if not native._C.cuda_archs:
        return f"the CUDA part is not built: {native._C.cuda_reason}"
    return "" if torch.cuda.is_available() else "no CUDA device is visible to torch"


def interpreting() -> bool:
    """Whether triton runs its kernels in Python, on the CPU: for tests, hundreds of times slower."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels(backend: str) -> ModuleType:
    """The module behind a backend; triton is imported here and not before."""
    if backend == "triton":
        return importlib.import_module(f".{backend}", __name__)
    return eager if backend == "eager" else native


def serving(device: torch.device) -> tuple[str, ...]:
    """The backends that take tensors on `device`, the default first."""
    names = ORDER.get(device.type, ("eager",))
    return (*names, "triton") if device.type == "cpu" and interpreting() else names


def choose(backend: str | None, device: torch.device) -> str:
    """The backend an op takes for tensors on `device`. ValueError or RuntimeError where `backend` cannot serve."""
    if backend is None:
        chosen = next(b for b in ORDER.get(device.type, ("eager",)) if not unavailable(b))
        if chosen == "eager":
            why_eager(device)
        return chosen
    reason = unavailable(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if backend not in serving(device):
        raise ValueError(f"backend={backend!r}: needs one of {serving(device)} for tensors on {device}")
    return backend


def why_eager(device: torch.device) -> dict[str, str]:
    """{"fused kernels": why those that `device` has by default are not here}, logged once; empty where it has none."""
    reason = unavailable(ORDER.get(device.type, ("eager",))[0])
    return {"fused kernels": decline("fused kernels", reason)} if reason else {}
