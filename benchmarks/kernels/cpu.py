"""The CPU part: every case by every implementation under pytest-benchmark (test_cpu.py), in one process."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from ..measure import commit, copy_gbps, machine, spread, versions
from ..results import Record, Records
from .cases import MEMORY_BOUND


def run(folder: Path, match: str, rounds: int, small: bool, threads: int) -> int:
    """Writes ops.json in `folder`; returns pytest's exit status."""
    import pytest

    from pyunlearn import _C

    torch.set_num_threads(threads)
    os.environ["PYUNLEARN_BENCH_ROUNDS"] = str(rounds)
    os.environ["PYUNLEARN_BENCH_SMALL"] = "1" if small else ""
    if not small:
        torch.ones(1 << 29)  # 2 GiB: a virtual machine may have memory only once it was touched
    bandwidth = copy_gbps("cpu", 16 if small else 256)
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "raw.json"
        options = ["-q", "-k", match, "-p", "no:cacheprovider", "-p", "no:xdist"]
        options += [f"--benchmark-json={raw}", "--benchmark-disable-gc", "--benchmark-group-by=param:case"]
        options += ["--benchmark-columns=median,min,max,rounds"]
        code = pytest.main([str(Path(__file__).parent / "test_cpu.py"), *options])
        if code != 0:
            return int(code)
        measured = json.loads(raw.read_text())["benchmarks"]

    used = versions("cpu", ("torch", "numpy", "pytest-benchmark"))
    used |= {"instruction set": _C.instruction_set(), "compiler": _C.compiler}
    file = folder / "ops.json"
    of = commit()  # before a stored file goes
    file.unlink(missing_ok=True)  # what is not of these measurements
    records = Records(file, of, used)
    for entry in measured:
        records.add(record(entry, bandwidth, records))
    return 0


def record(entry: dict, bandwidth: float, of: Records) -> Record:
    """One measurement in the form every benchmark of this project is stored in."""
    info, stats = entry["extra_info"], entry["stats"]
    percent = 100 * info["bytes"] / 1e9 / stats["median"] / bandwidth if info["op"] in MEMORY_BOUND else None
    measured = {"time_ms": spread([1e3 * t for t in stats["data"]]), "percent_of_copy": percent}
    made_with = {"commit": of.commit, "versions": of.versions}
    return {**info, "device": machine()["name"], "copy_gbps": round(bandwidth, 2), **made_with, **measured}
