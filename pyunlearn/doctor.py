"""`pyunlearn doctor`: what is here, what is missing and why, which backend each op takes, and whether it is right."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, gaussian_noise, linear_token_stats, segment_dot, token_stats
from .ops import OUTPUTS, TokenStats, backends

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "scipy")
OPTIONAL = {
    "triton": "the Triton kernels on a GPU",
    "gguf": "models from GGUF files",
    "datasets": "data sets from a hub",
    "peft": "LoRA",
}


def main(console: Console | None = None) -> int:
    """Prints the report; returns 0 when everything that is built is right, else 1."""
    console = console or Console()
    console.print(versions())
    console.print(native())
    console.print(routes())
    table, right = self_test()
    console.print(table)
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
    for name in ("cuda", "cpu", "eager"):
        served = [", ".join(backends.OPS) if taken[device] == name else "" for device in devices]
        table.add_row(name, backends.unavailable(name) or "[green]ready[/]", *served)
    return table


def self_test() -> tuple[Table, bool]:
    """Every op's values and gradients against its eager twin in float64, on every backend that is ready here."""
    table = Table("op", "backend", "largest error", "", title="Self-test against float64", title_justify="left")
    right = True
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 48, generator=g), torch.randn(5000, 48, generator=g) / 4
    ref_hidden = hidden + torch.randn(64, 48, generator=g) / 10
    targets = torch.randint(0, 5000, (64,), generator=g)
    logits, reference = hidden @ weight.T, ref_hidden @ weight.T

    def of_logits(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        x = logits.to(dtype).requires_grad_()
        stats = token_stats(x, targets, OUTPUTS, reference=reference.to(dtype), backend=backend)
        return [*values(stats), *torch.autograd.grad((stats.logp + stats.entropy + stats.kl_pq).sum(), x)]

    def of_hidden(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        ref = (ref_hidden.to(dtype), weight.to(dtype))
        stats = linear_token_stats(h, w, targets, outputs=OUTPUTS[:-1], reference=ref, budget_bytes=0, backend=backend)
        return [*values(stats), *torch.autograd.grad((stats.logp + stats.kl_qp).sum(), (h, w))]

    def of_noise(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        return [gaussian_noise(4096, seed=1, name="w", dtype=dtype, backend=backend)]

    def of_pairs(dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        pairs = [(hidden.to(dtype), ref_hidden.to(dtype)), (weight.to(dtype), -weight.to(dtype))]
        return list(segment_dot(pairs, backend=backend))

    def values(stats: TokenStats) -> list[torch.Tensor]:
        return [value.detach() for value in stats.as_dict().values()]

    tests: dict[str, Callable[[torch.dtype, str], list[torch.Tensor]]] = {
        "token_stats": of_logits,
        "linear_token_stats": of_hidden,
        "gaussian_noise": of_noise,
        "segment_dot": of_pairs,
    }
    for op, run in tests.items():
        oracle = run(torch.float64, "eager")
        for backend in backends.ORDER["cpu"]:
            if backends.unavailable(backend):
                continue
            got = run(torch.float32, backend)
            error = max(
                float((mine.double() - true.double()).abs().max() / true.double().abs().max().clamp_min(1))
                for mine, true in zip(got, oracle, strict=True)
            )
            right &= error < 1e-4
            table.add_row(op, backend, f"{error:.1e}", "[green]right[/]" if error < 1e-4 else "[red]wrong[/]")
    return table, right


def installed(name: str) -> str:
    """The version of an installed distribution, or ""."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if importlib.util.find_spec(name) else ""
