"""Where each op runs, and why it cannot run elsewhere.

`backend=None` takes the first available backend of the tensor's device in `ORDER`. Missing pieces raise when they are
asked for by name, never at import.
"""

from __future__ import annotations

import importlib.util

import torch

from . import cpu

ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("eager",)}
OPS = ("token_stats", "linear_token_stats")


def unavailable(backend: str) -> str:
    """Why `backend` cannot run here, or "" when it can."""
    if backend == "eager":
        return ""
    if backend == "cpu":
        return cpu.unavailable
    if backend in ("cuda", "triton"):
        if not torch.cuda.is_available():
            return "no CUDA device is visible to torch"
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed; install it with: pip install triton"
        return "no kernel of this op is built for it yet; CUDA tensors take the eager backend"
    raise ValueError(f"backend={backend!r}: needs one of 'cpu', 'cuda', 'triton', 'eager' or None")


def choose(backend: str | None, device: torch.device) -> str:
    """The backend an op takes for tensors on `device`. ValueError or RuntimeError where `backend` cannot serve."""
    if backend is None:
        return next(b for b in ORDER.get(device.type, ("eager",)) if not unavailable(b))
    reason = unavailable(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if backend not in (*ORDER.get(device.type, ()), "eager"):
        raise ValueError(
            f"backend={backend!r}: cannot take tensors on {device}; needs one of {ORDER.get(device.type, ('eager',))}"
        )
    return backend
