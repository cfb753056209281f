"""The one way a file or a folder is written here: whole and on disk under its name, or not there at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SEAL = "digests.json"  # of a folder: see `seal`
TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "iostream error")  # torch.save has no type of its own
SMALL = 1 << 24  # bytes left on a disk that is called full
OTHER_FOLDER = "choose another folder"


def write_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """`write(temporary)` in the same folder, which is made where it is missing; synced; then renamed to `path`.

    Whatever happens, `path` holds what it held before or all of the new content. Raises what `write` raises, and
    OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # several processes may write at once, on several hosts; the name tells whose the file is
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk does not say whose
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], told: str | None = None, remedy: str = OTHER_FOLDER) -> None:
    """Raises OSError as `unwritable` if nothing can be written at `path`; its folder is made if it is missing.

    For who would otherwise find out at the end of a long computation. told: the argument that errors name, default the
    path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise unwritable(str(path) if told is None else told, error, remedy, temporary, path, path.parent) from None


def unwritable(told: str, error: OSError, remedy: str, *own: Path) -> OSError:
    """The one error for a place that cannot be written: which argument says it, why, what to do. What the system names
    is told unless it is one of `own`, names that nobody has typed or that `told` has."""
    why = (error.strerror or str(error) or type(error).__name__).lower()
    where = "" if error.filename is None or Path(error.filename) in own else f": {error.filename}"
    return OSError(f"{told}: cannot be written ({why}{where}); {remedy}")


@contextmanager
def named_failures(path: Path) -> Iterator[None]:
    """What the libraries raise where they cannot write, a full disk above all, as an OSError that names the place."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        text, number = str(error), error.errno if isinstance(error, OSError) else None
        if isinstance(error, RuntimeError) and not any(words in text for words in TORCH_CANNOT_WRITE):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        full = os.strerror(errno.ENOSPC) in text or shutil.disk_usage(path.parent).free < SMALL
        number = number or (errno.ENOSPC if full else errno.EIO)
        raise OSError(number, f"cannot be written ({text.splitlines()[0]})", str(path)) from error


@contextmanager
def one_at_a_time(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process of this machine is inside with the same path; who comes later waits.

    .NAME.lock stays beside it: to remove it would let two in.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_orphans(folder: str | os.PathLike[str]) -> None:
    """Deletes what killed `write_file`s of this host have left in a folder and below it."""
    for orphan in Path(folder).rglob(f".*.{socket.gethostname()}.*.*.tmp"):
        writer = orphan.name.split(".")[-3]
        if writer.isdigit() and not is_running(int(writer)):
            orphan.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether this host has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8, as it stands."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike[str], remedy: str) -> Any:
    """Of a file of ours. Raises ValueError that names it, and tells the remedy, if it is not JSON; OSError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged, it is not JSON ({error}); {remedy}") from None


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line (`json_line`)."""
    write_text(path, "".join(json_line(row) + "\n" for row in rows))


def json_line(row: Mapping[str, Any]) -> str:
    """The row in one line of JSON, which has neither NaN nor infinity: null."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(without_infinity(row), ensure_ascii=False, allow_nan=False)


def without_infinity(value: Any) -> Any:
    """The value with None in the place of every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_infinity(own) for key, own in value.items()}
    return [without_infinity(own) for own in value] if isinstance(value, list | tuple) else value


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], Any]) -> None:
    """`fill(temporary)`, all of it synced; then the folder appears under its name, in the place of what was there.

    One process at a time. Whatever happens, `path` holds the old folder or the new one. Where the system cannot
    exchange names (all but Linux), a crash between two renames leaves neither: `restore` brings the old one back.
    """
    path = Path(path)
    restore(path)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            shutil.rmtree(aside_of(path), ignore_errors=True)
            os.replace(path, aside_of(path))
            os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is not None and temporary in (Path(error.filename), *Path(error.filename).parents):
            error.filename = str(path)
        raise
    finally:
        restore(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside_of(path), ignore_errors=True)


def seal(folder: str | os.PathLike[str]) -> None:
    """Writes digests.json, which knows all files of the folder by their content: the last, the sign that it is whole.

    {path: BLAKE2b, 32 hex digits}.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    write_json(folder / SEAL, {path.relative_to(folder).as_posix(): digest_file(path) for path in files})


def check_seal(folder: str | os.PathLike[str], remedy: str) -> None:
    """Raises ValueError that names the first file of a sealed folder that is missing or not as it was written."""
    folder = Path(folder)
    digests = read_json(folder / SEAL, remedy)
    if not isinstance(digests, dict):
        raise ValueError(f"{folder / SEAL}: is damaged, it holds no digests; {remedy}")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: is missing; {remedy}")
        if digest_file(path) != digest:
            raise ValueError(f"{path}: is damaged, it is not what was written; {remedy}")


def digest_file(path: Path) -> str:
    """BLAKE2b (32 hex digits) over the content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as content:
        while block := content.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def restore(path: str | os.PathLike[str]) -> None:
    """Puts back the folder that an interrupted `write_folder` has moved aside; for who reads where there is none."""
    path = Path(path)
    if not path.exists() and aside_of(path).exists():
        os.replace(aside_of(path), path)


def exchange(one: Path, other: Path) -> bool:
    """Swaps what the two names hold, at one stroke; False where the system does not offer that."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def aside_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
