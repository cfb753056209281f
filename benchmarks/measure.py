"""What is measured beside the time: copy bandwidth, peak memory, the error against float64, and the machine."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import Case


def error_against(case: Case, got: list[torch.Tensor]) -> float:
    """max |ours - fp64| / max |fp64| over the case's results."""
    pairs = zip(got, case.answer, strict=True)
    return max(float((mine.detach().double() - true).abs().max() / true.abs().max()) for mine, true in pairs)


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory taken above the start during `call`, results included, as torch's allocator saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = call()
    held = peak = 0
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def copy_gbps(megabytes: int = 256, rounds: int = 15) -> float:
    """Bytes read plus bytes written per second of a large copy: the streaming limit times are held against."""
    source = torch.rand(megabytes << 18)
    target = torch.empty_like(source)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / sorted(times)[len(times) // 2] / 1e9


def machine() -> dict[str, str]:
    """Device name, and the folder its results go to."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        name = f"{names[0].strip()}, {len(names)} cores" if names else name
    return {"name": name, "folder": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")}


def commit() -> str:
    """The commit measured, with "+" when the tree has changes."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
