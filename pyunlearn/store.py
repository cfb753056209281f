"""Finished units of work, kept so that nothing is computed twice and nothing stale or damaged is used.

A unit is a name, the identity of what made it (settings and fingerprints, JSON values), and a value: anything that JSON
holds but None, or tensors by name. It is kept with a digest of all three and read back only if it still holds: another
identity means not there (it is computed again and replaced), another digest is an error that names the file.
A value comes back as it was kept, lists for tuples and tensors on the CPU, from where it was just made too.

Where units are kept:

    Store(None)                 in memory
    Store(folder)               a file a unit, NAME.json or NAME.safetensors: several processes may write at once
    Store("results.json")       all units but tensors in one file of JSON, one a line, for what people read: one process

Files appear whole or not at all. A folder may belong to one job, `Store(folder, owner=identity)`: then it holds that
job's units only, and another job's folder, or a folder of other files, is refused.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ._files import named_failures, remove_orphans, write_file, write_text
from ._progress import track
from .distributed import Processes

T = TypeVar("T")
Identity = Mapping[str, Any]
OWNER = "job.json"
LONGEST_TOLD = 80  # characters of a value that differs
JSON, TENSORS = ".json", ".safetensors"
HEADER = "pyunlearn"  # key of a safetensors file's metadata
UNREADABLE = (SafetensorError, KeyError, ValueError)  # what safetensors raises for a file that it cannot read


class Damaged(ValueError):
    """A kept file is not what was written."""

    def __init__(self, path: Path, why: str, remedy: str = "delete it, and it will be made again"):
        super().__init__(path, why, remedy)

    def __str__(self) -> str:
        path, why, remedy = self.args
        return f"{path}: is damaged ({why}); {remedy}"


class OthersFolder(ValueError):
    """A folder is another job's."""


class Store:
    """See the module. owner: the identity of the one job that a folder belongs to, or None.

    Raises OthersFolder that names the first difference if `place` belongs to another job, ValueError if it holds other
    files.
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
        else:
            remove_orphans(self.place)

    def get(self, name: str, identity: Identity | None = None) -> Any | None:
        """The value, or None where there is none of this identity. Raises Damaged."""
        if self.place is None or self.in_one_file:
            unit = self.memory.get(name)
            return unit["value"] if unit and unit["identity"] == plain(identity) else None
        for path, read in ((self.file(name, TENSORS), get_tensors), (self.file(name, JSON), get_json)):
            value = read(path, identity) if path.is_file() else None
            if value is not None:
                return value
        return None

    def put(self, name: str, value: Any, identity: Identity | None = None) -> Any:
        """Keeps the value, in the place of one of another identity; returns it as `get` does.

        Raises ValueError for None, and in a folder for a name that no file of its own can have.
        """
        value, identity = as_kept(name, value), plain(identity)
        if self.place is None:
            self.memory[name] = {"identity": identity, "value": value}
        elif self.in_one_file:
            if is_tensors(value):
                raise ValueError(f"{name}: tensors are kept in a folder, {self.place} is one file of JSON")
            self.memory[name] = make_unit(name, value, identity)
            lines = ",\n".join(json.dumps(unit, ensure_ascii=False) for unit in self.memory.values())
            write_text(self.place, f"[\n{lines}\n]\n")
        elif is_tensors(value):
            put_tensors(self.file(name, TENSORS), value, identity)
            self.file(name, JSON).unlink(missing_ok=True)
        else:
            text = json.dumps(make_unit(name, value, identity), ensure_ascii=False, indent=1)
            write_text(self.file(name, JSON), text + "\n")
            self.file(name, TENSORS).unlink(missing_ok=True)
        return value

    def file(self, name: str, suffix: str) -> Path:
        """Of a unit in a folder. Raises ValueError for a name that is no file's, hidden, or the owner's."""
        if not name or name.startswith(".") or set(name) & set("/\\\0") or name + JSON == OWNER:
            raise ValueError(f"name={name!r}: needs a file's name, not hidden, without slashes and other than 'job'")
        assert self.place is not None
        return self.place / f"{name}{suffix}"

    def names(self) -> list[str]:
        """Of all units, of whatever identity."""
        if self.place is None or self.in_one_file:
            return list(self.memory)
        paths = [path for path in self.place.glob("[!.]*") if path.suffix in (JSON, TENSORS) and path.name != OWNER]
        return sorted({path.stem for path in paths})

    def compute(self, name: str, identity: Identity | None, make: Callable[[], T]) -> T:
        """The kept value, or what `make` gives, kept."""
        value = self.get(name, identity)
        return self.put(name, make(), identity) if value is None else value

    def finish(
        self,
        units: Mapping[T, str],
        make: Callable[[T], Any],
        description: str,
        processes: Processes,
        *,
        identity: Callable[[T], Identity] | None = None,
        progress: bool = True,
        size: Callable[[T], int] = lambda _: 1,
    ) -> dict[T, Any]:
        """The values of `units` (item: name), made where they are not kept yet, each kept at once.

        Which units are this process's is the caller's choice; with several that all make the same, the first one keeps
        them. progress: a bar on the first process's stderr, which counts `size` of each.
        """
        identity_of = identity or (lambda item: {})
        kept = {item: self.get(name, identity_of(item)) for item, name in units.items()}
        values = {item: value for item, value in kept.items() if value is not None}
        missing = [item for item in units if item not in values]
        show = progress and processes.first
        for item in track(missing, description, show, size=size, done=sum(map(size, values))):
            value = make(item)
            if processes.writes:
                values[item] = self.put(units[item], value, identity_of(item))
            else:
                values[item] = as_kept(units[item], value)
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
            changes.append(f"{prefix}{key}: {shortened(old)} -> {shortened(new)}")
    return changes


def shortened(value: Any) -> str:
    return textwrap.shorten(repr(value), LONGEST_TOLD, placeholder=" ...")


def plain(identity: Identity | None) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(dict(identity or {})))


def as_kept(name: str, value: Any) -> Any:
    """What `get` will give for the value. Raises ValueError for None."""
    if value is None:
        raise ValueError(f"{name}: value=None: needs another value, None says that there is none")
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous()
    if is_tensors(value):
        return {key: as_kept(name, tensor) for key, tensor in value.items()}
    return json.loads(json.dumps(value))


def own(folder: Path, owner: dict[str, Any], what: str) -> None:
    """Marks a folder as this job's. Raises ValueError if it is another's."""
    manifest = folder / OWNER
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{what}: {folder} is a file, needs a folder")
    others = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())  # looked at first:
    if manifest.is_file():  # another process may be marking it for the same job, and units come after the mark
        try:
            mark = read_unit(manifest)["value"]
        except Damaged as error:
            why = f"{error.args[1]}; or of another version"
            raise Damaged(manifest, why, f"delete the folder {folder} or choose another") from None
        if changed := differences(mark, owner):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise OthersFolder(
                f"{what}: {folder} belongs to another job ({changed[0]}{more}); delete it or choose another folder"
            )
    elif others:
        raise ValueError(f"{what}: {folder} holds other files; choose a new or an empty folder")
    else:
        write_text(manifest, json.dumps(make_unit(manifest.stem, owner, None), indent=1) + "\n")
    remove_orphans(folder)


def belongs(folder: Path, format: str) -> bool:
    """Whether the folder is marked as a job's whose identity has this beginning of a `format`."""
    try:
        mark = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    identity = mark.get("value", mark) if isinstance(mark, dict) else None
    return isinstance(identity, dict) and str(identity.get("format")).startswith(format)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def make_unit(name: str, value: Any, identity: Identity | None) -> dict[str, Any]:
    unit = {"name": name, "identity": plain(identity), "value": json.loads(json.dumps(value))}
    return {"name": name, "identity": unit["identity"], "digest": digest_json(unit), "value": unit["value"]}


def digest_json(value: Any) -> str:
    """BLAKE2b (32 hex digits) over the value as JSON with sorted keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_unit(path: Path, unit: Any) -> dict[str, Any]:
    if not isinstance(unit, dict) or unit.keys() != {"name", "identity", "digest", "value"}:
        raise Damaged(path, "no kept unit")
    if digest_json({key: value for key, value in unit.items() if key != "digest"}) != unit["digest"]:
        raise Damaged(path, "its content does not have its digest")
    return unit


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, f"no JSON: {error}") from None


def read_unit(path: Path) -> dict[str, Any]:
    """{"name", "identity", "digest", "value"} of the file of one unit. Raises Damaged."""
    return check_unit(path, read_json(path))


def read_units(path: Path) -> dict[str, dict[str, Any]]:
    """The units of a file that holds several, by name. Raises Damaged."""
    units = read_json(path)
    if not isinstance(units, list):
        raise Damaged(path, "no list of kept units")
    return {check_unit(path, unit)["name"]: unit for unit in units}


def get_json(path: Path, identity: Identity | None) -> Any | None:
    unit = read_unit(path)
    return unit["value"] if unit["identity"] == plain(identity) else None


# ---- tensors ---------------------------------------------------------------------------------------------------------


def is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())
    )


def put_tensors(path: Path, value: Tensor | Mapping[str, Tensor], identity: Identity | None) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in ({"": value} if isinstance(value, Tensor) else value).items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if storage in storages else tensor  # safetensors takes none that share memory
        storages.add(storage)
    header = header_of(plain(identity), digest_tensors(tensors))
    write_file(path, lambda temporary: save_tensors(tensors, temporary, header, path))


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None, named: Path | None = None
) -> None:
    """A safetensors file. Raises OSError that names `named`, default `path`, where it cannot be written."""
    with named_failures(named or path):
        save_file(dict(tensors), path, metadata)


def get_tensors(path: Path, identity: Identity | None) -> Any | None:
    before = path.stat()
    try:
        there, digest = read_header(path)
        tensors = load_tensors(path, digest) if there == plain(identity) else None
    except Damaged:
        after = path.stat()
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            raise
        return get_tensors(path, identity)  # safetensors opens a file twice: another process has replaced it meanwhile
    return tensors[""] if tensors is not None and tensors.keys() == {""} else tensors


def load_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Those of a safetensors file. Raises Damaged."""
    try:
        tensors = load_file(path)
    except UNREADABLE as error:
        raise Damaged(path, str(error)) from None
    if digest_tensors(tensors) != digest:
        raise Damaged(path, "its tensors do not have their digest")
    return tensors


def header_of(identity: Identity, digest: str) -> dict[str, str]:
    """The metadata of a safetensors file: a unit whose value is the digest of its tensors."""
    return {HEADER: json.dumps(make_unit("", digest, identity))}


def read_header(path: Path) -> tuple[dict[str, Any], str]:
    """(identity, digest of the tensors) of a safetensors file of ours. Raises Damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            unit = json.loads((file.metadata() or {})[HEADER])
    except UNREADABLE as error:
        raise Damaged(path, f"no kept tensors: {error}") from None
    unit = check_unit(path, unit)
    return unit["identity"], unit["value"]


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
