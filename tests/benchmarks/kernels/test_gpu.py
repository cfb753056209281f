"""What gpu.sh runs, as far as it runs without a GPU."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.kernels import calls, gpu
from benchmarks.kernels.cases import Impl

from ...ops.conftest import FUSED
from ...ops.rows import device_of

ROOT = Path(__file__).parent.parent.parent.parent
SCRIPT = str(ROOT / "benchmarks" / "kernels" / "gpu.sh")
MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "datasets", "cutlass", "quack", "liger_kernel"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize("call", calls.CALLS)
def test_dry_run(call, tmp_path):
    """Every step on the CPU, without the libraries that a GPU machine may lack: results, logs, one file of it all."""
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    env = {**inherited, "PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}
    command = [SCRIPT, call, "--small", "--out", f"{tmp_path}/out", "--commit", "0123456789ab", "--seconds", "900"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    told = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert [*told] == [*calls.CALLS[call][1]]
    fine = ("ok", calls.NOT_TRIED, "nvidia-smi" + calls.MISSING)
    assert {one["status"] for one in told.values()} <= {*fine}, told
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        names = set(tar.getnames())
    wanted = {
        "first": "environment.json logits.json weights.json linear.json logs/tests logs/memcheck",
        "second": "step.json mrd-toy.json geffect-toy.json logs/quack",
    }
    assert names >= {f"out/{name}" for name in wanted[call].split()}
    if call == "first":
        facts = json.loads((tmp_path / "out" / "environment.json").read_text())
        assert facts["commit"] == "0123456789ab"
        assert min(facts["copy_gbps"], facts["read_gbps"], facts["product_tflops"]) > 0


class Machine:
    """A clock, and commands that take as long as `takes` says, by a word of theirs; else no time at all."""

    def __init__(self, takes, ends=None):
        self.takes, self.ends, self.now, self.started, self.stopped = takes, ends or {}, 0.0, [], []

    def clock(self):
        return self.now

    def process(self, words, log, into, environment):
        machine, line = self, " ".join(words)
        end = self.now + next((seconds for word, seconds in self.takes.items() if word in line), 0.0)
        codes = next((codes for word, codes in self.ends.items() if word in line), [0])
        self.started.append((self.now, line))

        class Started:
            def wait(self, seconds):
                if end > machine.now + seconds:
                    machine.now += max(seconds, 0)
                    return None
                machine.now = max(machine.now, end)
                return codes.pop(0) if len(codes) > 1 else codes[0]

            def end(self):
                machine.stopped.append(line)
                machine.now += calls.GRACE

        return Started()


def call_on(machine, call, tmp_path, monkeypatch):
    monkeypatch.setattr(calls.shutil, "which", lambda name: f"/usr/bin/{name}")
    seconds, boxes = calls.CALLS[call]
    steps = [calls.step(name, box, tmp_path / "out", small=False) for name, box in boxes.items()]
    run = calls.Run(steps, seconds, tmp_path / "out", tmp_path / "all.tgz", {}, machine.process, machine.clock)
    return run, run.all()


@pytest.mark.parametrize("call", calls.CALLS)
def test_a_call_ends_on_time(call, tmp_path, monkeypatch):
    """Also where no command ever ends; each step has its box then, and none is left out."""
    seconds, boxes = calls.CALLS[call]
    assert sum(boxes.values()) <= seconds
    machine = Machine({"": 1e9})
    run, status = call_on(machine, call, tmp_path, monkeypatch)
    assert status == 1
    assert machine.now <= seconds
    assert len(machine.stopped) == len(machine.started) >= len(boxes) - 1
    late = "left out: build has not ended"
    assert {name for name, told in run.statuses().items() if told == late} == (
        {"check_cuda"} if call == "first" else set()
    )
    assert all(told in ("stopped at the end of its time", late) for told in run.statuses().values())


def test_what_a_step_leaves_goes_to_the_next_ones(tmp_path, monkeypatch):
    machine = Machine({"setup.py": 90.0, "tests/ops": 140.0, "benchmarks logits": 115.0})
    run, status = call_on(machine, "first", tmp_path, monkeypatch)
    assert status == 0
    assert set(run.statuses().values()) == {"ok"}
    assert run.told["build"] == {"status": "ok", "seconds": 90.0, "at": 0.0}  # Triton was checked beside it
    assert machine.now == 90.0 + 140.0 + 115.0  # boxes of 70 and 110


def test_faults_stop_nothing(tmp_path, monkeypatch):
    """A build that fails, a kernel that breaks the context (a new process goes on), tools that are not there."""
    machine = Machine({"benchmarks logits": 10.0}, {"setup.py": [1], "benchmarks logits": [75, 75, 0], "linear": [3]})
    run, status = call_on(machine, "first", tmp_path, monkeypatch)
    assert status == 1
    expected = {"build": "exit status 1", "linear": "exit status 3"}
    assert run.statuses() == {name: expected.get(name, "ok") for name in calls.CALLS["first"][1]}
    assert sum("benchmarks logits" in line for _, line in machine.started) == 3
    monkeypatch.setattr(calls.shutil, "which", lambda name: None if name in ("ncu", "compute-sanitizer") else name)
    steps = [calls.step(name, 10, tmp_path / "out", small=False) for name in ("profile", "memcheck")]
    run = calls.Run(steps, 60, tmp_path / "out", tmp_path / "all.tgz", {}, machine.process, machine.clock)
    assert run.all() == 0
    assert run.statuses() == {"profile": "ncu is not here", "memcheck": "compute-sanitizer is not here"}


def test_commands_are_ended_with_all_they_started(tmp_path):
    """By an interrupt first: what can sum up does."""
    code = "import time, subprocess\np = subprocess.Popen(['sleep', '60'])\nprint(p.pid, flush=True)\n"
    code += "try: time.sleep(60)\nexcept KeyboardInterrupt: print('summed up')"
    process = calls.Process((sys.executable, "-c", code), tmp_path / "log", None, dict(os.environ))
    assert process.wait(3) is None
    process.end()
    child, rest = (tmp_path / "log").read_text().split(maxsplit=1)
    assert rest == "summed up\n"
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_arguments(tmp_path):
    done = subprocess.run([SCRIPT, "frist"], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHON": sys.executable})  # fmt: skip
    assert done.returncode == 2
    assert "'frist': did you mean first? needs one of first, second, build, environment" in done.stderr
    with pytest.raises(SystemExit, match="needs a folder with wheels, there is none in it"):
        calls.main(["first", "--small", "--wheels", str(tmp_path)])
    assert calls.environment(None, "", 1, small=True).get("COMMIT") == os.environ.get("COMMIT")


def test_every_path_of_the_cuda_kernels_is_checked(capsys):
    """By the very check that gpu.sh runs, on the kernels built for the CPU."""
    with FUSED["cuda"]():
        assert gpu.check(device_of("cuda"), "logits", ["cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"checked {2 * len(gpu.WIDTHS) * 9}, wrong 0"
    assert gpu.check("cpu", "logits", ["nobody"]) == 1


def test_small_check_catches_a_wrong_result(monkeypatch, capsys):
    assert gpu.check("cpu", "all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 100
    assert all(line.startswith("ok ") for line in lines[:-1])
    monkeypatch.setattr(gpu, "ours", lambda case: iter([("cuda", Impl(lambda case, t: [3 * a for a in case.answer]))]))
    assert gpu.check("cpu", "logits") == 1
    assert all(line.startswith("WRONG") for line in capsys.readouterr().out.splitlines()[:-1])


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
