"""Columns by usual names, as told, and of chats; and what is said where they cannot be told."""

from __future__ import annotations

import json
import re

import pytest

from pyunlearn.data import QA, load_qa
from pyunlearn.data.columns import find_columns
from pyunlearn.data.qa import read_qa

PAIR = QA("Who?", "Ada.")
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "Who?", "answer": "Ada.", "prompt": "no", "completion": "no", "text": "no"}, ""),
        ({"Question": "Who?", " ANSWER ": "Ada."}, "question = Question, answer =  ANSWER "),
        ({"prompt": "Who?", "completion": "Ada.", "response": "no"}, "question = prompt, answer = completion"),
        ({"prompt": "Who?", "response": "Ada."}, "question = prompt, answer = response"),
        ({"instruction": "Who?", "input": "", "output": "Ada."}, "question = instruction + input, answer = output"),
        ({"instruction": "Who?", "output": "Ada."}, "question = instruction, answer = output"),
        ({"query": "Who?", "response": "Ada."}, "question = query, answer = response"),
        ({"input": "Who?", "output": "Ada."}, "question = input, answer = output"),
        ({"question": "Who?", "response": "Ada."}, "question = question, answer = response"),
        ({"messages": CHAT, "source": "x"}, "question and answer = the turns of messages"),
        (
            {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ada."}]},
            "question and answer = the turns of conversations",
        ),
    ],
)
def test_usual_names(write, row, told):
    assert read_qa(write(row, row)) == ([PAIR, PAIR], told)


def test_an_input_follows_its_instruction(write):
    rows = [{"instruction": "Who wrote it?", "input": given, "output": "Ada."} for given in ("The notes.", "", None)]
    assert [item.question for item in load_qa(write(*rows))] == ["Who wrote it?\n\nThe notes.", *["Who wrote it?"] * 2]


def test_texts(write):
    assert read_qa(write({"text": " As it stands.\n"})) == ([QA("", " As it stands.\n")], "texts without questions")
    assert load_qa(write({"body": "One.", "id": 3}), columns={"text": "body"}) == [QA("", "One.")]


def test_columns_as_told(write):
    path = write({"id": 1, "q": "Who?", "a": "Ada.", "alt": "Ada L.", "false": ["Bob."], "about": "Her notes."})
    columns = {"question": "q", "answer": "a", "paraphrased_answer": "alt", "perturbed_answer": "false"}
    items, told = read_qa(path, columns=columns)
    assert items == [QA("Who?", "Ada.", "Ada L.", ("Bob.",))]
    assert told == "question = q, answer = a, paraphrased_answer = alt, perturbed_answer = false"
    items, told = read_qa(path, columns={"question": "q", "context": "about", "answer": "a"})
    assert items == [QA("Who?\n\nHer notes.", "Ada.")]
    assert told == "question = q + about, answer = a"
    path = write({"prompt": "Who?", "reply": "Ada.", "log": CHAT})
    assert load_qa(path, columns={"answer": "reply"}) == [PAIR]  # the other one has a usual name
    assert load_qa(path, columns={"messages": "log"}) == [PAIR]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt_text": "Who?", "id": 1, "reply": "Ada."}, None,
         ":1: no question and answer among its columns (prompt_text, id, reply); tell which they are: "
         "columns: {question: prompt_text, answer: reply} under the set's path in a configuration, "
         "--set 'data.forget.columns={question: prompt_text, answer: reply}', or "
         "--columns 'question=prompt_text,answer=reply'"),
        ({"x: y": "Who?", "z": "Ada."}, None, 'data.forget.columns={question: "x: y", answer: z}'),
        ({"id": "", "frage": "Who?", "antwort": "Ada."}, None, "--columns 'question=frage,answer=antwort'"),
        ({"x": "", "y": "", "z": ""}, None, "--columns 'question=COLUMN,answer=COLUMN'"),
        ({"anwser": "", "id": 1, "questoin": ""}, None, "--columns 'question=questoin,answer=anwser'"),
        ({"body": "Once."}, None, "--columns 'text=body'"),
        ({"x": "Who?", "reply": "Ada."}, {"answer": "reply"}, "--columns 'question=x,answer=reply'"),
        ({f"c{i}": "" for i in range(30)}, None, "c18, c19, ...)"),
        ({}, None, ":1: no question and answer among its columns (none)"),
        ({"q": "Who?", "reply": "Ada."}, {"question": "q", "answer": "repli"},
         ":1: columns: answer = repli, which is not there; did you mean reply? needs one of q, reply"),
        ({"q": "Who?"}, {"queston": "q"}, "columns='queston': did you mean question"),
        ({"q": "Who?"}, {"text": "q", "answer": "q"}, "columns: text is all of a sample, and text, answer were given"),
    ],
)  # fmt: skip
def test_columns_that_are_not_there(write, row, columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_qa(write(row), columns=columns)


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([SYSTEM, *CHAT], "'messages' begins with a system turn, 'Be kind.', for which a question and its answer have "
         "no room; take it out of the rows, and say it before all of them by the prompt's system"),
        ([*CHAT, *CHAT], "'messages' needs two turns, of user and assistant, got 4 (user, assistant, user, assistant); "
         "earlier turns are part of what is asked: put them into the question"),
        (CHAT[:1], "'messages' needs two turns, of user and assistant, got 1 (user)"),
        (CHAT[::-1], "'messages' needs two turns, of user and assistant, got 2 (assistant, user)"),
        ([], "'messages' needs two turns, of user and assistant, got 0 (none)"),
        ("Who?", "'messages' must be a list of turns, got str"),
        (None, "'messages' must be a list of turns, got null"),
        ([CHAT[0], {"role": "assistant", "content": [{"type": "text"}]}], "[1]: 'content' must be a string, got list"),
        ([CHAT[0], {"role": "assistant"}], "[1]: key 'content' is missing (keys there: role)"),
    ],
)  # fmt: skip
def test_chats_that_are_no_pair(write, turns, message):
    with pytest.raises((TypeError, ValueError), match=rf"a\.jsonl:2: .*{re.escape(message)}"):
        load_qa(write({"messages": CHAT}, {"messages": turns}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Who?", "completion": 3}, "'completion' must be a string, got int"),
        ({"prompt": "Who?", "completion": None}, "'completion' must be a string, got null"),
        ({"prompt": CHAT, "completion": "Ada."}, "'prompt' must be a string, got list"),
        ({"prompt": "Who?", "response": "Ada."}, r"key 'completion' is missing \(keys there: prompt, response\)"),
    ],
)
def test_every_row_is_read_by_the_same_columns(write, row, message):
    with pytest.raises((TypeError, ValueError), match=rf"a\.jsonl:2: {message}"):
        load_qa(write({"prompt": "Who?", "completion": "Ada."}, row))


def test_of_two_names_that_differ_in_case_the_usual_one_counts():
    row = {"question": "a", "Question": "b", "answer": "c", "ANSWER": "d"}
    assert find_columns(row, "f:1").named == {"question": "question", "answer": "answer"}


def test_a_list_is_no_text_to_be_guessed():
    with pytest.raises(ValueError, match="question=COLUMN,answer=COLUMN"):
        find_columns({"data": [1]}, "f:1")
