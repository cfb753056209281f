"""Single values of a GGUF file's header. The gguf package would read all of it: a vocabulary takes it many seconds."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
KINDS = "BbHhIif?..Qqd"  # of values, by their number in the file, as `struct` calls them
STRING, ARRAY = 8, 9
LONGEST = 1 << 30  # bytes of a text


def read_header(path: str | Path, wanted: Iterable[str]) -> dict[str, Any]:
    """{key: value} of those of `wanted` that the file has; of an array, its length. {arch} at the beginning of a key is
    the file's architecture. What comes after the last of them is not read.

    Nothing is known of a version other than these, or of numbers that begin with their highest byte. Raises ValueError
    that names the file where it is none of GGUF, or ends too soon.
    """
    try:
        with open(path, "rb") as file:
            if (first := file.read(4)) != MAGIC:
                raise struct.error(f"it begins with {first!r}")
            if number(file, "I") not in VERSIONS:
                return {}
            number(file, "Q")  # tensors
            return values(file, number(file, "Q"), list(wanted))
    except (struct.error, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is damaged or no GGUF file ({error})") from None


def values(file: BinaryIO, count: int, wanted: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    architecture = ""
    for _ in range(count):
        key = text(file)
        value = read_value(file, number(file, "I"))
        if key == "general.architecture":
            architecture = str(value)
        own = f"{{arch}}{key.removeprefix(architecture)}" if key.startswith(f"{architecture}.") else key
        if own in wanted:
            found[own] = value
        if len(found) == len(wanted):
            break
    return found


def read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return text(file)
    if kind != ARRAY:
        return number(file, KINDS[kind])
    kind, length = number(file, "I"), number(file, "Q")
    if kind in (STRING, ARRAY):
        for _ in range(length):
            read_value(file, kind) if kind == ARRAY else file.seek(number(file, "Q"), 1)
    else:
        file.seek(length * struct.calcsize(KINDS[kind]), 1)
    return length


def text(file: BinaryIO) -> str:
    length = number(file, "Q")
    if length > LONGEST:  # a damaged one would take all memory
        raise struct.error(f"a text of {length} bytes")
    return file.read(length).decode("utf-8")


def number(file: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]
