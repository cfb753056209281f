"""The native build: no framework headers, and CUDA code that compiles without spills wherever nvcc is."""

import re
import shutil
import subprocess
from pathlib import Path

from pyunlearn import _C

ROOT = Path(__file__).parent.parent


def test_csrc_knows_nothing_of_torch():
    sources = [*(ROOT / "csrc").rglob("*.*")]
    assert len(sources) >= 8
    for source in sources:
        includes = re.findall(r'#include [<"]([^>"]+)', source.read_text())
        assert not [name for name in includes if "torch" in name or "ATen" in name or "c10" in name], source


def test_arithmetic_is_shared():
    """CPU and CUDA kernels take the statistics' formulas from the same headers."""
    for kernel in ("cpu/token_stats_lanes.cpp", "cuda/token_stats.cu"):
        text = (ROOT / "csrc" / kernel).read_text()
        assert '#include "../math/row_state.h"' in text
        assert '#include "../math/token_gradient.h"' in text


def test_cuda_kernels_do_not_spill(tmp_path):
    """ptxas' report: no spilled register, and few enough for the occupancy the kernels count on."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert _C.cuda_archs or _C.cuda_reason  # the module says why there is nothing to compile
        return
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    archs = [arch for arch in ("80", "90a", "100") if f"compute_{arch.rstrip('a')}\n" in known + "\n"]
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "--threads=2"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    source = str(ROOT / "csrc/cuda/token_stats.cu")
    command = [nvcc, *flags, "-c", source, "-o", str(tmp_path / "token_stats.o")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert archs
    assert len(registers) == 31 * len(archs)  # 18 accumulate, 12 backward, 1 finish
    assert set(spills) == {0}
    assert max(registers) <= 96  # two blocks of 256 threads an SM at least
