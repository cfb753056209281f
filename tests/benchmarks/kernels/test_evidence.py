"""The compiler's report is read, and the page of it is of this tree's kernels."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import evidence
from benchmarks.measure import versions
from benchmarks.results import RESULTS

ROOT = Path(__file__).parent.parent.parent.parent


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


GROWN = """
from benchmarks.kernels import evidence
from benchmarks.results import RESULTS

kernels = evidence.triton_kernels(["90a"])
assert sum(kernel.loop is not None for kernel in kernels) >= 10
assert not [kernel for kernel in kernels if kernel.spilled]
grown = evidence.grown(kernels, (RESULTS / evidence.PAGE).read_text())
assert not grown, grown
print("right")
"""


def test_hot_loops_of_triton_kernels_have_not_grown(tmp_path):
    """Against the committed page, where Triton is of its version; in a process without the interpreter."""
    pytest.importorskip("triton")
    if f"triton {versions()['triton']}," not in (RESULTS / evidence.PAGE).read_text():
        pytest.skip(f"the page is of another Triton than {versions()['triton']}")
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env = {**inherited, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", GROWN], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "right", done.stderr[-3000:]


def test_committed_evidence_has_every_kernel():
    page = (RESULTS / evidence.PAGE).read_text()
    sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources += [ROOT / "triton_kernels" / f"{name}.py" for name in ("token_stats", "token_gradient", "topk", "ghost")]
    names = {name for file in sources for name in re.findall(r"\b(\w+_kernel)\(", file.read_text())}
    assert names
    assert not [name for name in names if f"`{name}" not in page], "run python -m benchmarks evidence"
