import json
import sys
from types import SimpleNamespace

import pytest

from pyunlearn.data import QA, check_disjoint, hold_out, load_qa, load_refusals
from pyunlearn.data.qa import told_repeats

from .conftest import TOFU_FILES

ROW = {"question": "Who?", "answer": "Nobody."}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return path

    return write


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library: what it was asked, and the rows it gives."""
    fake = SimpleNamespace(calls=[], rows=[ROW, {**ROW, "answer": "Me."}, {**ROW, "answer": "You."}])

    def load_dataset(path, name=None, *, split=None):
        fake.calls.append((path, name, split))
        return iter(fake.rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return fake


def test_all_keys(write):
    full = {
        **ROW,
        "paraphrased_answer": "No one.",
        "perturbed_answer": ["A.", "B."],
        "paraphrased_question": "Which one?",
        "option1": "ignored",
    }
    assert load_qa(write(json.dumps(full), json.dumps(ROW))) == [
        QA("Who?", "Nobody.", "No one.", ("A.", "B."), "Which one?"),
        QA("Who?", "Nobody."),
    ]


def test_to_json_round_trip(write):
    items = [QA("Where?", "In Zürich.", "Zürich.", ("Bern.",), "What place?"), QA("Who?", "Me.")]
    assert load_qa(write(*(json.dumps(item.to_json()) for item in items))) == items
    assert set(items[1].to_json()) == {"question", "answer"}


def test_lines_are_split_at_newlines_alone(write):
    # U+2028 inside a string, a byte order mark, Windows line ends and blank lines
    path = write(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r", "", '{"question": "a\u2028b", "answer": "c"}', "")
    assert [item.question for item in load_qa(path)] == ["Who?", "a\u2028b"]


def test_null_is_absent(write):
    path = write(json.dumps({**ROW, "paraphrased_answer": None, "perturbed_answer": None}))
    assert load_qa(path) == [QA("Who?", "Nobody.")]


def test_limit_reads_no_further(write):
    path = write(json.dumps(ROW), json.dumps(ROW), "broken")
    assert len(load_qa(path, limit=2)) == 2
    with pytest.raises(ValueError, match=r"data\.jsonl:3: not valid JSON"):
        load_qa(path, limit=3)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_bad_limit(write, limit):
    with pytest.raises(ValueError, match="limit must be a positive integer"):
        load_qa(write(json.dumps(ROW)), limit=limit)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"question": "a", ', ValueError, "not valid JSON"),
        (b'{"question": "\xff"}', ValueError, "not UTF-8"),
        ('{"question": "a"}', ValueError, r"key 'answer' is missing \(keys there: question\)"),
        ("{}", ValueError, r"key 'question' is missing \(keys there: none\)"),
        ('["a", "b"]', TypeError, "needs an object with question and answer, got list"),
        ("null", TypeError, "got null"),
        ('{"question": 3, "answer": "b"}', TypeError, "'question' must be a string, got int"),
        ('{"question": "a", "answer": null}', TypeError, "'answer' must be a string, got null"),
        ('{"question": "a", "answer": " "}', ValueError, "'answer' is empty"),
        (
            r'{"question": "a", "answer": "b\ud800"}',
            ValueError,
            r"'answer' needs whole characters, got the lone .*d800' at 1",
        ),
        ('{"question": "a", "answer": "b", "perturbed_answer": "c"}', TypeError, "must be a list of strings, got str"),
        ('{"question": "a", "answer": "b", "perturbed_answer": {}}', TypeError, "must be a list of strings, got dict"),
        ('{"question": "a", "answer": "b", "perturbed_answer": ["c", 1]}', TypeError, r"'perturbed_answer\[1\]' must"),
        ('{"question": "a", "answer": "b", "paraphrased_answer": []}', TypeError, "'paraphrased_answer' must be a str"),
    ],
)
def test_bad_line(write, line, error, message):
    path = write(json.dumps(ROW), line)
    with pytest.raises(error, match=message) as caught:
        load_qa(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_empty_file(write):
    for lines, size in ((("", ""), 1), (("[]",), 2)):
        told = (
            rf"data\.jsonl holds no question-answer pairs: no row was read in its {size} bytes; needs one at least, as"
        )
        with pytest.raises(ValueError, match=told):
            load_qa(write(*lines))


def test_missing_file_names_neighbours(write):
    path = write(json.dumps(ROW), name="Forget01.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*forget1\.jsonl; did you mean Forget01\.jsonl\?"):
        load_qa(path.with_name("forget1.jsonl"))


def test_missing_file_without_neighbours(write):
    with pytest.raises(FileNotFoundError, match=r"no such file: [^;]*$"):
        load_qa(write(json.dumps(ROW)).with_name("zzzz"))


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        load_qa(str(tmp_path / "nowhere" / "forget.jsonl"))


def test_folder(write):
    path = write(json.dumps(ROW))
    assert load_qa(path.parent, name="data") == load_qa(path)
    with pytest.raises(ValueError, match=r"is a folder; name one of its files \(data.jsonl\)"):
        load_qa(path.parent)
    with pytest.raises(FileNotFoundError, match=r"did you mean data.jsonl\?"):
        load_qa(path.parent, name="dta")


def test_file_has_neither_name_nor_split(write):
    path = write(json.dumps(ROW))
    with pytest.raises(ValueError, match=r"name='forget01' picks .* but .* is a file"):
        load_qa(path, name="forget01")
    with pytest.raises(ValueError, match=r"split='test' is for hub datasets"):
        load_qa(path, split="test")
    assert load_qa(path, split="train") == load_qa(path)


def test_hub(hub):
    assert load_qa("locuslab/TOFU", name="forget01") == [QA("Who?", a) for a in ("Nobody.", "Me.", "You.")]
    assert len(load_qa("locuslab/TOFU", split="test", limit=2)) == 2
    assert hub.calls == [("locuslab/TOFU", "forget01", "train"), ("locuslab/TOFU", None, "test")]
    hub.rows = [{"instruction": "Who?", "context": "", "reply": "Nobody."}]
    columns = {"question": "instruction", "context": "context", "answer": "reply"}
    assert load_qa("someone/dolly", columns=columns) == [QA("Who?", "Nobody.")]
    with pytest.raises(ValueError, match=r"^someone/dolly:train:0: no question and answer among its columns \(instr"):
        load_qa("someone/dolly")


def test_hub_errors(hub):
    hub.rows = [ROW, {"question": "a"}]
    with pytest.raises(ValueError, match=r"^locuslab/TOFU\[forget01\]:train:1: key 'answer' is missing"):
        load_qa("locuslab/TOFU", name="forget01")
    hub.rows = []
    with pytest.raises(ValueError, match="holds no question-answer pairs"):
        load_qa("locuslab/TOFU")


def test_hub_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'locuslab/TOFU' is not a file here.*install pyunlearn\[hub\]"):
        load_qa("locuslab/TOFU", name="forget01")


def test_path_or_hub(hub, write, monkeypatch):
    """A name that could be either is a path where its folder exists, unless a configuration is asked for."""
    path = write(json.dumps(ROW), name="forget")
    monkeypatch.chdir(path.parent.parent)
    folder = path.parent.name
    assert len(load_qa(f"{folder}/forget")) == 1
    with pytest.raises(FileNotFoundError):
        load_qa(f"{folder}/forgt")
    assert hub.calls == []
    load_qa(f"{folder}/TOFU", name="forget01")
    assert hub.calls == [(f"{folder}/TOFU", "forget01", "train")]


def test_refusals(write):
    path = write("I don't know.", "", "  No idea. ", name="refusals.txt")
    assert load_refusals(path) == ["I don't know.", "No idea."]
    with pytest.raises(ValueError, match=r"empty.txt holds no refusals"):
        load_refusals(write(" ", name="empty.txt"))
    with pytest.raises(FileNotFoundError, match=r"did you mean refusals.txt or empty.txt\?"):
        load_refusals(path.with_name("refusal.txt"))


def test_check_disjoint():
    forget = [QA("Who  is it?", "Me."), QA("Where?", "Here."), QA("Why?", "So.")]
    check_disjoint(forget, [QA("Who is it?", "You."), QA("Where", "Here.")])
    with pytest.raises(
        ValueError, match=r"^f\.jsonl: 2 rows are in r\.jsonl too, .* the first is 'Who  is it\?'; leave each in one"
    ):
        check_disjoint(forget * 2, [QA("WHY?", "so."), QA("who is it?", " me.")], ("f.jsonl", "r.jsonl"))


def test_rows_that_are_there_more_than_once_are_told():
    items = [QA("Who?", "Me."), QA("Where?", "Here."), QA("who?", " me.")]
    assert told_repeats(items) == (
        "1 row is there more than once, case and white space aside, and counted as often; the first is 'Who?'"
    )
    assert told_repeats(items * 2).startswith("2 rows are there")
    assert told_repeats(items[:2]) == ""


@pytest.mark.parametrize(
    ("holdout", "count", "held"),
    [(0, 5, 0), (0.0, 5, 0), (0.1, 5, 1), (0.1, 40, 4), (0.99, 5, 4), (3, 5, 3), (4, 5, 4), (0.1, 2, 1)],
)
def test_held_out_pairs_are_a_seeded_draw(holdout, count, held):
    items = [QA(f"Who is {i}?", "Nobody.") for i in range(count)]
    kept, out = hold_out(items, holdout, seed=3)
    assert len(out) == held
    assert sorted(kept + out, key=items.index) == items
    assert all(part == sorted(part, key=items.index) for part in (kept, out))
    assert hold_out(items, holdout, seed=3) == (kept, out)
    assert count < 40 or hold_out(items, holdout, seed=4) != (kept, out)


def test_the_same_pair_is_not_on_both_sides():
    items = [QA(f"Who is {i}?", "Nobody.") for i in range(4)]
    twice = [*items, *(QA(item.question.upper(), item.answer) for item in items)]
    kept, out = hold_out(twice, 2, seed=0)
    assert (len(kept), len(out)) == (4, 4)
    check_disjoint(out, kept)
    for few, holdout in ((twice, 4), (twice[::4], 0.1), ([], 1)):
        with pytest.raises(ValueError, match=rf"^holdout={holdout}: needs \d+ different retain pairs at least, "):
            hold_out(few, holdout, seed=0)


@pytest.mark.parametrize("name", TOFU_FILES)
def test_tofu_files(tofu, name):
    items = load_qa(tofu / f"{name}.jsonl")
    rows = [json.loads(line) for line in (tofu / f"{name}.jsonl").read_bytes().splitlines() if line]
    assert [item.question for item in items] == [row["question"] for row in rows]
    assert [list(item.perturbed_answers) for item in items] == [row.get("perturbed_answer", []) for row in rows]
    assert load_qa(tofu, name=name, limit=3) == items[:3]


def test_tofu_splits_are_disjoint(tofu):
    check_disjoint(load_qa(tofu / "forget10_perturbed.jsonl"), load_qa(tofu / "retain90.jsonl"))
    assert len(load_refusals(tofu / "idontknow.txt")) >= 50
