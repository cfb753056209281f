"""The CUDA kernels built for the CPU (include/cuda_runtime.h says how): their values are tested without a GPU."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    newest = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*"), *HERE.glob("**/*.h")])
    if target.exists() and target.stat().st_mtime > newest:
        return
    includes = [f"-I{HERE}/include", f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    if os.uname().machine == "x86_64":
        includes.append("-mf16c")
    objects = [str(BUILD / f"{source.stem}{source.suffix}.o") for source in sources]
    compiler = ["g++", *FLAGS, *(f"-D{name}" for name in NAMES), *includes, "-x", "c++"]
    commands = [[*compiler, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(partial(subprocess.run, check=True), commands))
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", str(target)], check=True)
