"""Runs a named case on several CPU processes that speak by gloo, and brings back what each process made of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def run_case(name: str, folder: Path, processes: int = 2, seconds: float = 180) -> list[Any]:
    """torchrun of the case `name`, ROOM.FUNCTION in tests/distributed/cases -> what it returns, by rank.

    folder: is the case's argument. Fails with the end of the processes' stderr if one of them raises, and after
    `seconds`; no process is left either way.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with (folder / f"{name}.stderr").open("w+", encoding="utf-8") as stderr:
        launcher = subprocess.Popen(
            [*torchrun, "-m", "tests.distributed.worker", name, str(folder)],
            cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip
        try:
            code: int | str = launcher.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = f"none after {seconds:g} s"
        finally:
            stop(launcher)
        stderr.seek(0)
        assert code == 0, f"case {name}: exit code {code}\n{stderr.read()[-4000:]}"
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(processes)]


def stop(launcher: subprocess.Popen[Any]) -> None:
    """Ends torchrun and its workers. Each worker leads a session of its own, so that only torchrun reaches them."""
    if launcher.poll() is None:
        launcher.terminate()  # torchrun passes it on, and kills after 30 s
        try:
            launcher.wait(timeout=45)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()
