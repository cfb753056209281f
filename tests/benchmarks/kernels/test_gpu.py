"""What gpu.sh runs, as far as it runs without a GPU."""

import os
import re
import subprocess
from pathlib import Path

from benchmarks.kernels import gpu, run
from benchmarks.kernels.cases import Impl

ROOT = Path(__file__).parent.parent.parent.parent


def test_gpu_script():
    script = str(ROOT / "benchmarks" / "kernels" / "gpu.sh")
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
