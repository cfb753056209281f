"""The benchmarks on tiny shapes and on a CPU: every case by every implementation. Times mean nothing here."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.kernels import cases, evidence, gpu, gradients, noise, peers, plans, report, run, step, table, targets
from benchmarks.kernels.cases import Impl
from benchmarks.results import Records

ROOT = Path(__file__).parent.parent.parent
KEYS = {
    "op", "case", "impl", "device", "dtype", "N", "V", "H", "time_ms", "bytes", "copy_gbps",
    "percent_of_copy", "peak_bytes", "error_vs_fp64", "commit", "versions",
}  # fmt: skip


@pytest.fixture
def session(tmp_path):
    """A run of tiny shapes on the CPU, by part."""
    return lambda part, seconds=60.0: run.Session(part, "cpu", tmp_path, seconds, small=True)


def budget(r):
    """Of ours. Perturbed weights show their noise, 1e-5, with the rounding of weights of 0.02."""
    return 1e-3 if r["op"] == "perturbed" else 1e-5 if r["dtype"] == "float32" else 1e-2


def test_cpu_part_writes_records_and_table(tmp_path):
    options = ["cpu", "--small", "--rounds", "2", "--out", str(tmp_path), "-k", "not bfloat16"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # or it thinks it is a worker
    env = {**inherited, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "ops.json").read_text())
    assert {r["impl"] for r in records} >= {"eager", "compile", "cpu", "cpu in place", "three GEMMs alone"}
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
    ours = ["cpu", "torch"]
    assert run.run("logits", session("logits"), ours) == 0
    assert run.run("linear", session("linear"), ours) == 0
    logits, linear = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("logits", "linear"))
    assert {r["case"] for r in logits} == set(cases.KINDS)
    assert {r["case"] for r in linear} == {*cases.LINEAR_KINDS, cases.Product.name}
    assert run.run("weights", session("weights"), []) == 0
    weights = json.loads((tmp_path / "weights.json").read_text())
    pairs_and_noise = {noise.ONE_TENSOR, noise.MANY_TENSORS, gradients.ONE_PAIR, gradients.MANY_PAIRS}
    assert {r["case"] for r in weights} == pairs_and_noise | {next(iter(gradients.NORMS))}
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
        assert f"![{report.slug(name)}.svg]" in text
        assert (tmp_path / f"{report.slug(name)}.svg").read_text().startswith("<?xml")


def test_late_run_leaves_the_rest(tmp_path, session, capsys):
    assert run.run("linear", session("linear", seconds=-1.0), ["cpu"]) == 0
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
    assert run.run("logits", session("logits"), []) == 0
    first, second = records = json.loads((tmp_path / "logits.json").read_text())
    assert first["failed"] == "RuntimeError: no kernel image | is available"
    assert second["time_ms"]["median"] > 0
    assert second["error_vs_fp64"] > 1
    text = "\n".join(table.by_shape(records))
    assert "failed: RuntimeError: no kernel image / is available" in text


def test_record_stands_until_what_it_measured_changes(tmp_path):
    file, shape = tmp_path / "logits.json", {"op": "a", "case": "b", "dtype": "c", "N": 1, "V": 2, "H": 0}
    first = Records(file, "one", {"torch": "1"})
    mine, theirs = ({**shape, "impl": impl, "commit": "one", "versions": {"torch": "1"}} for impl in ("cuda", "quack"))
    first.add(mine)
    first.add(theirs)
    assert Records(file, "one", {"torch": "1"}).has(mine)
    later = Records(file, "two", {"torch": "1"})
    assert not later.has(mine)
    assert later.has(theirs)
    assert not Records(file, "one", {"torch": "2"}).has(theirs)
    assert not Records(file, "one", {"torch": "1"}, fresh=True).has(mine)
    later.add({**mine, "commit": "two"})
    assert [r["commit"] for r in json.loads(file.read_text())] == ["two", "one"]


def test_gpu_cases_cover_the_shapes_asked_for():
    logits = [case for case, _ in plans.gpu_logits()]
    bf16 = {(case.name, case.n, case.v) for case in logits if case.dtype == torch.bfloat16}
    assert bf16 == set(itertools.product(cases.KINDS, plans.ROWS, plans.VOCABULARIES))
    assert {case.name for case in logits if case.dtype == torch.float32} == set(cases.KINDS)
    linear = [case for case, _ in plans.gpu_linear()]
    assert {(case.n, case.v, case.h) for case in linear if case.name == cases.MEAN} >= set(
        itertools.product((1024, 4096, 16384), (128256,), (2048, 4096))
    )
    assert (cases.TOKENS_ENTROPY, *targets.TARGET_SHAPE) in {(case.name, case.n, case.v, case.h) for case in linear}
    passes = {cases.NLL: 3, cases.ENTROPY: 3, cases.STATISTICS: 1, cases.KL: 5, cases.AT_ONCE: 2}
    for case in logits:
        assert case.bytes == passes[case.name] * case.n * case.v * case.dtype.itemsize
        assert peers.of(case).keys() <= {"liger", "liger sum", "quack", "quack in place", "trl"}
    frozen = cases.Linear(cases.FROZEN, torch.bfloat16, 10, 100, 20)
    assert frozen.flops == 2 * 2 * 10 * 100 * 20
    assert frozen.bytes == 2 * (2 * 100 * 20 + 3 * 10 * 20)


def test_runs_rotate_and_reset():
    case = cases.Logits(cases.NLL, torch.float32, 2, 50)
    case.windows = 3
    one, two = case.fresh(0), case.fresh(1)
    assert not torch.equal(one["logits"], two["logits"])
    assert one["logits"].data_ptr() != two["logits"].data_ptr()
    kept = one["logits"].detach().clone()
    one["logits"].data.fill_(7.0)  # an implementation may overwrite its input
    assert torch.equal(case.fresh(3)["logits"], kept)


def record(impl, ms, case=cases.ENTROPY, n=8192, v=128256, h=0, peak=0, **more):
    size = cases.Logits(case, torch.bfloat16, n, v).bytes if case in cases.KINDS else 0
    times = {"median": ms, "min": ms, "max": ms, "samples": [ms]}
    fields = {"op": "token_stats", "case": case, "impl": impl, "device": "D", "dtype": "bfloat16", "N": n, "V": v}
    return {
        **fields, "H": h, "time_ms": times, "bytes": size, "copy_gbps": 4300.0, "peak_bytes": peak,
        "percent_of_copy": size / ms / 1e6 / 43.0, "error_vs_fp64": 1e-3, "commit": "c", "versions": {}, **more,
    }  # fmt: skip


def test_targets_say_met_missed_or_not_measured():
    limit = record("cuda", 1.0)["bytes"] / 4300e6  # ms at the copy's rate
    shape = dict(zip(("n", "v", "h"), targets.TARGET_SHAPE, strict=True))
    one_b = {"case": "NPO + KL, 1B, batch 8 x 256", "op": "step"}
    records = [
        record("cuda", limit / 0.95), record("triton", limit / 0.5), record("trl", limit), record("eager", limit * 5),
        record("cuda", 1.0, n=64), record("trl", 1.1, n=64),
        record("cuda", 21.0, cases.TOKENS_ENTROPY, **shape),
        record("cuda", 100.0, peak=50, **one_b), record("eager", 120.0, peak=100, **one_b),
    ]  # fmt: skip
    lines = {line.split(" | ")[0].lstrip("| "): line for line in targets.markdown(records)}

    def verdict(start):
        (line,) = (line for text, line in lines.items() if text.startswith(start))
        return line

    assert verdict("forward + backward >= 90 %").endswith("| 95 % | logp + entropy, bfloat16, N=8192, V=128256 | met |")
    assert verdict("every shape").endswith(" | missed at 1 of 2 |")
    assert "0.95x trl" in verdict("every shape")
    assert verdict("logp + entropy >= 4x eager").endswith(" | met |")
    assert verdict("logp + entropy >= 3x torch.compile").endswith(" | not measured |")
    assert verdict("weighted NLL + entropy from hidden").endswith(" | met |")
    assert verdict("whole step at 1B >= 1.3x").endswith(" | missed at 1 of 1 |")
    assert verdict("whole step at 1B <= 0.6x").endswith(" | met |")


def test_steps_agree_and_are_recorded(tmp_path, session, monkeypatch):
    assert step.run(session("step")) == 0
    records = json.loads((tmp_path / "step.json").read_text())
    assert [(r["case"].split(",")[0], r["impl"]) for r in records] == list(
        itertools.product(("NPO + KL", "WGA + KL"), ("eager", "cpu"))
    )
    for r in records:
        assert set(r) == KEYS | {"threads"}
        assert r["N"] == 2 * 2 * 16
        assert r["peak_bytes"] > 0
    assert "| eager | " in "\n".join(table.steps(records))

    before = (tmp_path / "step.json").read_text()
    assert step.run(session("step")) == 0
    assert (tmp_path / "step.json").read_text() == before

    right = step.token_logp
    monkeypatch.setattr(step, "token_logp", lambda model, batch: 1.01 * right(model, batch))
    found = list(step.measure(session("step"), step.Step("toy", "WGA", "cpu", 2, 16), ["eager", "cpu"]))
    assert found[0]["time_ms"]
    assert found[1]["failed"].startswith("ValueError: the first losses are ")


def test_gpu_script():
    script = str(ROOT / "benchmarks" / "gpu.sh")
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    parts = re.search(r"^PARTS=\((.*)\)$", Path(script).read_text(), re.MULTILINE).group(1).split()
    assert parts[:2] == ["build", "correct"]
    for part in parts:
        assert part.removeprefix("bench-") in (*run.PLANS, "step") or f"\n{part}() {{" in Path(script).read_text()
    done = subprocess.run([script, "bulid"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown part 'bulid'; parts: build correct bench-logits" in done.stderr


def test_small_check_catches_a_wrong_result(monkeypatch, capsys):
    assert gpu.check("cpu", "all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 30
    assert all(line.startswith("ok ") for line in lines)
    monkeypatch.setattr(gpu, "ours", lambda case: iter([("cuda", Impl(lambda case, t: [3 * a for a in case.answer]))]))
    assert gpu.check("cpu", "logits") == 1
    assert all(line.startswith("WRONG") for line in capsys.readouterr().out.splitlines())


def test_profiler_figures(tmp_path):
    names = ["ID", "Kernel Name", "Grid Size", "Block Size", "gpu__time_duration.sum", "launch__registers_per_thread"]
    rows = [
        names,
        ["", "", "", "", "us", "register/thread"],
        ["0", "accumulate", "(8, 1, 1)", "(256, 1, 1)", "3", "40"],
    ]
    file = tmp_path / "ncu.csv"
    file.write_text("==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows) + "\n")
    found = {"kernel": "accumulate", "grid": "(8, 1, 1)", "block": "(256, 1, 1)", "time": "3 us"}
    assert gpu.ncu(file) == [{**found, "registers": "40 register/thread"}]
    file.write_text("==ERROR== no counters\n")
    assert gpu.ncu(file) == []


def test_commit_without_git(monkeypatch):
    monkeypatch.setattr(measure, "output", lambda *command: "")
    monkeypatch.setenv("COMMIT", "0123456789abcdef")
    assert measure.commit() == "0123456789ab"
    monkeypatch.delenv("COMMIT")
    assert measure.commit() == "unknown"


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2pu4cuda17accumulate_kernelIfLb1EEEvPf' for 'sm_90a'
ptxas info    : Function properties for _ZN2pu4cuda17accumulate_kernelIfLb1EEEvPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function '_ZN2pu4cuda17accumulate_kernelIfLb1EEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN2pu4cuda17accumulate_kernelIfLb1EEEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 44 registers, used 1 barriers
"""


def test_evidence_reads_the_compilers_report():
    kernels = evidence.parse(PTXAS, "token_stats.cu")
    name = "accumulate_kernel<float, true>" if shutil.which("c++filt") else "_ZN2pu4cuda17accumulate_kernelIfLb1EEEvPf"
    assert kernels == [
        evidence.Kernel("token_stats.cu", name, "sm_90a", 40, 16, 20, 512),
        evidence.Kernel("token_stats.cu", name, "sm_80", 44, 0, 0, 0),
    ]
    text = "\n".join(evidence.markdown(kernels, {"cuda": [], "triton": ["NVIDIA H200"]}, "nvcc"))
    assert "In this order: sm_80, sm_90a;" in text  # whatever the order of the report
    assert f"| token_stats.cu | `{name}` | 44, 40 | 0, 20 | 0, 16 | 0, 512 |" in text
    assert "backend `cuda`: not run on a GPU yet" in text
    assert "backend `triton`: measured on NVIDIA H200" in text
    assert "limits, not measurements" in text


TRITON = """
import torch, triton, triton.language as tl
from benchmarks.kernels import evidence

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)

x = torch.ones(100)
with evidence.compiling(90) as kernels:
    double[(1,)](x, 100, BLOCK=128)
(kernel,) = kernels
(line,) = evidence.assembled(kernel.asm["ptx"], "double<float32>", "90a", kernel.metadata.shared, "script.py")
assert bool((x == 1).all()), "launched"
print(line.name, line.arch, 0 < line.registers < 64, line.spilled)
"""


def test_evidence_compiles_triton_without_a_gpu(tmp_path):
    script = tmp_path / "script.py"  # triton reads a kernel's source, and its interpreter must be off
    script.write_text(TRITON)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if importlib.util.find_spec("triton"):
        assert done.stdout == "double<float32> sm_90a True 0\n", done.stderr
    else:
        assert "No module named 'triton'" in done.stderr


def test_committed_evidence_has_every_kernel():
    page = (ROOT / "benchmarks" / "results" / evidence.PAGE).read_text()
    sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources += [ROOT / "triton_kernels" / f"{name}.py" for name in ("token_stats", "topk", "ghost")]
    names = {name for file in sources for name in re.findall(r"\b(\w+_kernel)\(", file.read_text())}
    assert names
    assert not [name for name in names if f"`{name}" not in page], "run python -m benchmarks evidence"


def test_committed_results_say_where_they_come_from():
    files = [path for name in report.FILES for path in (ROOT / "benchmarks" / "results").rglob(f"{name}.json")]
    assert files
    for file in files:
        for r in json.loads(file.read_text()):
            assert set(r) >= KEYS
            assert r["commit"] != "unknown"
            assert {"torch", "python"} <= set(r["versions"])
