"""Records of measurements: one JSON object each, in a file that is whole after every measurement."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KEYS = ("op", "case", "impl", "dtype", "N", "V", "H")  # what tells measurements on one device apart
OURS = ("cpu", "triton", "cuda")


def is_ours(impl: str) -> bool:
    """ "cuda in place" is ours as "cuda" is."""
    return impl.split()[0] in OURS


def read(path: Path) -> list[Record]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, records: Iterable[Record]) -> None:
    """A record a line; the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
    os.replace(temporary, path)


class Records:
    """The measurements in a file. Those of this commit are taken over from an earlier, interrupted run.

    A peer's measurement stands whatever our commit is, as long as no version changed; one that failed stands too.
    """

    def __init__(self, path: Path, commit: str, versions: dict[str, str], fresh: bool = False):
        self.path, self.commit, self.versions = path, commit, versions
        self.by_key = {self.key(r): r for r in read(path)}
        self.stale = {key for key, r in self.by_key.items() if fresh or not self.current(r)}

    @staticmethod
    def key(record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in KEYS)

    def current(self, record: Record) -> bool:
        same = record["commit"] == self.commit or not is_ours(record["impl"])
        return same and record["versions"] == self.versions

    def has(self, record: Record) -> bool:
        key = self.key(record)
        return key in self.by_key and key not in self.stale

    def add(self, record: Record) -> None:
        key = self.key(record)
        self.by_key[key] = record
        self.stale.discard(key)
        write(self.path, self.by_key.values())
