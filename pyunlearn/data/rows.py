"""Rows of data sets, from files and from the Hub, and the checks of what they hold: every error tells which row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._hints import path_hint

LONGEST_TOLD = 160  # characters of a text in an error
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")
Row = tuple[str, Any]  # where it stands, as an error tells it, and what it is


def check_limit(limit: object) -> None:
    """Raises ValueError unless it is a number of rows, or None for all."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit must be a positive integer or None, got {limit!r}")


def lines_of(path: Path) -> list[str]:
    """Lines of a UTF-8 file. Split at \\n alone, as JSON lines are: text may hold U+2028 and the like.

    Raises FileNotFoundError (path and near names), ValueError for a folder or other than UTF-8.
    """
    if path.is_dir():
        names = ", ".join(sorted(child.name for child in path.iterdir() if child.is_file())[:20])
        raise ValueError(f"{path} is a folder; name one of its files ({names or 'it has none'})")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}{path_hint(path)}")
    lines = []
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from error
    return lines


def json_lines(path: Path) -> Iterator[Row]:
    """What each line holds; blank ones are skipped. Raises as `lines_of`, and ValueError for other than JSON."""
    for number, text in enumerate(lines_of(path), start=1):
        if text.strip():
            where = f"{path}:{number}"
            yield where, parse_json(text, where)


def json_list(path: Path) -> Iterator[Row]:
    """The members of a file that is one JSON list. Raises as `json_lines`, and TypeError for another value."""
    values = parse_json("\n".join(lines_of(path)), str(path))
    if not isinstance(values, list):
        raise TypeError(f"{path}: needs a list, got {type_of(values)}")
    for i, value in enumerate(values):
        yield f"{path}[{i}]", value


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (it is too deep)") from error


def is_hub_id(source: str | Path, name: str | None) -> bool:
    """A string like owner/dataset that is no path here. A configuration name settles the doubtful cases."""
    if isinstance(source, Path) or Path(source).exists() or source.endswith(FILE_SUFFIXES):
        return False
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is None:
        return False
    return name is not None or not Path(source).parent.is_dir()


def hub_rows(source: str, name: str | None, split: str) -> Iterator[Row]:
    """Rows of a split of a Hub data set, name: its configuration. Raises ImportError without `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a file here, so it is read as a hub dataset, which needs the `datasets` library: "
            "install pyunlearn[hub], or give the path of a JSON-lines file"
        ) from error
    where = source if name is None else f"{source}[{name}]"
    for number, row in enumerate(datasets.load_dataset(source, name, split=split)):
        yield f"{where}:{split}:{number}", row


# ---- what a row holds ------------------------------------------------------------------------------------------------


def object_of(row: object, where: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """The row, an object with these keys. Raises TypeError or ValueError."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: needs an object with {' and '.join(keys)}, got {type_of(row)}")
    for key in keys:
        if key not in row:
            raise ValueError(f"{where}: key {key!r} is missing (keys there: {', '.join(map(str, row)) or 'none'})")
    return row


def text_of(value: object, key: str, where: str) -> str:
    """The value, a text. Raises TypeError for another, ValueError for half a character or white space alone."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: {key!r} must be a string, got {type_of(value)}")
    check_text(value, f"{where}: {key!r}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    return value


def texts_of(value: object, key: str, where: str) -> tuple[str, ...]:
    """The value, a list of texts. Raises as `text_of`."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{where}: {key!r} must be a list of strings, got {type_of(value)}")
    return tuple(text_of(text, f"{key}[{i}]", where) for i, text in enumerate(value))


def brief(text: str) -> str:
    """Its `repr` for an error; of a long text, the beginning."""
    return repr(text if len(text) <= LONGEST_TOLD else f"{text[:LONGEST_TOLD]}...")


def check_text(text: str, what: str) -> None:
    """Raises ValueError for a lone surrogate, half of a character: JSON can say it, no tokenizer can read it."""
    if (half := re.search(r"[\ud800-\udfff]", text)) is not None:
        raise ValueError(f"{what} needs whole characters, got the lone surrogate {half[0]!r} at {half.start()}")


def type_of(value: object) -> str:
    return "null" if value is None else type(value).__name__
