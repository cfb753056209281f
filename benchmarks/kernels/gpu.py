"""What gpu.sh runs beside the benchmarks: `python -m benchmarks.kernels.gpu environment|check|profile|counters|ncu`.

environment: prints what the measurements were made with. check: every op on small odd shapes by every backend of ours,
against float64; run it under a memory or race checker. profile: three cases at 8192 x 128256, one run each between
cudaProfilerStart and Stop. counters: prints what the profiler is to count. ncu CSV: prints its figures as JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..measure import commit, error_of, machine, output_of, versions
from ..results import is_ours
from .cases import AT_ONCE, ENTROPY, KINDS, KL, LINEAR_KINDS, Case, Impl, Linear, Logits
from .impls import implementations
from .plans import weights

COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
BUDGET = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def environment(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": machine(device)["name"], "commit": commit(), "versions": versions(device)}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "nvcc": output_of("nvcc", "--version").split("\n")[-1],
        }
    return facts


def ours(case: Case) -> Iterator[tuple[str, Impl]]:
    yield from ((name, impl) for name, impl in implementations(case).items() if is_ours(name))


def check(device: str, ops: str) -> int:
    """1 when a result is off, or an op fails; which one is printed."""
    wrong = 0
    for dtype in BUDGET:
        cases: list[Case] = [Logits(name, dtype, n, 999, device) for name in KINDS for n in (5, 300)]
        if ops == "all":
            cases += [Linear(name, dtype, 37, 999, 32, device) for name in LINEAR_KINDS]
            cases += [case for case in weights(device, small=True) if case.dtype == dtype]
        for case in cases:
            for name, impl in ours(case):
                try:
                    error = error_of(case.sample(impl.run(case, case.fresh())), case.answer)
                except Exception as problem:  # the rest is still worth checking
                    text, right = f"failed: {str(problem)[:200]}", False
                else:
                    text, right = f"error {error:.1e}", error < BUDGET[dtype]
                wrong += not right
                print(f"{'ok   ' if right else 'WRONG'} {case.name}, {str(dtype)[6:]}, N={case.n}: {name}: {text}")
    return int(wrong > 0)


def profile(device: str, n: int = 8192, v: int = 128256) -> int:
    """What is between start and stop is what a profiler sees that was told to wait for it."""
    for kind in (ENTROPY, KL, AT_ONCE):
        case = Logits(kind, torch.bfloat16, n, v, device)
        for name, impl in ours(case):
            impl.run(case, case.fresh())
            t = case.fresh()
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
            impl.run(case, t)
            if device != "cpu":
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()
            print(f"ran {case.name}: {name}")
    return 0


def ncu(path: Path) -> list[dict[str, str]]:
    """Rows of `ncu --csv --page raw`: the kernel's name and COUNTERS with their units."""
    rows = list(csv.reader(line for line in path.read_text().splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return []
    header, units, *kernels = rows
    figures = []
    for row in kernels:
        cells = dict(zip(header, row, strict=True))
        unit = dict(zip(header, units, strict=True))
        figures.append({"kernel": cells["Kernel Name"][:120], "grid": cells["Grid Size"], "block": cells["Block Size"]})
        figures[-1] |= {short: f"{cells[m]} {unit[m]}".strip() for m, short in COUNTERS.items() if m in cells}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.gpu", description=__doc__)
    parser.add_argument("what", choices=("environment", "check", "profile", "ncu", "counters"))
    parser.add_argument("file", nargs="?", type=Path, help="ncu: its CSV")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ops", choices=("all", "logits"), default="all", help="check: which")
    args = parser.parse_args()
    if args.what == "environment":
        print(json.dumps(environment(args.device), indent=1))
    elif args.what == "check":
        return check(args.device, args.ops)
    elif args.what == "profile":
        return profile(args.device)
    elif args.what == "counters":
        print(",".join(COUNTERS))
    else:
        print("[\n" + ",\n".join(json.dumps(row) for row in ncu(args.file)) + "\n]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
