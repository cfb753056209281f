"""Every way from a checkout to an installed package, and each again after another one."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKOUT = (
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "csrc",
    "pyproject.toml",
    "pyunlearn",
    "setup.py",
    "triton_kernels",
)
INSTALLED = """
import importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("pyunlearn").submodule_search_locations[0])
(module,) = folder.glob("_C.*.so")
spec = importlib.util.spec_from_file_location("_C", module)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.instruction_set()
assert native.cuda_reason == "switched off at build time (PYUNLEARN_CUDA=off)"
print(folder)
"""

# Unoptimised, and what is the same after preprocessing is compiled once: what is tested is the way there, not the code.
COMPILER = """#!{python} -IS
import hashlib, os, pathlib, shutil, subprocess, sys
words = sys.argv[1:]
headers = [folder for word, folder in zip(words, words[1:]) if word == "-isystem"]  # elsewhere in each isolated build
command = ["c++", *words, *(f"-fmacro-prefix-map={folder}=" for folder in headers), "-O0"]
if "-c" not in command:
    sys.exit(subprocess.call(command))
place = command.index("-o")
target, to_text = command[place + 1], command[:place] + command[place + 2 :] + ["-E", "-P"]
done = subprocess.run(to_text, stdout=subprocess.PIPE)
if done.returncode:
    sys.exit(done.returncode)
flags = [word for word in words if word.startswith(("-f", "-m", "-std", "-W"))]
name = hashlib.sha256(done.stdout + repr(flags).encode()).hexdigest()
compiled = pathlib.Path(__file__).with_name(name + ".o")
if not compiled.exists():
    if code := subprocess.call(command):
        sys.exit(code)
    shutil.copyfile(target, compiled)
shutil.copyfile(compiled, target)
"""


def call(*command: str | Path, folder: Path, **environment: str) -> str:
    """The command's standard output; what it said where it failed."""
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def requirements(tmp_path_factory) -> Path:
    """A folder with what an isolated build needs."""
    folder = tmp_path_factory.mktemp("requirements")
    requires = json.loads(re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])
    command = [sys.executable, "-m", "pip", "download", "-q", "--retries", "1", "-d", str(folder)]
    download = subprocess.run(
        [*command, "-c", str(ROOT / "constraints.txt"), *requires], capture_output=True, text=True
    )
    if download.returncode and re.search("connection|timed out|resolve host", download.stderr, re.IGNORECASE):
        pytest.skip(f"no package index can be reached for {', '.join(requires)}")
    assert download.returncode == 0, download.stderr
    return folder


class Environment:
    """A virtual environment of its own, without even pip."""

    def __init__(self, folder: Path, requirements: Path, compiler: Path):
        venv.create(folder / "venv", symlinks=True)
        self.folder, self.python = folder, folder / "venv/bin/python"
        self.environment = {
            "CXX": str(compiler),
            "PIP_FIND_LINKS": str(requirements),
            "PIP_NO_INDEX": "1",
            "PYTHONPATH": "",
            "PYUNLEARN_CUDA": "off",
        }

    def pip(self, *arguments: str | Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check"]
        call(*pip, *arguments, folder=self.folder, **self.environment)

    def package(self) -> Path:
        """Where the installed package is; it has all its files, and the native module loads."""
        folder = Path(call(self.python, "-c", INSTALLED, folder=self.folder, PYTHONPATH="").strip())
        source, patterns = (
            ROOT / "pyunlearn",
            ("**/*.py", "triton_kernels/*.py", "py.typed", "report/templates/*", "**/*.yaml"),
        )
        files = [path.relative_to(source) for pattern in patterns for path in source.glob(pattern)]
        assert len(files) > 60
        assert not [name for name in files if not (folder / name).is_file()]
        return folder


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(COMPILER.replace("{python}", sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path, requirements, compiler) -> Environment:
    return Environment(tmp_path, requirements, compiler)


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for source in (ROOT / name for name in CHECKOUT):
        if source.is_dir():
            shutil.copytree(
                source, folder / source.name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        else:
            shutil.copy(source, folder)
    return folder


def test_one_checkout_again_and_again(environment, checkout):
    """The environment that a build was isolated in is gone at the next one, and so may be some of the modules."""
    gone = checkout / "pyunlearn/gone.py"
    gone.touch()
    environment.pip("install", "--no-deps", checkout)
    package = environment.package()
    assert environment.folder / "venv" in package.parents
    assert (package / "gone.py").exists()

    gone.unlink()
    environment.pip("install", "--no-deps", checkout)
    assert environment.package() == package
    assert not (package / "gone.py").exists()

    environment.pip("install", "--no-deps", "--editable", checkout)
    assert environment.package() == checkout / "pyunlearn"
    assert not package.exists()


def test_from_sdist_to_wheel_to_install(environment, checkout):
    environment.pip("install", "setuptools", "pybind11")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    call(environment.python, "-c", build, folder=checkout, **environment.environment)
    (sdist,) = (checkout / "dist").iterdir()
    shutil.move(sdist, environment.folder)
    shutil.rmtree(checkout)
    environment.pip("wheel", "--no-deps", "-w", "wheels", environment.folder / sdist.name)
    environment.pip("install", "--no-deps", *(environment.folder / "wheels").iterdir())
    assert environment.folder / "venv" in environment.package().parents
