"""Where each op runs, and why it cannot run elsewhere.

`backend=None` takes the first available backend of the tensor's device in `ORDER`. Missing pieces raise when they are
asked for by name, never at import.

Eager apart, a backend is a module of five calls over one streaming state per row, `new_state`, `accumulate`, `finish`,
`topk` and `backward`, as `native` has them; `kernels(name)` gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from . import native

# The CUDA kernels serve when asked for by name; they become the default once they have been measured on a GPU.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "eager"), "cuda": ("eager", "cuda")}
OPS = ("token_stats", "linear_token_stats", "gaussian_noise")


def unavailable(backend: str) -> str:
    """Why `backend` cannot run here, or "" when it can."""
    if backend == "eager":
        return ""
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"backend={backend!r}: needs one of 'cpu', 'cuda', 'eager' or None")
    if backend == "cpu" or native.unavailable:
        return native.unavailable
    if not native._C.cuda_archs:
        return f"the CUDA part is not built: {native._C.cuda_reason}"
    return "" if torch.cuda.is_available() else "no CUDA device is visible to torch"


def kernels(backend: str) -> ModuleType:
    """The module behind a backend other than "eager"."""
    return native


def perturb_kernel(backend: str) -> Callable[..., None]:
    """The launch behind `noise.Plan.run` of a backend other than "eager"."""
    if backend == "triton":
        return import_module("pyunlearn.triton_kernels.perturb").perturb
    return native.perturb


def choose(backend: str | None, device: torch.device) -> str:
    """The backend an op takes for tensors on `device`. ValueError or RuntimeError where `backend` cannot serve."""
    if backend is None:
        return next(b for b in ORDER.get(device.type, ("eager",)) if not unavailable(b))
    reason = unavailable(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} is not available: {reason}")
    if backend not in ORDER.get(device.type, ("eager",)):
        raise ValueError(
            f"backend={backend!r}: cannot take tensors on {device}; needs one of {ORDER.get(device.type, ('eager',))}"
        )
    return backend
