"""What is measured: time, copy bandwidth, peak memory, the error against float64; and on which machine."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).parent.parent
FLUSH_BYTES = 2 << 30
LIBRARIES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "trl",
             "nvidia-cutlass-dsl")  # fmt: skip
T = TypeVar("T")


def timed(prepare: Callable[[int], T], run: Callable[[T], object], device: str, seconds: float = 0.2) -> list[float]:
    """Milliseconds of each of 5 to 30 runs, as many as fit in `seconds`, after warm-up; `prepare` is not counted.

    On a GPU: CUDA events around the run, 2 GiB read before it that nothing has written since: the caches hold none of
    the run's data, and no line of another's that would be written back while it is timed. Work is queued meanwhile, so
    launching costs nothing where it takes less than about half a millisecond; a run that waits for the GPU in between
    pays for that.
    """
    samples: list[float] = []
    for i in range(-3, 30):
        if i >= 5 and sum(samples) > 1e3 * seconds:
            break
        inputs = prepare(i)
        if device == "cpu":
            start = time.perf_counter()
            output = run(inputs)
            elapsed = 1e3 * (time.perf_counter() - start)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush_buffer().sum()
            begin.record()
            output = run(inputs)
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end)
        del output
        if i >= 0:
            samples.append(elapsed)
    return samples


def seconds(call: Callable[[], T], device: str) -> tuple[float, T]:
    """(wall time of one call, the GPU's work included; what it gives)"""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def release() -> None:
    """What nobody holds is given back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


@cache
def flush_buffer() -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device="cuda")


def spread(samples: list[float]) -> dict[str, Any]:
    """The `time_ms` of a record."""
    short = [float(f"{sample:.5g}") for sample in samples]
    return {"median": statistics.median(short), "min": min(short), "max": max(short), "samples": short}


def error_of(got: Sequence[torch.Tensor | None], answer: Sequence[torch.Tensor]) -> float:
    """max |x - fp64| / max |fp64| over those of a case's results that were computed."""
    pairs = [(mine, true) for mine, true in zip(got, answer, strict=True) if mine is not None]
    return max(float((mine.detach().double() - true).abs().max() / true.abs().max()) for mine, true in pairs)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Memory taken above the start during `call`, results included, as torch's allocator saw it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - start
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    held = peak = 0
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def can_keep_memory() -> bool:
    """Whether the allocator is one that keep_freed_memory knows."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def keep_freed_memory() -> None:
    """From here on glibc uses large blocks again that were freed. As it is, a large tensor is fresh pages every time,
    as to all users of torch on a CPU, and who allocates more pays for their first touch."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4
    libc.mallopt(mmap_max, 0), libc.mallopt(trim_threshold, 2**31 - 1)


def copy_gbps(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes read plus bytes written per second of a large copy: the streaming limit times are held against."""
    source = torch.rand(megabytes << 18, device=device)
    target = torch.empty_like(source)
    times = timed(lambda i: source, target.copy_, device)
    return 2 * source.numel() * 4 / statistics.median(times) / 1e6


def read_gbps(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes read per second by the sum of a large array."""
    source = torch.rand(megabytes << 18, device=device)
    times = timed(lambda i: source, torch.sum, device)
    return source.numel() * 4 / statistics.median(times) / 1e6


def product_tflops(device: str = "cpu", size: int = 8192) -> float:
    """Of a product of two random bfloat16 matrices: the ceiling of what is bound by products."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    times = timed(lambda i: a, b.matmul, device)
    return 2 * size**3 / statistics.median(times) / 1e9


def machine(device: str = "cpu") -> dict[str, str]:
    """Device name, and the folder its results go to."""
    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        name = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            names = re.findall(r"model name\s*: (.*)", info.read_text())
            name = f"{names[0].strip()}, {len(names)} cores" if names else name
    return {"name": name, "folder": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}


def versions(device: str = "cpu", libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that are installed; on a GPU also of CUDA and the driver."""
    installed = {"python": platform.python_version()}
    for name in libraries:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device != "cpu":
        installed["cuda"] = str(torch.version.cuda)
        drivers = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        installed["driver"] = drivers.split("\n")[0]
    return installed


def commit() -> str:
    """The commit measured: what the variable COMMIT says, else git's, with "+" when the tree has changes."""
    if given := os.environ.get("COMMIT"):
        return given[:12]
    head = output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if output_of("git", "-C", str(ROOT), "status", "--porcelain", "-uno") else "")


def output_of(*command: str) -> str:
    """What a command prints, "" if it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
