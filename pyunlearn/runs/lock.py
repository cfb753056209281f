"""One job at a time on a folder: a file that says which process holds it, from which machine, since when."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .._files import OTHER_FOLDER, is_running, unwritable

A_COPY = "copy the run to where it can, and name the copy"  # where a command writes into the run that it reads


class InUse(OSError):
    """Another process works on the same files."""


@contextmanager
def held(path: Path, what: Path, remedy: str = OTHER_FOLDER) -> Iterator[None]:
    """The lock file `path` is this process's inside the block, and gone after it, however the block ends.

    A lock whose process no longer runs on this machine is taken over. what: the file or folder that errors name.

    Raises InUse that names the process that has it, and OSError as `unwritable`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        take(path, what)
    except InUse:
        raise
    except OSError as error:
        raise unwritable(str(what), error, remedy, path, path.parent, what) from None
    try:
        yield
    finally:
        release(path)


def take(path: Path, what: Path) -> None:
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            alone(file)
            if not is_at(file, path):  # it was released meanwhile
                continue
            file.seek(0)
            holder = read_holder(file.read())
            if holder is not None and runs(holder):
                raise InUse(told(holder, path, what))
            file.truncate(0)
            file.write(json.dumps(this_process()))
            file.flush()
            os.fsync(file.fileno())
            return


def release(path: Path) -> None:
    with suppress(OSError), open(path, "r+", encoding="utf-8") as file:  # gone with its folder: nothing to release
        alone(file)
        holder = read_holder(file.read())
        if holder is not None and {**holder, "since": 0} == {**this_process(), "since": 0}:
            path.unlink()


def alone(file: IO[str]) -> None:
    """Nobody else on this machine reads or writes the lock until the file is closed, where the system offers that."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)


def is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def this_process() -> dict[str, Any]:
    """pid and host; started: what tells it from a later process of the same number; since: now."""
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": started(pid), "since": time.time()}


def read_holder(text: str) -> dict[str, Any] | None:
    """None for an empty file, and for what a crash has left of one."""
    try:
        holder = json.loads(text)
        return {"pid": int(holder["pid"]), "since": float(holder["since"]),
                "host": str(holder["host"]), "started": holder["started"]}  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def runs(holder: dict[str, Any]) -> bool:
    """Whether the process may still run: it does on this machine, or is one of another machine."""
    if holder["host"] != socket.gethostname():
        return True
    return is_running(holder["pid"]) and holder["started"] == started(holder["pid"])


def started(pid: int) -> str | None:
    """When a process began, as the system numbers it; None where it does not tell, or there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot} {fields[19]}"


def told(holder: dict[str, Any], path: Path, what: Path) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    here = holder["host"] == socket.gethostname()
    remedy = "wait for it, or stop it" if here else f"if it no longer runs there, delete {path}"
    return f"{what} is in use by process {holder['pid']} on {holder['host']}, since {since}; {remedy}"
