"""Runs a named case on several CPU processes that speak by gloo, and brings back what each process made of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def run_case(name: str, folder: Path, processes: int = 2, seconds: float = 180) -> list[Any]:
    """The case `name`, ROOM.FUNCTION in tests/distributed/cases, under torchrun -> what it returns, by rank.

    folder: is the case's argument. Fails with the end of the processes' stderr if one of them raises, and after
    `seconds`; no process is left either way.
    """
    if processes not in started:
        started[processes] = Ranks(processes)
    try:
        return started[processes].run(name, folder, seconds)
    except BaseException:
        started.pop(processes).stop()
        raise


def stop_all() -> None:
    while started:
        started.popitem()[1].stop()


class Ranks:
    """torchrun and its processes (worker.py), which take one case after another; each case has processes forked off
    these. What cases import is so imported once, and none meets what another has left.
    """

    def __init__(self, count: int):
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.stderr = self.folder / "stderr"
        ready = [self.folder / f"ready.{rank}" for rank in range(count)]
        self.orders = []
        for rank in range(count):
            os.mkfifo(self.folder / f"orders.{rank}")
            # opened both ways it waits for no reader; when it closes, or this process ends, the reader ends too
            self.orders.append(os.open(self.folder / f"orders.{rank}", os.O_RDWR))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        with self.stderr.open("w", encoding="utf-8") as stderr:
            self.launcher = subprocess.Popen(
                [*torchrun, "-m", "tests.distributed.worker", str(self.folder)],
                cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
        self.wait("the start", ready, 180)

    def run(self, name: str, folder: Path, seconds: float) -> list[Any]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for order in self.orders:
            os.write(order, json.dumps([name, str(folder), port]).encode() + b"\n")
        results = [folder / f"{name}.{rank}.pt" for rank in range(len(self.orders))]
        self.wait(f"case {name}", results, seconds)
        return [torch.load(result, weights_only=True) for result in results]

    def wait(self, what: str, files: list[Path], seconds: float) -> None:
        """For the files. AssertionError, with all processes ended, if torchrun ends before, or after `seconds`."""
        said, end = self.stderr.stat().st_size, time.monotonic() + seconds
        while not all(file.exists() for file in files):
            code = self.launcher.poll() if time.monotonic() < end else f"none after {seconds:g} s"
            if code is not None:
                end_processes(self.launcher)
                stderr = self.stderr.read_bytes()[said:].decode(errors="replace")
                raise AssertionError(f"{what}: exit code {code}\n{stderr[-4000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        for order in self.orders:
            os.close(order)
        end_processes(self.launcher)
        shutil.rmtree(self.folder)


def end_processes(launcher: subprocess.Popen[Any]) -> None:
    """Ends torchrun and its workers. Each worker leads a session of its own, so that only torchrun reaches them."""
    if launcher.poll() is None:
        launcher.terminate()  # torchrun passes it on, and kills after 30 s
        try:
            launcher.wait(timeout=45)
        except subprocess.TimeoutExpired:
            launcher.kill()
            launcher.wait()


started: dict[int, Ranks] = {}
