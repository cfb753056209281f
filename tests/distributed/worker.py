"""What torchrun starts: one process of one case. `run_case` in launch.py calls it."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import torch


def main(name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    room, function = name.split(".")
    case = getattr(importlib.import_module(f"tests.distributed.cases.{room}"), function)
    gc.freeze()  # as in tests/conftest.py
    if not hasattr(case, "joins_itself"):
        torch.distributed.init_process_group("gloo")
    torch.save(case(folder), folder / f"{name}.{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    # torch's gloo threads want the GIL that the interpreter's teardown holds while it joins them: leave without it.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
