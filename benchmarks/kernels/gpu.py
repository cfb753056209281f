"""What gpu.sh runs beside the benchmarks: `python -m benchmarks.kernels.gpu environment|check|profile|ncu`.

environment: prints what the measurements were made with, and what the device does at best. check: every op on shapes
for every path of the kernels by every backend of ours, against float64; run it under a memory or race checker too.
profile: three cases at 8192 x 128256, one run each between cudaProfilerStart and Stop. ncu CSV: prints a profiler's
figures as JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..measure import commit, copy_gbps, error_of, machine, output_of, product_tflops, read_gbps, versions
from ..results import is_ours
from .calls import COUNTERS
from .cases import AT_ONCE, ENTROPY, KINDS, KL, LINEAR_KINDS, Case, Impl, Linear, Logits
from .impls import implementations
from .plans import weights

BUDGET = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# (V, rows, the column of a wider matrix they begin at): less than a block's stride, whole packs, rows split in parts,
# clusters of 2 and more (72 KB a row) in bfloat16 and float32, odd rows at odd addresses
WIDTHS = (
    (999, 5, 0), (999, 300, 0), (1024, 4, 0), (8200, 3, 0), (40000, 3, 0), (128256, 2, 0),
    (999, 3, 1), (8201, 3, 3), (40001, 3, 1), (128257, 2, 1),
)  # fmt: skip


def environment(device: str, small: bool = False) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": machine(device)["name"], "commit": commit(), "versions": versions(device)}
    size = 16 if small else 4096
    facts |= {"copy_gbps": round(copy_gbps(device, size), 1), "read_gbps": round(read_gbps(device, size), 1)}
    facts["product_tflops"] = float(f"{product_tflops(device, 256 if small else 8192):.3g}")
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


def check(device: str, ops: str = "all", backends: Sequence[str] = (), widths: Sequence[int] = ()) -> int:
    """1 when a result is off, an op fails or there is nothing to check; which one is printed. backends, widths: only
    these, if any."""
    wrong = checked = 0
    for dtype in BUDGET:
        cases: list[Case] = [
            Logits(name, dtype, n, v, device, first)
            for v, n, first in WIDTHS
            for name in KINDS
            if not widths or v in widths
        ]
        if ops == "all":
            cases += [Linear(name, dtype, 37, 999, 32, device) for name in LINEAR_KINDS]
            cases += [case for case in weights(device, small=True) if case.dtype == dtype]
        for case in cases:
            for name, impl in ours(case):
                if backends and name.split()[0] not in backends:
                    continue
                try:
                    error = error_of(case.sample(impl.run(case, case.fresh())), case.answer)
                except Exception as problem:  # the rest is still worth checking
                    text, right = f"failed: {str(problem)[:200]}", False
                else:
                    text, right = f"error {error:.1e}", error < BUDGET[dtype]
                wrong, checked = wrong + (not right), checked + 1
                shape = f"{str(dtype)[6:]}, N={case.n}, V={case.v}, from {getattr(case, 'first', 0)}"
                print(f"{'ok   ' if right else 'WRONG'} {case.name}, {shape}: {name}: {text}", flush=True)
    print(f"checked {checked}, wrong {wrong}")
    return int(wrong > 0 or checked == 0)


def profile(device: str, small: bool = False) -> int:
    """What is between start and stop is what a profiler sees that was told to wait for it."""
    n, v = (8, 999) if small else (8192, 128256)
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
    parser.add_argument("what", choices=("environment", "check", "profile", "ncu"))
    parser.add_argument("file", nargs="?", type=Path, help="ncu: its CSV")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="environment, profile: tiny shapes")
    parser.add_argument("--ops", choices=("all", "logits"), default="all", help="check: which")
    parser.add_argument("--backends", default="", help="check: only these, comma-separated")
    parser.add_argument("--widths", default="", help="check: only logits of these V, comma-separated")
    args = parser.parse_args()
    if args.what == "environment":
        print(json.dumps(environment(args.device, args.small), indent=1))
    elif args.what == "check":
        backends, widths = ([*filter(None, words.split(","))] for words in (args.backends, args.widths))
        return check(args.device, args.ops, backends, [int(v) for v in widths])
    elif args.what == "profile":
        return profile(args.device, args.small)
    else:
        print("[\n" + ",\n".join(json.dumps(row) for row in ncu(args.file)) + "\n]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
