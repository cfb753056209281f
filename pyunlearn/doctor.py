"""`pyunlearn doctor`: what is here, what is missing and why, which backend each op takes, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from ._terminal import make_console, print_table
from .ops import (
    OUTPUTS,
    OuterSum,
    TokenStats,
    backends,
    gaussian_noise,
    ghost_dot,
    linear_token_stats,
    segment_dot,
    token_stats,
)

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scipy")
OPTIONAL = {
    "triton": "the Triton kernels on a GPU",
    "gguf": "models from GGUF files",
    "datasets": "data sets from a hub",
    "peft": "LoRA",
    "bitsandbytes": "quantised bases",
}


def main(console: Console | None = None) -> int:
    """Prints the report; returns 0 when everything that is built is right, else 1."""
    console = console or make_console()
    print_table(console, versions())
    print_table(console, native())
    print_table(console, routes())
    table, right = self_test()
    print_table(console, table)
    console.print("[green]Everything that is built is right.[/]" if right else "[red]A self-test failed.[/]")
    return 0 if right else 1


def versions() -> Table:
    table = Table("what", "version", title="Versions", title_justify="left")
    table.add_row("pyunlearn", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in REQUIRED:
        table.add_row(name, installed(name) or f"[red]missing: pip install {name}[/]")
    for name, use in OPTIONAL.items():
        table.add_row(name, installed(name) or f"not installed; needed for {use}: pip install {name}")
    return table


def native() -> Table:
    table = Table("part", "state", title="Native code", title_justify="left")
    if backends.native.unavailable:
        table.add_row("CPU kernels", f"[red]{backends.native.unavailable}[/]")
    else:
        from . import _C

        table.add_row("CPU kernels", f"built with {_C.compiler}, instruction set in use: {_C.instruction_set()}")
        openmp = "OpenMP" if _C.openmp else "no OpenMP: one thread"
        table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores (torch's setting), {openmp}")
        built = (
            f"built for sm_{_C.cuda_archs.replace(' ', ', sm_')}" if _C.cuda_archs else f"not built: {_C.cuda_reason}"
        )
        table.add_row("CUDA kernels", built)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            table.add_row(f"GPU {i}", f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    else:
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no device"
        table.add_row("GPU", f"none: {why}")
    return table


def routes() -> Table:
    devices = tuple(backends.ORDER)
    table = Table(
        "backend", "state", *(f"{device} tensors" for device in devices), title="Backends", title_justify="left"
    )
    taken = {device: backends.choose(None, torch.device(device)) for device in devices}
    for name in backends.NAMES:
        served = [", ".join(backends.OPS) if taken[device] == name else "" for device in devices]
        table.add_row(name, backends.unavailable(name) or "[green]ready[/]", *served)
    return table


def self_test() -> tuple[Table, bool]:
    """Every op's values and gradients against its eager twin in float64, on every backend and device that is here."""
    title = "Self-test against float64"
    table = Table("op", "tensors on", "backend", "largest error", "", title=title, title_justify="left")
    right = True
    tests: dict[str, Callable[..., list[torch.Tensor]]] = {
        "token_stats": of_logits,
        "linear_token_stats": of_hidden,
        "gaussian_noise": of_noise,
        "segment_dot": of_pairs,
        "ghost_dot": of_sums,
    }
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op, run in tests.items():
            for backend in backends.serving(torch.device(device)):
                if backends.unavailable(backend):
                    continue
                size = (3, 300) if backend == "triton" and device == "cpu" else (64, 5000)  # interpreted: slow
                try:
                    got = run(*size, torch.float32, device, backend)
                except Exception as failure:  # whatever it is, the report says it and goes on
                    error, outcome = math.inf, f"{type(failure).__name__}: {failure}"
                else:
                    error = largest_error(got, run(*size, torch.float64, "cpu", "eager"))
                    outcome = f"{error:.1e}"
                right &= error < 1e-4
                table.add_row(op, device, backend, outcome, "[green]right[/]" if error < 1e-4 else "[red]wrong[/]")
    return table, right


def problem(rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """(hidden, weight, hidden of the reference, targets): the same numbers in any dtype, on any device."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, 48, generator=g), torch.randn(vocabulary, 48, generator=g) / 4
    ref_hidden = hidden + torch.randn(rows, 48, generator=g) / 10
    floats = [tensor.to(device, dtype) for tensor in (hidden, weight, ref_hidden)]
    return [*floats, torch.randint(0, vocabulary, (rows,), generator=g).to(device)]


def of_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    hidden, weight, ref_hidden, targets = problem(rows, vocabulary, torch.float32, "cpu")
    logits, reference = ((h @ weight.T).to(device, dtype) for h in (hidden, ref_hidden))
    x = logits.requires_grad_()
    stats = token_stats(x, targets.to(device), OUTPUTS, reference=reference, backend=backend)
    return [*values(stats), *torch.autograd.grad((stats.logp + stats.entropy + stats.kl_pq).sum(), x)]


def of_hidden(rows: int, vocabulary: int, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    hidden, weight, ref_hidden, targets = problem(rows, vocabulary, dtype, device)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    ref = (ref_hidden, weight.detach())
    stats = linear_token_stats(h, w, targets, outputs=OUTPUTS[:-1], reference=ref, budget_bytes=0, backend=backend)
    return [*values(stats), *torch.autograd.grad((stats.logp + stats.kl_qp).sum(), (h, w))]


def of_noise(rows: int, vocabulary: int, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    return [gaussian_noise(rows * 48, seed=1, name="w", device=device, dtype=dtype, backend=backend)]


def of_pairs(rows: int, vocabulary: int, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    hidden, weight, ref_hidden, _ = problem(rows, vocabulary, dtype, device)
    return list(segment_dot([(hidden, ref_hidden), (weight, -weight)], backend=backend))


def of_sums(rows: int, vocabulary: int, dtype: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
    hidden, weight, ref_hidden, _ = problem(rows, rows, dtype, device)
    return [ghost_dot(OuterSum(hidden[None], weight[None]), OuterSum(ref_hidden[None], weight[None]), backend)]


def values(stats: TokenStats) -> list[torch.Tensor]:
    return [value.detach() for value in stats.as_dict().values()]


def largest_error(got: list[torch.Tensor], oracle: list[torch.Tensor]) -> float:
    """Over all results, relative to the largest entry of each, but at least 1."""
    pairs = [(mine.double().cpu(), true.double()) for mine, true in zip(got, oracle, strict=True)]
    return max(float((mine - true).abs().max() / true.abs().max().clamp_min(1)) for mine, true in pairs)


def installed(name: str) -> str:
    """The version of an installed distribution, or ""."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(name) else ""
