"""Finished units of work, kept so that nothing is computed twice and nothing stale or damaged is used.

A unit is a name, the identity of what made it (settings and fingerprints, JSON values), and a value: anything that JSON
holds, or tensors by name. It is kept with a digest of its value and read back only if both still hold: another identity
means not there (it is computed again and replaced), another digest is an error that names the file.

Where units are kept:

    Store(None)                 in memory
    Store(folder)               a file a unit, NAME.json or NAME.safetensors: several processes may write at once
    Store("results.json")       all units in one file of JSON, one a line, for what people read and keep

Files appear whole or not at all. A folder may belong to one job, `Store(folder, owner=identity)`: then it holds that
job's units only, and another job's folder, or a folder of other files, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._files import write_file, write_text
from ._progress import track
from .distributed import Processes

T = TypeVar("T")
Identity = Mapping[str, Any]
OWNER = "job.json"
HEADER = "pyunlearn"  # key of a safetensors file's metadata


class Damaged(ValueError):
    """A kept file is not what was written."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"{path}: is damaged ({why}); delete it, and it will be made again")


class Store:
    """See the module. owner: the identity of the one job that a folder belongs to, or None.

    Raises ValueError that names the first difference if `place` belongs to another job, or holds other files.
    """

    def __init__(self, place: str | Path | None, owner: Identity | None = None, what: str = "store"):
        """what: the argument that errors name."""
        self.place = None if place is None else Path(place)
        self.memory: dict[str, dict[str, Any]] = {}
        self.in_one_file = self.place is not None and self.place.suffix == ".json"
        if self.place is None:
            return
        if self.in_one_file:
            self.memory = read_units(self.place) if self.place.is_file() else {}
        elif owner is not None:
            own(self.place, plain(owner), what)

    def get(self, name: str, identity: Identity | None = None) -> Any | None:
        """The value, or None where there is none of this identity. Raises Damaged."""
        if self.place is None or self.in_one_file:
            unit = self.memory.get(name)
            return unit["value"] if unit and unit["identity"] == plain(identity) else None
        path = self.place / f"{name}.safetensors"
        if path.is_file():
            return get_tensors(path, identity)
        path = self.place / f"{name}.json"
        if not path.is_file():
            return None
        unit = read_unit(path)
        return unit["value"] if unit["identity"] == plain(identity) else None

    def put(self, name: str, value: Any, identity: Identity | None = None) -> None:
        """Keeps the value, in the place of one of another identity."""
        tensors = is_tensors(value)
        if self.place is None:
            self.memory[name] = {"identity": plain(identity), "value": value}
        elif self.in_one_file:
            self.memory[name] = make_unit(name, value, identity)
            lines = ",\n".join(json.dumps(unit, ensure_ascii=False) for unit in self.memory.values())
            write_text(self.place, f"[\n{lines}\n]\n")
        elif tensors:
            put_tensors(self.place / f"{name}.safetensors", value, identity)
        else:
            text = json.dumps(make_unit(name, value, identity), ensure_ascii=False, indent=1)
            write_text(self.place / f"{name}.json", text + "\n")

    def names(self) -> list[str]:
        """Of all units, of whatever identity."""
        if self.place is None or self.in_one_file:
            return list(self.memory)
        kept = (path for path in self.place.glob("*") if path.suffix in (".json", ".safetensors"))
        return sorted(path.stem for path in kept if path.name != OWNER and not path.name.startswith("."))

    def compute(self, name: str, identity: Identity | None, make: Callable[[], T]) -> T:
        """The kept value, or what `make` gives, kept."""
        value = self.get(name, identity)
        if value is None:
            value = make()
            self.put(name, value, identity)
        return value

    def finish(
        self,
        units: Mapping[T, str],
        make: Callable[[T], Any],
        description: str,
        processes: Processes,
        *,
        identity: Callable[[T], Identity] | None = None,
        progress: bool = True,
    ) -> dict[T, Any]:
        """The values of `units` (item: name), made where they are not kept yet, each kept at once.

        Which units are this process's is the caller's choice; with several that all make the same, the first one keeps
        them. progress: a bar on the first process's stderr.
        """
        identity_of = identity or (lambda item: {})
        kept = {item: self.get(name, identity_of(item)) for item, name in units.items()}
        values = {item: value for item, value in kept.items() if value is not None}
        missing = [item for item in units if item not in values]
        show = progress and processes.first
        for item in track(missing, description, show, size=lambda _: 1, done=len(values)):
            values[item] = make(item)
            if processes.writes:
                self.put(units[item], values[item], identity_of(item))
        return {item: values[item] for item in units}


def differences(there: Any, here: Any, prefix: str = "") -> list[str]:
    """`key.sub: old -> new` for every value that differs, in the order of `here` and then of `there`."""
    there, here = (value if isinstance(value, Mapping) else {} for value in (there, here))
    changes = []
    for key in {**here, **there}:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return changes


def plain(identity: Identity | None) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(identity or {})))


def own(folder: Path, owner: dict[str, Any], what: str) -> None:
    """Marks a folder as this job's. Raises ValueError if it is another's."""
    manifest = folder / OWNER
    if manifest.is_file():
        try:
            there = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Damaged(manifest, f"no JSON: {error}") from None
        if changed := differences(there, owner):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{what}: {folder} belongs to another job ({changed[0]}{more}); delete it or choose another folder"
            )
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{what}: {folder} holds other files; choose a new or an empty folder")
    else:
        write_text(manifest, json.dumps(owner, indent=1) + "\n")


# ---- JSON ------------------------------------------------------------------------------------------------------------


def make_unit(name: str, value: Any, identity: Identity | None) -> dict[str, Any]:
    value = json.loads(json.dumps(value))
    return {"name": name, "identity": plain(identity), "digest": digest_json(value), "value": value}


def digest_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_unit(path: Path, unit: Any) -> dict[str, Any]:
    if not isinstance(unit, dict) or not {"identity", "digest", "value"} <= unit.keys():
        raise Damaged(path, "no kept unit")
    if digest_json(unit["value"]) != unit["digest"]:
        raise Damaged(path, "its value does not have its digest")
    return unit


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(path, f"no JSON: {error}") from None


def read_unit(path: Path) -> dict[str, Any]:
    """{"name", "identity", "digest", "value"} of one file. Raises Damaged."""
    return check_unit(path, read_json(path))


def read_units(path: Path) -> dict[str, dict[str, Any]]:
    """The units of a file that holds several, by name. Raises Damaged."""
    units = read_json(path)
    if not isinstance(units, list):
        raise Damaged(path, "no list of kept units")
    return {check_unit(path, unit)["name"]: unit for unit in units}


# ---- tensors ---------------------------------------------------------------------------------------------------------


def is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())
    )


def put_tensors(path: Path, value: Tensor | Mapping[str, Tensor], identity: Identity | None) -> None:
    tensors = {"": value} if isinstance(value, Tensor) else dict(value)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = header_of(plain(identity), digest_tensors(tensors))
    write_file(path, lambda temporary: save_file(tensors, temporary, header))


def get_tensors(path: Path, identity: Identity | None) -> Any | None:
    there, digest = read_header(path)
    if there != plain(identity):
        return None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise Damaged(path, str(error)) from None
    if digest_tensors(tensors) != digest:
        raise Damaged(path, "its tensors do not have their digest")
    return tensors[""] if tensors.keys() == {""} else tensors


def header_of(identity: Identity, digest: str) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return {HEADER: json.dumps(identity), "digest": digest}


def read_header(path: Path) -> tuple[dict[str, Any], str | None]:
    """(identity, digest) of a safetensors file of ours. Raises Damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata[HEADER]), metadata.get("digest")
    except (SafetensorError, KeyError, ValueError) as error:
        raise Damaged(path, f"no kept tensors: {error}") from None


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b (32 hex digits) over names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a buffer, without a copy where it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
