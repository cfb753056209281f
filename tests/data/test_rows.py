"""Files in every format that people have, and what each that cannot be read is told."""

from __future__ import annotations

import gzip
import json
import random
import sys

import pytest

from pyunlearn.data import QA, load_qa
from pyunlearn.data.rows import rows_of

ROWS = [{"question": "Who?", "answer": "Ada."}, {"question": "Where, or\nwhen?", "answer": 'In "Rome".'}]
PAIRS = [QA(row["question"], row["answer"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'question,answer\r\nWho?,Ada.\r\n\r\n"Where, or\nwhen?","In ""Rome""."\r\n'


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def places(path):
    return [where.removeprefix(str(path)) for where, _ in rows_of(path)]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", LINES, [":1", ":2"]),
        ("a.json", f"\n{LINES}", [":2", ":3"]),
        ("a.json", json.dumps(ROWS, indent=2), ["[0]", "[1]"]),
        ("a.ndjson", f"\n  {json.dumps(ROWS)}", ["[0]", "[1]"]),
        ("a", LINES, [":1", ":2"]),
        ("a.csv", CSV, [":2", ":4"]),
        ("a.CSV", f"\ufeff{CSV}", [":2", ":4"]),
        ("a.csv", CSV.replace("Where,", "Where;").replace(",", ";").replace("Where;", "Where,"), [":2", ":4"]),
        ("a.tsv", CSV.replace("n,a", "n \ta").replace("?,", "?\t").replace('",', '"\t'), [":2", ":4"]),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), [":1", ":2"]),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0), [":2", ":4"]),
        ("a.json", gzip.compress(json.dumps(ROWS).encode(), mtime=0), ["[0]", "[1]"]),
    ],
)  # fmt: skip
def test_formats(write, name, content, where):
    path = write(name, content)
    assert load_qa(path) == PAIRS
    assert places(path) == where
    assert load_qa(path, limit=1) == PAIRS[:1]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "a.parquet"
    full = [{**row, "perturbed_answer": ["Bob.", "Eve."], "extra": 3} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(full), path)
    assert load_qa(path) == [QA(item.question, item.answer, None, ("Bob.", "Eve.")) for item in PAIRS]
    assert places(path) == [":row 0", ":row 1"]
    parquet.write_table(pyarrow.Table.from_pylist([ROWS[0], {"question": "Why?", "answer": None}]), path)
    with pytest.raises(TypeError, match=r"a\.parquet:row 1: 'answer' must be a string, got null"):
        load_qa(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"a\.parquet: is damaged or no parquet file \("):
        load_qa(path)


def test_parquet_without_its_library(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"a\.parquet: parquet is read by the `pyarrow` library: install pyarrow, or"):
        load_qa(write("a.parquet", b"PAR1"))


def test_texts(write, tmp_path):
    path = write("a.txt", "\ufeffOnce.\r\n\r\nUpon a time.\n")
    assert load_qa(path) == [QA("", "Once.\n\nUpon a time.\n")]
    assert load_qa(write("a.json", '["One.", "Two."]')) == [QA("", "One."), QA("", "Two.")]
    (tmp_path / "texts").mkdir()
    for name in ("texts/2.txt", "texts/1.txt", "texts/3.txt.gz", "texts/README.md"):
        write(name, f"Of {name}." if "gz" not in name else gzip.compress(b"Packed.", mtime=0))
    assert load_qa(tmp_path / "texts") == [QA("", "Of texts/1.txt."), QA("", "Of texts/2.txt."), QA("", "Packed.")]
    write("texts/2.txt", " \n")
    with pytest.raises(ValueError, match=r"texts/2\.txt: 'text' is empty"):
        load_qa(tmp_path / "texts")
    write("texts/rows.csv", CSV)
    with pytest.raises(
        ValueError, match=r"texts is a folder; name one of its files \(1\.txt, 2\.txt, 3\.txt\.gz, README"
    ):
        load_qa(tmp_path / "texts")


def test_a_file_of_a_folder_by_its_name(write, tmp_path):
    write("forget.csv.gz", gzip.compress(CSV.encode(), mtime=0))
    assert load_qa(tmp_path, name="forget") == PAIRS
    write("forget.json", LINES)
    with pytest.raises(
        ValueError, match=r"forget\.json and forget\.csv\.gz: both are there, of which one is to be read"
    ):
        load_qa(tmp_path, name="forget")


def test_a_limit_reads_no_further(write):
    """What comes after is neither read nor looked at."""
    for name, first, broken in (("a.csv", CSV, '"'), ("a.jsonl", LINES, "{")):
        path = write(name, first + broken)
        assert load_qa(path, limit=2) == PAIRS
        with pytest.raises(ValueError, match=rf"{name}:\d: not valid"):
            load_qa(path)
    noise = "".join(random.Random(0).choices("abcdefgh", k=200_000))
    path = write("cut.jsonl.gz", gzip.compress(f"{LINES}{noise}".encode(), mtime=0)[:-1000])
    assert load_qa(path, limit=2) == PAIRS
    assert load_qa(write("wide.csv", f"question,answer\nWho?,{'Ada ' * 50_000}\n"))[0].answer == "Ada " * 50_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\nWho?,Ada.,Bob.\n",
         r":2: has 3 fields, and the header 2 \(question, answer\); a field with a ',' or a line's end in it needs"),
        ("a.csv", 'question,answer\n"Who,\nhe?",Ada.\nWhy?\n', r":4: has 1 fields, and the header 2"),
        ("a.csv", 'question,answer\nWhy?,So.\n"Who?,Ada.\nWhy?,So.\n', r":3: not valid CSV \(unexpected end of data\)"),
        ("a.csv", 'question,answer\n"Who" he?,Ada.\n', r":2: not valid CSV \(.*\); a quote inside of quotes is wr"),
        ("a.csv", "question,answer, question\nWho?,Ada.,x\n", r":1: column 'question' is there twice; rename one"),
        ("a.csv", "question,answer\nWho?,\n", r":2: 'answer' is empty"),
        ("a.csv", "question,answer\n", r" holds no question-answer pairs"),
        ("a.csv", "", r" holds no question-answer pairs"),
        ("a.json", " \n", r" holds no question-answer pairs"),
        ("a.json", "[]", r" holds no question-answer pairs"),
        ("a.csv", "question,answer\nWho?,J\xfcrgen\n".encode("latin-1"),
         r":2: not UTF-8 \(invalid start byte at byte 6\); save it as UTF-8"),
        ("a.csv", CSV.encode("utf-16"), r": is UTF-16, or no text at all; save it as UTF-8"),
        ("a.jsonl", LINES.encode("utf-16-be"), r": is UTF-16, or no text at all; save it as UTF-8"),
        ("a.jsonl", LINES.replace("}\n", "},\n"), r":1: not valid JSON \(Extra .*\); lines of JSON have no comma"),
        ("a.json", json.dumps(ROWS, indent=1).replace("}\n]", "},\n]"),
         r":\d+: not valid JSON \(.*\); leave out the comma before the closing bracket"),
        ("a.json", json.dumps(ROWS[0], indent=1), r":1: not valid JSON \(.*\); needs JSON lines, a JSON list"),
        ("a.jsonl", "question,answer\n", r":1: not valid JSON \(.*\); needs JSON lines, a JSON list"),
        ("a.json", f'[{json.dumps(ROWS[0])},\n3]', r"\[1\]: needs an object with question and answer, got int"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], r": is damaged, gzip cannot unpack it"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_its_line(write, name, content, message):
    path = write(name, content)
    with pytest.raises((ValueError, TypeError), match=f"^{path}{message}"):
        load_qa(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.xlsx", "save its sheet as CSV"),
        ("a.docx", "save its text as .txt, or its questions and answers as CSV"),
        ("a.yaml", "write its rows as JSON lines"),
        ("a.zip", "unpack it; gzip alone is read as it is"),
        ("a.tar.gz", "unpack it; gzip alone is read as it is"),
        ("a.PKL", "reading a pickle runs whatever program it holds"),
        ("a.pt", "reading a pickle runs whatever program it holds"),
        ("a.arrow", "write it as parquet, as dataset.to_parquet(FILE) does"),
    ],
)
def test_what_is_not_read(write, name, remedy):
    path = write(name, b"whatever")
    with pytest.raises(ValueError, match=r"is not read: .* \(needs JSON lines, a JSON list, or a file named") as caught:
        load_qa(path)
    assert remedy in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):  # and no Hub id
        load_qa(f"someone/{name}")
