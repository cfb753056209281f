"""Processes: who computes what, and what becomes of a mistake."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from pyunlearn.distributed import Processes
from pyunlearn.store import Damaged, Store

from . import joins_itself

CPU = torch.device("cpu")


@joins_itself
def joined(_: Path) -> dict[str, Any]:
    before = Processes(CPU)
    processes = Processes.start()
    return {
        "before": (before.started, before.count, before.rank, before.first, before.writes),
        "after": (processes.started, processes.count, processes.rank, processes.first, processes.writes),
        "device": str(processes.device),
    }


def shared(folder: Path) -> dict[str, Any]:
    """All that processes say to each other."""
    processes, rank = Processes(CPU), torch.distributed.get_rank()
    items = processes.share(range(7))
    squares = torch.zeros(7, dtype=torch.float64)
    squares[items] = torch.tensor(items, dtype=torch.float64).square() / 3
    mine = squares.clone()
    total = processes.combine(squares)
    together = Processes(CPU, together=True)
    results: dict[str, Any] = {
        "items": items, "total": total, "unchanged": torch.equal(squares, mine),
        "agreed": processes.agree({"rank": rank, "words": ["a", None]}),
        "together": (together.count, together.rank, together.first, together.writes, together.share("abc")),
        "combined together": together.combine(mine),
    }  # fmt: skip

    def make() -> str:
        """What the first process, which takes its time, has left."""
        note = folder / "note"
        if rank == 0:
            time.sleep(0.5)
            note.write_text("of the first")
        return note.read_text()

    results["in turn"] = processes.in_turn(make)
    with processes.first_first():
        results["time"] = time.monotonic()
        if rank == 0:
            time.sleep(0.3)
            results["time"] = time.monotonic()
    processes.wait()
    return results


class Special(Exception):
    def __init__(self, one: int, two: int):
        super().__init__("cannot be pickled")


def raised(folder: Path) -> dict[str, Any]:
    """The block raises on the first process; then all go on together."""
    processes, rank = Processes(CPU), torch.distributed.get_rank()
    results: dict[str, Any] = {"ran": []}
    errors: dict[str, BaseException] = {
        "user": ValueError("sigma=0: needs more"), "damaged": Damaged(folder / "file", "half"),
        "interrupt": KeyboardInterrupt(), "special": Special(1, 2),
    }  # fmt: skip
    for name, error in errors.items():
        try:
            with processes.first_first():
                results["ran"].append(name)
                raise error
        except BaseException as caught:
            results[name] = (type(caught).__name__, str(caught))
    results["agreed"] = processes.agree(rank)
    results["in turn"] = processes.in_turn(lambda: "made")
    return results


def stored(folder: Path) -> dict[str, Any]:
    """Two processes share the units of one store, and put some of them at once."""
    processes = Processes(CPU)
    store = processes.in_turn(lambda: Store(folder / "store", {"seed": 0}))
    made: list[int] = []

    def make(i: int) -> dict[str, torch.Tensor]:
        made.append(i)
        return {"value": torch.full((3,), float(i))}

    units = {i: f"draw-{i}" for i in processes.share(range(6))}
    mine = store.finish(units, make, "draws", processes)
    processes.wait()
    everything = {i: f"draw-{i}" for i in range(6)}
    values = store.finish(everything, make, "draws", processes, progress=False)
    for i in range(50):  # under one name, and read while the other writes
        store.put("contended", {"row": [i] * 1000})
        store.put("table", torch.full((1000,), i))
        assert set(store.get("contended")["row"]) <= set(range(50))
        assert len(set(store.get("table").tolist())) == 1
    processes.wait()
    together = Processes(CPU, together=True)
    store.finish({"all": "together"}, lambda _: {"rank": torch.distributed.get_rank()}, "units", together)
    processes.wait()
    return {
        "made": made, "mine": sorted(mine), "values": torch.stack([values[i]["value"] for i in range(6)]),
        "names": store.names(), "together": store.get("together"),
    }  # fmt: skip


def fails(folder: Path) -> None:
    if torch.distributed.get_rank() == 0:
        raise ValueError("the reason")
    torch.distributed.barrier()


@joins_itself
def hangs(folder: Path) -> None:
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(600)
