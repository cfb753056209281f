"""Rows of data sets, from files and from the Hub, and the checks of what they hold: every error tells which row."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from .._hints import path_hint
from .._hub import check_hub

LONGEST_TOLD = 160  # characters of a text in an error
MOST_TOLD = 20  # names in an error
LONGEST_FIELD = 1 << 30  # characters of a CSV field; Python's own limit is that of a page of text

# By a file's name, the .gz of a gzipped one aside; any other name is one of JSON.
JSON = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": ",;\t", ".tsv": "\t,;"}  # what may part fields: the first of these that the header has
PARQUET = (".parquet", ".pq")
TEXT = ".txt"
READ = (*JSON, *TABLES, *PARQUET, TEXT)
FORMATS = "JSON lines, a JSON list, or a file named .csv, .tsv, .parquet or .txt"
SHEET, PACKED = "save its sheet as CSV", "unpack it; gzip alone is read as it is"
DOCUMENT, MARKUP = "save its text as .txt, or its questions and answers as CSV", "write its rows as JSON lines"
PICKLED = "reading a pickle runs whatever program it holds; where it was made, write its rows as JSON lines"
ARROW = "write it as parquet, as dataset.to_parquet(FILE) does"
NOT_READ = {  # and what to do instead
    **dict.fromkeys((".xlsx", ".xls", ".ods"), SHEET),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf"), DOCUMENT),
    **dict.fromkeys((".xml", ".html", ".yaml", ".yml", ".toml"), MARKUP),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), PACKED),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), PICKLED),
    **dict.fromkeys((".arrow", ".feather"), ARROW),
}
Row = tuple[str, Any]  # where it stands, as an error tells it, and what it is


def check_limit(limit: object) -> None:
    """Raises ValueError unless it is a number of rows, or None for all."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit must be a positive integer or None, got {limit!r}")


def rows_of(path: Path) -> Iterator[Row]:
    """Rows of a file, or of a folder of .txt files, one after the other: what was not asked for is not read.

    A row stands at file:line, at file[place] in a JSON list, or at file:row number in parquet, both counted from 0. By
    the file's name it is of CSV or TSV (an object of texts by the header's names), of parquet (an object), the whole
    text of a .txt ({"text": ...}), or else of JSON: a list, or a value a line, whichever the content is.

    Raises FileNotFoundError (path and near names), ImportError for parquet without pyarrow, and ValueError for a folder
    of others, a format that is not read (and what to do), other than UTF-8, or content that its format does not have.
    """
    check_readable(path)
    if path.is_dir():
        return chain.from_iterable(map(text_rows, texts_in(path)))
    suffix = suffix_of(path.name)
    if suffix in TABLES:
        return table_rows(path, TABLES[suffix])
    if suffix in PARQUET:
        return parquet_rows(path)
    return text_rows(path) if suffix == TEXT else json_rows(path)


def check_readable(path: Path) -> None:
    """Raises, without reading any, as `rows_of` for what is not there, a folder of others, or a format by its name."""
    if path.is_dir() and texts_in(path):
        return
    check_file(path)
    if (suffix := suffix_of(path.name)) in NOT_READ:
        raise ValueError(f"{path}: {suffix} is not read: {NOT_READ[suffix]} (needs {FORMATS})")


def suffix_of(name: str) -> str:
    """The last one in lower case, .gz aside."""
    return Path(name.lower().removesuffix(".gz")).suffix


def named_file(folder: Path, name: str) -> Path:
    """The file of this name in the folder, whatever its format; {name}.jsonl where there is none.

    Raises ValueError where there are several.
    """
    found = [
        path for suffix in READ for zipped in ("", ".gz") if (path := folder / f"{name}{suffix}{zipped}").is_file()
    ]
    if len(found) > 1:
        raise ValueError(
            f"{found[0]} and {found[1].name}: both are there, of which one is to be read; give its path, or move one"
        )
    return found[0] if found else folder / f"{name}.jsonl"


def texts_in(folder: Path) -> list[Path]:
    """The .txt files of a folder, by name; none where it also holds rows."""
    known = (*READ, *NOT_READ)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and suffix_of(path.name) in known]
    return files if all(suffix_of(path.name) == TEXT for path in files) else []


def check_file(path: Path) -> None:
    """Raises ValueError for a folder, FileNotFoundError (path and near names) where there is nothing."""
    if path.is_dir():
        names = ", ".join(sorted(child.name for child in path.iterdir() if child.is_file())[:MOST_TOLD])
        raise ValueError(f"{path} is a folder; name one of its files ({names or 'it has none'})")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}{path_hint(path)}")


# ---- lines and texts -------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, gzipped or not, each with its end. Split at \\n alone: text may hold U+2028 and the like.

    Raises as `check_file`, and ValueError for other than UTF-8, or a gzip file that is damaged.
    """
    check_file(path)
    with unpacked(path) as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(raw) > 1 and 0 in raw[:2]):
                    raise ValueError(f"{path}: is UTF-16, or no text at all; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                told = f"not UTF-8 ({error.reason} at byte {error.start})"
                raise ValueError(f"{path}:{number}: {told}; save it as UTF-8") from error


@contextmanager
def unpacked(path: Path) -> Iterator[Iterable[bytes]]:
    """Raises ValueError inside for a gzip file that is damaged."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: is damaged, gzip cannot unpack it ({error})") from error


def read_text(path: Path) -> str:
    """The whole file; its lines end in \\n, whatever they end in there. Raises as `lines_of`."""
    return "".join(lines_of(path)).replace("\r\n", "\n")


def text_rows(path: Path) -> Iterator[Row]:
    yield str(path), {"text": read_text(path)}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def json_rows(path: Path) -> Iterator[Row]:
    """What each line holds, blank ones aside; or the members of a list, where the file begins with one.

    Raises as `lines_of`, and ValueError for other than JSON.
    """
    lines = enumerate(lines_of(path), start=1)
    filled = ((number, line.rstrip("\r\n")) for number, line in lines if line.strip())
    first = next(filled, None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith("["):
        text = "".join([line, "\n", *(rest for _, rest in lines)])
        for i, value in enumerate(parse_json(text, path, number)):
            yield f"{path}[{i}]", value
        return
    for number, line in chain([first], filled):
        yield f"{path}:{number}", parse_json(line, path, number)


def parse_json(text: str, path: Path, line: int) -> Any:
    """line: at which the text begins. Raises ValueError that tells where it is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); {advice(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{path}:{line}: not valid JSON (it is too deep)") from error


def advice(error: json.JSONDecodeError) -> str:
    """What to do about it: commas that Python allows and JSON does not are the likeliest."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg == "Extra data" and after.startswith(","):
        return "lines of JSON have no comma between them"
    if (before.endswith(",") and after[:1] in ("]", "}")) or "trailing comma" in error.msg:
        return "leave out the comma before the closing bracket"
    return f"needs {FORMATS}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def table_rows(path: Path, separators: str) -> Iterator[Row]:
    """Of CSV whose first line names the columns, fields apart by the first of `separators` that is in that line.

    Raises as `lines_of`, and ValueError, which tells the line where a record begins, for a name that is there twice,
    more or fewer fields than names, and quotes that are not closed.
    """
    csv.field_size_limit(LONGEST_FIELD)
    lines = lines_of(path)
    first = next(lines, "")
    mark = next((each for each in separators if each in first), separators[0])
    reader = csv.reader(chain([first], lines), delimiter=mark, strict=True)
    names: list[str] = []
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV ({error}); a quote inside of quotes is written twice") from error
        if fields is None:
            return
        if not names:
            names = [name.strip() for name in fields]
            check_names(names, where)
        elif fields and len(fields) != len(names):
            raise ValueError(
                f"{where}: has {len(fields)} fields, and the header {len(names)} ({told_names(names)}); a field with a "
                f"{mark!r} or a line's end in it needs quotes around it"
            )
        elif fields:
            yield where, dict(zip(names, fields, strict=True))


def parquet_rows(path: Path) -> Iterator[Row]:
    """Raises ImportError without pyarrow, ValueError for other than parquet, or a name that is there twice."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: parquet is read by the `pyarrow` library: install pyarrow, or save the rows as JSON lines or CSV"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            check_names(file.schema_arrow.names, str(path))
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield f"{path}:row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: is damaged or no parquet file ({error})") from error


def check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for a column's name that is there twice."""
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{where}: column {name!r} is there twice; rename one of them")


def told_names(names: Sequence[object]) -> str:
    told = ", ".join(brief(str(name))[1:-1] for name in list(names)[:MOST_TOLD])
    return told + (", ..." if len(names) > MOST_TOLD else "") or "none"


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def is_hub_id(source: str | Path, name: str | None) -> bool:
    """A string like owner/dataset that is no path here. A configuration name settles the doubtful cases."""
    if isinstance(source, Path) or Path(source).exists() or suffix_of(source) in (*READ, *NOT_READ):
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
            "install pyunlearn[hub], or give the path of a file"
        ) from error
    check_hub(source, "dataset")
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
