"""`python -m benchmarks`: measure every case by every implementation on this machine, store JSON, print the table.

Results go to benchmarks/results/<device>/: ops.json (one record a measurement, raw samples included) and ops.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pyunlearn import _C

from .measure import commit, copy_gbps, machine
from .table import markdown

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "-k", metavar="EXPR", default="", help='only cases that match, as in pytest -k, for example "NLL and bfloat16"'
    )
    parser.add_argument("--rounds", type=int, default=9, help="samples a measurement (default 9)")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: torch's own)"
    )
    parser.add_argument("--out", type=Path, help="folder for ops.json and ops.md (default benchmarks/results/<device>)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["PYUNLEARN_BENCH_ROUNDS"] = str(args.rounds)
    os.environ["PYUNLEARN_BENCH_SMALL"] = "1" if args.small else ""

    bandwidth = copy_gbps(16 if args.small else 256)
    with tempfile.TemporaryDirectory() as temporary:
        raw = Path(temporary) / "raw.json"
        options = [
            "-q",
            "-k",
            args.k,
            f"--benchmark-json={raw}",
            "--benchmark-disable-gc",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        options += ["--benchmark-columns=median,min,max,rounds", "--benchmark-group-by=param:case"]
        code = pytest.main([str(HERE / "test_cpu.py"), *options])
        if code != 0:
            return int(code)
        measured = json.loads(raw.read_text())["benchmarks"]

    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pytest-benchmark")}
    versions |= {"python": platform.python_version(), "instruction set": _C.instruction_set(), "compiler": _C.compiler}
    records = [record(entry, bandwidth, versions) for entry in measured]
    folder = args.out or HERE / "results" / machine()["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ops.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
    (folder / "ops.md").write_text(markdown(records))
    print(markdown(records))
    print(f"wrote {folder}/ops.json and ops.md")
    return 0


def record(entry: dict, bandwidth: float, versions: dict[str, str]) -> dict:
    """One measurement in the form every benchmark of this project is stored in."""
    info, stats = entry["extra_info"], entry["stats"]
    times = {key: stats[key] * 1e3 for key in ("median", "min", "max")}
    times["samples"] = [round(t * 1e3, 4) for t in stats["data"]]
    percent = 100 * info["bytes"] / 1e9 / stats["median"] / bandwidth if info["op"] == "token_stats" else None
    measured = {"time_ms": times, "copy_gbps": round(bandwidth, 2), "percent_of_copy": percent}
    return {**info, "device": machine()["name"], **measured, "commit": commit(), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
