"""Runs a worker script on two CPU processes that speak by gloo, and brings back what each saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def run_on_two(worker: Path, folder: Path) -> list[Any]:
    """torchrun of `worker` with `folder` as its argument -> what `save_and_leave` was given, by rank."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, str(worker), str(folder)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told = process.communicate(timeout=120)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too
    assert process.returncode == 0, told[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def save_and_leave(results: Any, folder: str | Path) -> None:
    """The end of a worker."""
    torch.save(results, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    # torch's gloo threads want the GIL that the interpreter's teardown holds while it joins them: leave without it.
    os._exit(0)
