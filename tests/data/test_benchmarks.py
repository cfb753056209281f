"""MUSE, WMDP, WHP and SAFE as their authors lay them out; and whatever is wrong with a file, by its name and row."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import pytest

from pyunlearn.data import QA, load_muse, load_safe, load_text, load_whp, load_wmdp

QUESTION = {"question": " Which is a sea? ", "choices": ["Hill", "Aral", "Oak", "Ada"], "answer": 1}


def write(path, rows):
    """As one list, or in lines, as its name ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)


@pytest.fixture
def muse(tmp_path):
    files = {
        "verbmem/forget": [{"prompt": f"Once {i}", "gt": "upon a time."} for i in range(3)],
        "knowmem/forget_qa": [{"question": "Who?", "answer": "Ada."}],
        "knowmem/forget_qa_icl": [{"question": "A?", "answer": "Yes"}, {"question": "B?", "answer": "No"}],
        "knowmem/retain_qa": [{"question": "Where?", "answer": "Rome."}, {"question": "When?", "answer": "Now."}],
        "knowmem/retain_qa_icl": [{"question": "C?", "answer": "Maybe"}],
        "privleak/forget": ["A text.\n", "Another."],
        "privleak/holdout": [{"text": "Not seen."}],
    }
    for name, rows in files.items():
        write(tmp_path / f"{name}.json", rows)
    return tmp_path


def test_muse(muse):
    sets = load_muse(muse)
    assert sets["forget_verbmem"][2] == QA("Once 2", "upon a time.")
    before = "Question: A?\nAnswer: Yes\n\nQuestion: B?\nAnswer: No\n\n"
    assert sets["forget_knowmem"] == [QA(f"{before}Question: Who?\nAnswer: ", "Ada.")]
    assert sets["retain_knowmem"][1] == QA("Question: C?\nAnswer: Maybe\n\nQuestion: When?\nAnswer: ", "Now.")
    assert sets["forget_privleak"] == [QA("", "A text.\n"), QA("", "Another.")]
    assert sets["holdout_privleak"] == [QA("", "Not seen.")]
    limited = load_muse(muse, 1)
    assert {len(items) for items in limited.values()} == {1}
    assert limited["forget_knowmem"] == sets["forget_knowmem"]  # its shots are not limited


def test_lines_in_the_place_of_a_list(muse):
    (muse / "privleak" / "holdout.json").unlink()
    write(muse / "privleak" / "holdout.jsonl", [{"text": "In lines."}])
    assert load_muse(muse)["holdout_privleak"] == [QA("", "In lines.")]


def test_wmdp(tmp_path):
    write(tmp_path / "wmdp-bio.jsonl", [QUESTION, {**QUESTION, "answer": 3}])
    sets = load_wmdp(tmp_path)
    assert sets.keys() == {"bio"}
    about = "The following are multiple choice questions (with answers) about biology.\n\n"
    prompt = f"{about}Which is a sea?\nA. Hill\nB. Aral\nC. Oak\nD. Ada\nAnswer:"
    assert sets["bio"] == [
        QA(prompt, "B", perturbed_answers=("A", "C", "D")),
        QA(prompt, "D", perturbed_answers=("A", "B", "C")),
    ]
    write(tmp_path / "wmdp-chem.json", [QUESTION] * 3)
    sets = load_wmdp(tmp_path, 2)
    assert [len(items) for items in sets.values()] == [2, 2]
    assert "about chemistry" in sets["chem"][0].question


def test_whp_and_safe(tmp_path):
    write(tmp_path / "hp_test_qa_300.jsonl", [{"prompt": "Go on: the boy", "response": "who lived."}])
    assert load_whp(tmp_path) == {"test_300": [QA("Go on: the boy", "who lived.")]}
    write(tmp_path / "pku_test.jsonl", [{"prompt": "How do I?", "response_0": "Never."}])
    write(tmp_path / "real_toxicity_prompts.json", [{"prompt": {"text": "You are", "toxicity": None}}])
    assert load_safe(tmp_path) == {"pku": [QA("How do I?", "")], "real": [QA("You are", "")]}


def response(i, *safe):
    told = {f"is_response_{j}_safe": each for j, each in enumerate(safe)}
    return {"prompt": f"How {i}?", "response_0": f"So {i}.", "response_1": f"Or so {i}.", **told}


def test_what_safe_forgets(tmp_path):
    """SOUL's draw: of all unsafe responses, row by row, 200 places by Python's own generator."""
    kinds = ((True, True), (False, True), (True, False), (False, False))
    write(tmp_path / "pku_train.jsonl", [response(i, *kinds[i % 4]) for i in range(900)])
    unsafe = [
        QA(f"How {i}?", f"{says} {i}.")
        for i in range(900)
        for says, safe in zip(("So", "Or so"), kinds[i % 4], strict=True)
        if not safe
    ]
    random.seed(1000)
    expected = [unsafe[i] for i in random.sample(range(900), 200)]
    assert load_safe(tmp_path) == {"forget": expected}
    assert load_safe(tmp_path, 3) == {"forget": expected[:3]}
    write(tmp_path / "pku_train.jsonl", [response(i, False, i > 0) for i in range(3)])
    sets = load_safe(tmp_path)
    assert sorted(item.answer for item in sets["forget"]) == ["Or so 0.", "So 0.", "So 1.", "So 2."]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({}, ValueError, r"pku_train\.jsonl: holds no unsafe response"),
        ({"is_response_1_safe": 0}, TypeError, r":2: 'is_response_1_safe' must be true or false, got int"),
        ({"is_response_0_safe": False, "response_0": " "}, ValueError, r":2: 'response_0' is empty"),
        ({"is_response_0_safe": False, "prompt": None}, TypeError, r":2: 'prompt' must be a string, got null"),
    ],
)
def test_bad_responses(tmp_path, change, kind, message):
    write(tmp_path / "pku_train.jsonl", [response(0, True, True), response(1, True, True) | change])
    with pytest.raises(kind, match=message):
        load_safe(tmp_path)
    write(tmp_path / "pku_train.jsonl", [{"prompt": "How?"}])
    with pytest.raises(ValueError, match=r":1: key 'response_0' is missing \(keys there: prompt\)"):
        load_safe(tmp_path)


def test_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("Line one.\n\nLine two.\n")
    assert load_text(tmp_path / "text.txt") == [QA("", "Line one.\n\nLine two.\n")]
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfLine one.\r\n\r\nLine two.\r\n")
    assert load_text(tmp_path / "text.txt") == [QA("", "Line one.\n\nLine two.\n")]
    (tmp_path / "text.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"text\.txt: is empty, needs a text"):
        load_text(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"choices": ["a", "b", "c"]}, ValueError, r"wmdp-bio\.jsonl:2: 'choices' needs 4 texts, got 3"),
        ({"choices": "abcd"}, TypeError, r":2: 'choices' must be a list of strings, got str"),
        ({"choices": ["a", " ", "c", "d"]}, ValueError, r":2: 'choices\[1\]' is empty"),
        ({"answer": 4}, ValueError, r":2: 'answer' needs the place of a choice, 0 to 3, got 4"),
        ({"answer": -1}, ValueError, r":2: 'answer' needs the place of a choice, 0 to 3, got -1"),
        ({"answer": "B"}, TypeError, r":2: 'answer' must be an integer, the place of a choice, got str"),
        ({"answer": True}, TypeError, r":2: 'answer' must be an integer, the place of a choice, got bool"),
        ({"question": ""}, ValueError, r":2: 'question' is empty"),
    ],
)
def test_bad_choices(tmp_path, change, kind, message):
    write(tmp_path / "wmdp-bio.jsonl", [QUESTION, QUESTION | change])
    with pytest.raises(kind, match=message):
        load_wmdp(tmp_path)


def test_the_hub_s_sets(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        of_muse = {"prompt": "Once", "gt": "upon", "answer": "x", "text": "a text"}
        return iter([QUESTION | of_muse if "MUSE" in path else QUESTION])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_wmdp("cais/wmdp").keys() == {"bio", "cyber", "chem"}
    assert asked[0] == ("cais/wmdp", "wmdp-bio", "test")
    assert load_muse("muse-bench/MUSE-News")["forget_verbmem"] == [QA("Once", "upon")]
    assert asked[3:5] == [
        ("muse-bench/MUSE-News", "verbmem", "forget"),
        ("muse-bench/MUSE-News", "knowmem", "forget_qa_icl"),
    ]


def test_bad_rows(muse):
    file = muse / "verbmem" / "forget.json"
    for rows, kind, message in (
        ([{"prompt": "", "gt": "x"}], ValueError, r"forget\.json\[0\]: 'prompt' is empty"),
        ([{"prompt": "Once"}], ValueError, r"forget\.json\[0\]: key 'gt' is missing \(keys there: prompt\)"),
        (["Once"], TypeError, r"forget\.json\[0\]: needs an object with prompt and gt, got str"),
        ([], ValueError, r"forget\.json: holds no rows"),
    ):
        write(file, rows)
        with pytest.raises(kind, match=message):
            load_muse(muse)
    file.write_text('[{"prompt": "Once",\n "gt": ]')
    with pytest.raises(ValueError, match=r"forget\.json:2: not valid JSON \(Expecting value at column 8\)"):
        load_muse(muse)


def test_files_from_elsewhere(tmp_path):
    """Of Windows, with a byte order mark, of other scripts, and with what some take for ends of lines."""
    prompts = [
        "Go on: \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "Go on: \U0001f600\u200d\U0001f525",
        "Go on: \u05e9\u05dc\u05d5\u05dd\u2028\u0085",
    ]
    rows = [json.dumps({"prompt": each, "response": "x"}, ensure_ascii=False) for each in prompts]
    (tmp_path / "hp_test_qa_300.jsonl").write_bytes(("\ufeff" + "\r\n\r\n".join(rows) + "\r\n").encode())
    assert [item.question for item in load_whp(tmp_path)["test_300"]] == prompts
    (tmp_path / "hp_test_qa_300.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hp_test_qa_300\.jsonl: holds no rows"):
        load_whp(tmp_path)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_bad_limits(muse, limit):
    write(muse / "pku_train.jsonl", [response(0, False, False)])
    for load in (load_muse, load_safe):
        with pytest.raises(ValueError, match=rf"limit must be a positive integer or None, got {limit}"):
            load(muse, limit)


def test_which_of_two_files_is_not_guessed(tmp_path):
    for suffix in ("json", "jsonl"):
        write(tmp_path / f"wmdp-bio.{suffix}", [QUESTION])
    with pytest.raises(ValueError, match=r"wmdp-bio\.json and wmdp-bio\.jsonl: both are there"):
        load_wmdp(tmp_path)


def test_what_is_missing(muse, tmp_path):
    (muse / "knowmem" / "retain_qa.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"retain_qa\.json, nor retain_qa\.jsonl; did you mean retain_qa_icl"):
        load_muse(muse)
    with pytest.raises(ValueError, match=r"has none of wmdp-bio, wmdp-cyber, wmdp-chem \(\.json or \.jsonl\), but k"):
        load_wmdp(muse)
    with pytest.raises(ValueError, match=r"has none of hp_train_qa_100, .*, but knowmem, privleak, verbmem"):
        load_whp(muse)
    for load in (load_muse, load_wmdp, load_whp, load_safe):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match=r"forget\.json is a file; needs the folder"):
            load(muse / "verbmem" / "forget.json")
