"""The one way a file or a folder is written here: whole and on disk under its name, or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def write_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """`write(temporary)` in the same folder, which is made where it is missing; synced; then renamed to `path`.

    Whatever happens, `path` holds what it held before or all of the new content. Raises what `write` raises, and
    OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8, as it stands."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Indented JSON. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_folder(path: str | os.PathLike[str], fill: Callable[[Path], Any]) -> None:
    """`fill(temporary)`, all of it synced; then the folder appears under its name, in the place of what was there."""
    path = Path(path)
    temporary, aside = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    for rest in (temporary, aside):
        shutil.rmtree(rest, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
