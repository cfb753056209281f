"""What torchrun starts: a process that forks off one for each case it is told of. `Ranks` in launch.py tells it."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    with (folder / f"orders.{rank}").open(encoding="utf-8") as orders:
        (folder / f"ready.{rank}").touch()
        for line in orders:
            name, case_folder, port = json.loads(line)
            room, function = name.split(".")
            case = getattr(importlib.import_module(f"tests.distributed.cases.{room}"), function)
            child = os.fork()
            if child == 0:
                run(case, Path(case_folder), f"{name}.{rank}.pt", port)
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(code)


def run(case: Callable[[Path], object], folder: Path, result: str, port: int) -> None:
    """The case in this process, which ends with it. A file with the result's name is a whole one."""
    gc.freeze()  # as in tests/conftest.py
    torch.set_num_threads(1)
    # each case's processes meet at a store of their own: torchrun's holds what those of the last case have said
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        if not hasattr(case, "joins_itself"):
            torch.distributed.init_process_group("gloo")
        torch.save(case(folder), folder / f"{result}.part")
        torch.distributed.barrier()
        os.replace(folder / f"{result}.part", folder / result)
        # torch's gloo threads want the GIL that the interpreter's teardown holds while it joins them: leave without it.
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
