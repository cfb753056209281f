"""The native build: no framework headers, and CUDA code that compiles without spills wherever nvcc is."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.kernels import evidence
from benchmarks.results import RESULTS
from pyunlearn import _C

ROOT = Path(__file__).parent.parent


def test_module_is_what_was_asked_for():
    """`make` says PYUNLEARN_CUDA, and builds anew when that changes."""
    setting = os.environ.get("PYUNLEARN_CUDA", "auto")
    if setting == "on":
        archs = os.environ.get("PYUNLEARN_CUDA_ARCHS")
        nvcc = os.environ.get("CUDACXX", "nvcc")
        assert _C.cuda_archs.split() == (archs.split(";") if archs else evidence.known_archs(nvcc))
    elif setting == "off":
        assert not _C.cuda_archs
        assert "PYUNLEARN_CUDA=off" in _C.cuda_reason
    else:
        assert bool(_C.cuda_archs) != bool(_C.cuda_reason)
        reasons = "switched off at build time|nvcc was not found at build time|nvcc knows none of the architectures "
        assert re.match(reasons if _C.cuda_reason else r"\d+a?( \d+a?)*$", _C.cuda_archs or _C.cuda_reason)


def test_every_requirement_is_pinned():
    """By constraints.txt, within the range that pyproject.toml promises."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = [re.search(rf"^{name} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)[1]
             for name in ("requires", "dependencies", "gguf", "integrations", "test", "lint")]  # fmt: skip
    ranges = [Requirement(line) for body in lists for line in json.loads(f"[{body.strip().rstrip(',')}]")]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert len(ranges) > 20
    for python in ("3.10", "3.11", "3.12", "3.13"):
        machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
        exact = {}
        for pin in pins:
            if pin.marker is None or pin.marker.evaluate(machine):
                (version,) = pin.specifier
                assert version.operator == "=="
                assert exact.setdefault(canonicalize_name(pin.name), version.version) == version.version
        for requirement in ranges:
            assert requirement.specifier, requirement
            if requirement.marker is not None and not requirement.marker.evaluate(machine):
                continue
            assert exact[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.skipif("CI" not in os.environ or sys.version_info < (3, 11), reason="tests of them may be left out here")
@pytest.mark.parametrize("library", ["trl", "lightning"])
def test_continuous_integration_leaves_no_integration_out(library):
    assert importlib.util.find_spec(library) is not None


def test_csrc_knows_nothing_of_torch():
    sources = [*(ROOT / "csrc").rglob("*.*")]
    assert len(sources) >= 8
    for source in sources:
        includes = re.findall(r'#include [<"]([^>"]+)', source.read_text())
        assert not [name for name in includes if "torch" in name or "ATen" in name or "c10" in name], source


def test_arithmetic_is_shared():
    """CPU and CUDA kernels take the statistics' formulas from the same headers."""
    for kernel in ("cpu/token_stats_lanes.cpp", "cuda/row.cuh"):
        text = (ROOT / "csrc" / kernel).read_text()
        assert '#include "../math/row_state.h"' in text
        assert '#include "../math/token_gradient.h"' in text
    for kernel in ("cpu/perturb_lanes.cpp", "cuda/perturb.cu"):
        assert '#include "../math/philox.h"' in (ROOT / "csrc" / kernel).read_text()


# Kernels a file holds for each architecture, and the most registers and bytes of shared memory of one: 256 threads,
# so 80 registers are three blocks an SM and 128 are two; dynamic shared memory comes on top in value_and_grad.
KERNELS = {
    "token_stats": (55, 128, 64),  # 36 accumulate, 18 backward, 1 finish
    "topk": (6, 48, 29 << 10),
    "segment_dot": (2, 80, 6 << 10),
    "value_and_grad": (18, 80, 448),
    "perturb": (8, 64, 0),  # pairs of source and target dtypes
}


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_kernels_do_not_spill(name):
    """ptxas' report: no spilled register, and the occupancy that the kernels count on. Hot loops take no more than the
    committed page says, where its compiler is here."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    archs = [arch for arch in evidence.known_archs(nvcc) if arch in ("80", "90a")]  # the page has them all
    found = evidence.compiled(nvcc, ROOT / f"csrc/cuda/{name}.cu", archs)
    kernels, most_registers, most_shared = KERNELS[name]
    assert archs
    assert len(found) == kernels * len(archs)
    assert not [kernel for kernel in found if kernel.spilled]
    assert max(kernel.registers for kernel in found) <= most_registers
    assert max(kernel.shared for kernel in found) <= most_shared
    page = (RESULTS / evidence.PAGE).read_text()
    if evidence.version_of(nvcc) in page:
        assert not evidence.grown(found, page)


def test_every_cuda_file_is_checked():
    assert {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} == set(KERNELS)


def test_perturb_kernels_access_16_bytes(tmp_path):
    """Every kernel has 16-byte loads (where it reads weights) and stores."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=compute_90", "--ptx"]
    target = tmp_path / "perturb.ptx"
    subprocess.run([nvcc, *flags, str(ROOT / "csrc/cuda/perturb.cu"), "-o", str(target)], check=True)
    kernels = re.split(r"\.entry (?=\w+perturb_kernel)", target.read_text())[1:]
    assert len(kernels) == 8
    wide = r"(v4\.(b|f|u)32|v2\.(b|f|u)64)"
    for kernel in kernels:
        name = kernel.split("(")[0]
        assert re.search(rf"\bst[\w.]*\.{wide}", kernel), name
        assert "Nothing" in name or re.search(rf"\bld[\w.]*\.{wide}", kernel), name
