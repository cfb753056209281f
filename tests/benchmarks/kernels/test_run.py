"""Every case by every implementation, on tiny shapes and on a CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.kernels import cases, report, run
from benchmarks.kernels.cases import Impl
from benchmarks.kernels.report import figures, table
from benchmarks.results import read

from ..records import KEYS

ROOT = Path(__file__).parent.parent.parent.parent


def budget(r):
    """Of ours. Perturbed weights show their noise, 1e-5, with the rounding of weights of 0.02."""
    return 1e-3 if r["op"] == "perturbed" else 1e-5 if r["dtype"] == "float32" else 1e-2


def test_cpu_part_writes_records_and_table(tmp_path):
    options = ["cpu", "--small", "--rounds", "2", "--out", str(tmp_path), "-k", "not bfloat16 and not logp"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # or it thinks it is a worker
    env = {**inherited, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read(tmp_path / "ops.json")
    assert {r["impl"] for r in records} >= {
        "eager",
        "compile",
        "cpu",
        "cpu in place",
        "cpu, freed memory kept",
        "one write alone",
        "one write alone, freed memory kept",
        "three GEMMs alone",
    }
    for r in records:
        assert set(r) == KEYS | {"threads"}
        assert len(r["time_ms"]["samples"]) in (2, 6)  # three times what was asked for where a run is short
        if r["impl"].startswith("cpu"):
            assert r["error_vs_fp64"] < budget(r)
    text = (tmp_path / "ops.md").read_text()
    assert "| implementation | ms | x eager | % of copy |" in text
    assert "3x eager: " in text


def test_gpu_parts_run_and_resume(tmp_path, session):
    """The code of the GPU parts, on the CPU: records, report, and nothing measured twice."""
    ours = run.Chosen(["cpu", "torch"])
    assert run.run("logits", session("logits"), ours) == 0
    assert run.run("linear", session("linear"), ours) == 0
    logits, linear = (read(tmp_path / f"{part}.json") for part in ("logits", "linear"))
    assert {r["case"] for r in logits} == set(cases.KINDS)
    assert {r["case"] for r in linear} == {*cases.LINEAR_KINDS, cases.Product.name}
    assert run.run("weights", session("weights")) == 0
    weights = read(tmp_path / "weights.json")
    pairs_and_noise = {cases.ONE_TENSOR, cases.MANY_TENSORS, cases.ONE_PAIR, cases.MANY_PAIRS}
    assert {r["case"] for r in weights} == pairs_and_noise | {next(iter(cases.NORMS))}
    for r in [*logits, *linear, *weights]:
        assert "failed" not in r, r
        assert set(r) == KEYS | {"threads"}, r
        assert r["device"] == measure.machine()["name"]
        if r["impl"].startswith("cpu"):
            assert r["error_vs_fp64"] < budget(r)

    before = (tmp_path / "logits.json").read_text()
    again = session("logits", seconds=0.0)
    assert run.run("logits", again, ours) == 0
    assert (tmp_path / "logits.json").read_text() == before

    report.write(tmp_path)
    text = (tmp_path / "ops.md").read_text()
    assert f"## {cases.ENTROPY}, bfloat16" in text
    assert "TFLOP/s" in text
    for name in cases.KINDS:
        assert f"![{figures.slug(name)}.svg]" in text
        assert (tmp_path / f"{figures.slug(name)}.svg").read_text().startswith("<?xml")


def test_late_run_leaves_the_rest(tmp_path, session, capsys):
    assert run.run("linear", session("linear", seconds=-1.0), run.Chosen(["cpu"])) == 0
    assert re.search(r"linear: 0 measured, [1-9]\d* left", capsys.readouterr().out)
    assert not (tmp_path / "linear.json").exists()


def test_failing_peer_is_recorded_and_stops_nothing(tmp_path, session, monkeypatch):
    def broken(case, t):
        raise RuntimeError("no kernel image | is available")

    def wrong(case, t):
        return [2 * t["logits"].detach()]

    offered = {"broken": Impl(broken), "wrong": Impl(wrong)}
    one = cases.Logits(cases.NLL, torch.bfloat16, 4, 50)
    monkeypatch.setattr(run, "implementations", lambda case: offered)
    monkeypatch.setitem(run.PLANS, "logits", lambda device, small: iter([(one, False)]))
    assert run.run("logits", session("logits")) == 0
    first, second = records = read(tmp_path / "logits.json")
    assert first["failed"] == "RuntimeError: no kernel image | is available"
    assert second["time_ms"]["median"] > 0
    assert second["error_vs_fp64"] > 1
    text = "\n".join(table.by_shape(records))
    assert "failed: RuntimeError: no kernel image / is available" in text
