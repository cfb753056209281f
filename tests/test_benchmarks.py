"""The benchmark runner on tiny shapes: every case by every implementation. Times mean nothing here."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEYS = {
    "op", "case", "impl", "device", "dtype", "N", "V", "H", "time_ms", "bytes", "copy_gbps",
    "percent_of_copy", "peak_bytes", "error_vs_fp64", "commit", "versions",
}  # fmt: skip


def test_runner_writes_records_and_table(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--small",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "-k",
        "not bfloat16",
    ]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # or it thinks it is a worker
    env = {**inherited, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "ops.json").read_text())
    assert {r["impl"] for r in records} >= {"eager", "compile", "cpu", "cpu in place", "three GEMMs alone"}
    for r in records:
        assert set(r) >= KEYS
        assert len(r["time_ms"]["samples"]) == 2
        if r["impl"].startswith("cpu"):
            assert r["error_vs_fp64"] < 1e-5
    table = (tmp_path / "ops.md").read_text()
    assert "| implementation | ms | x eager | % of copy |" in table
    assert "3x eager: " in table


def test_committed_results_say_where_they_come_from():
    files = sorted((ROOT / "benchmarks" / "results").rglob("ops.json"))
    assert files
    for file in files:
        for r in json.loads(file.read_text()):
            assert set(r) >= KEYS
            assert r["commit"] != "unknown"
            assert {"torch", "python"} <= set(r["versions"])
