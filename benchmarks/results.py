"""Records of measurements, one JSON object each, and where they go.

A file of records is a `Store` in one file, a unit a line, whole after every measurement. A unit's value is the record,
all of it. Its identity is what the record stands and falls with: the versions, and the commit of our own
implementations. A peer's measurement stands whatever our commit is; one that failed stands too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyunlearn.store import Store, read_units

HERE = Path(__file__).parent
# Beside the programs in a checkout; an installed package has no place for results of its own.
RESULTS = HERE / "results" if (HERE.parent / "CMakeLists.txt").is_file() else Path("benchmarks/results")
Record = dict[str, Any]
OURS = ("cpu", "triton", "cuda")


def is_ours(impl: str) -> bool:
    """ "cuda in place" is ours as "cuda" is."""
    return impl.replace(",", " ").split()[0] in OURS


def units(path: Path) -> dict[str, dict[str, Any]]:
    """The units of a file by name, of any identity; none where there is no file. Raises ValueError if it is damaged."""
    return read_units(path) if path.is_file() else {}


def read(path: Path) -> list[Record]:
    """The records of a file, as `units`."""
    return [unit["value"] for unit in units(path).values()]


class Records:
    """The measurements in a file, those of an earlier, interrupted run with them.

    fresh: none of those that are there stands.
    """

    def __init__(self, path: Path, commit: str, versions: dict[str, str], fresh: bool = False):
        self.store, self.commit, self.versions = Store(path), commit, versions
        self.stale = set(self.store.names()) if fresh else set()

    def identity(self, record: Record) -> dict[str, Any]:
        return {"versions": self.versions} | ({"commit": self.commit} if is_ours(record["impl"]) else {})

    def has(self, record: Record) -> bool:
        """Whether this measurement was made, with these versions and, if it is ours, of this commit."""
        name = name_of(record)
        return name not in self.stale and self.store.get(name, self.identity(record)) is not None

    def add(self, record: Record) -> None:
        name = name_of(record)
        self.store.put(name, record, self.identity(record))
        self.stale.discard(name)


def name_of(record: Record) -> str:
    """What tells measurements on one device apart.

    >>> shape = {"dtype": "float32", "N": 512, "V": 49152, "H": 0}
    >>> name_of({"op": "token_stats", "case": "weighted NLL", "impl": "cpu", **shape})
    'token_stats: weighted NLL: cpu: float32, N=512, V=49152, H=0'
    """
    return "{op}: {case}: {impl}: {dtype}, N={N}, V={V}, H={H}".format(**record)
