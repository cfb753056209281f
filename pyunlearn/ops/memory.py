"""How much memory there is, and memory that is quick to write to for the first time."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LARGE = 8 << 20  # bytes from which huge pages pay
HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; where it is large and fresh memory of a CPU's, in huge pages if the system gives them on request:
    they spare its first writer one page fault in 4 KB, which may cost more than what is written. They are a hint."""
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if not HUGE_PAGES or torch.compiler.is_compiling() or type(out) is not Tensor:
        return out
    if out.device.type == "cpu" and out.nbytes >= LARGE:
        begin = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (out.data_ptr() + out.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), HUGE_PAGES)
    return out


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`, on a GPU with what torch holds for reuse. No synchronisation."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(free_in_machine(), free_in_container())


def budget_of(device: torch.device) -> int:
    """A quarter of the free memory. The driver of a GPU is asked once, so that no step waits for its answer."""
    if device.type == "cuda":
        return max(0, torchs_share(device) - torch.cuda.memory_allocated(device)) // 4
    return free_bytes(device) // 4


@cache
def torchs_share(device: torch.device) -> int:
    """Of a GPU: what nothing but torch held when this was first asked."""
    return free_bytes(device) + torch.cuda.memory_allocated(device)


def free_in_machine() -> int:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_in_container(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the limits of this process's control groups (v1 and v2), and of all above them, leave; 2^62 without any.

    A page cache that the kernel gives up first, inactive_file, counts as free. Where a container sees its own group
    as the root, the paths of `own` are not there: the roots are looked at in any case.
    """
    free = 1 << 62
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        groups = []
    groups += [["", "", "/"], ["", "memory", "/"]]
    for _, controllers, path in groups:
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                free = min(free, left_in(folder, limit, usage, cache))
    return free


def left_in(folder: Path, limit: str, usage: str, cache: str) -> int:
    """Bytes below one group's limit; 2^62 where it has none."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return 1 << 62
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(0, int(most) - int((folder / usage).read_text()) + int(stat.get(cache, 0)))
    except (OSError, ValueError):
        return 1 << 62
