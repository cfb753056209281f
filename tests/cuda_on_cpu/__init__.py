"""The CUDA kernels built for the CPU (include/cuda_runtime.h says how): their values are tested without a GPU."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "cuda_on_cpu"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi"]
NAMES = ["PU_CUDA", "PU_CUDA_ON_CPU", 'PU_CUDA_ARCHS="on the CPU"', 'PU_CUDA_REASON=""', 'PU_COMPILER="tests"']
NAMES += ["PU_ISA=portable", "PU_LANES=4"]


def load() -> ModuleType:
    """pyunlearn's native module with the CUDA kernels in place of the CPU's; built where a source is newer."""
    target = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(target)
    spec = importlib.util.spec_from_file_location("tests.cuda_on_cpu._C", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(target: Path) -> None:
    sources = [ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/cuda").glob("*.cu")]
    newest = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*"), *HERE.glob("**/*.h"), Path(__file__)])
    if target.exists() and target.stat().st_mtime > newest:
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", str(target)], check=True)


def compiled(source: Path) -> str:
    """The object file of one source."""
    includes = [f"-I{HERE}/include", f"-I{source.parent}", f"-I{sysconfig.get_paths()['include']}"]
    includes += [f"-I{pybind11.get_include()}", *(["-mf16c"] if os.uname().machine == "x86_64" else [])]
    target = str(BUILD / f"{source.name}.o")
    command = ["g++", *FLAGS, *(f"-D{name}" for name in NAMES), *includes, "-x", "c++", "-c", "-", "-o", target]
    text = f'#line 1 "{source}"\n{poisoned(source.read_text())}'
    subprocess.run(command, input=text, text=True, check=True)
    return target


def poisoned(source: str) -> str:
    """Every declaration of shared memory followed by what fills it with NaN when a block begins."""

    def followed(match: re.Match[str]) -> str:
        names = re.findall(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?=[,;])", match[1])
        return match[0] + "".join(f" cuda_on_cpu::poison({name});" for name in names)

    return re.sub(r"__shared__ ([^;()]*;)", followed, source)
