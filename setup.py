"""Builds pyunlearn._C with CMake and ninja. The build needs pybind11, cmake, ninja and a C++17 compiler, never torch.

Environment: PYUNLEARN_CUDA=auto|on|off, PYUNLEARN_CUDA_ARCHS="80;90a;100", MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CleanBuild(build):
    """A wheel holds what the checkout holds now, not also what it held when it was last built."""

    def run(self) -> None:
        shutil.rmtree(self.build_platlib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake project stands for the one extension; setuptools decides where the module goes.

    It is configured afresh: the last build's cmake and ninja may have been in an isolated environment that is gone.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = ROOT / self.build_temp
        folder.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake") or sys.exit("cmake not found: pip install cmake ninja")
        configure = [
            cmake, "--fresh", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        for name in ("PYUNLEARN_CUDA", "PYUNLEARN_CUDA_ARCHS"):
            if os.environ.get(name):
                configure.append(f"-D{name}={os.environ[name]}")
        subprocess.run(configure, check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([cmake, "--build", str(folder), *jobs], check=True)


setup(
    # pyunlearn/triton_kernels, benchmarks and examples are links to the folders of these names
    packages=find_packages(include=["pyunlearn", "pyunlearn.*"]),
    package_data={
        "pyunlearn": ["py.typed", "examples/*.yaml"],
        "pyunlearn.benchmarks": ["**/*.yaml", "**/*.sh"],
        "pyunlearn.report": ["templates/*.html", "templates/*.js"],
        "pyunlearn.recipes": ["*.yaml", "grids/*.yaml", "published/*.yaml"],
    },
    ext_modules=[Extension("pyunlearn._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
