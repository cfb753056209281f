"""Which columns of a data set are the question and the answer: as told, or by the names that people give them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .._hints import check_known, hint, near
from .rows import brief, object_of, text_of, texts_of, told_names, type_of

# What a column can be. context: stands after the question, a blank line between; text: one without a question;
# messages: a chat of one question and its answer.
OPTIONAL = ("paraphrased_answer", "perturbed_answer", "paraphrased_question")
FIELDS = ("question", "answer", "context", *OPTIONAL, "text", "messages")
WHOLE = ("text", "messages")  # of which one is enough
KNOWN: tuple[dict[str, str], ...] = (  # the first of which all columns are there
    {"question": "question", "answer": "answer"},
    {"question": "prompt", "answer": "completion"},
    {"question": "prompt", "answer": "response"},
    {"question": "instruction", "context": "input", "answer": "output"},
    {"question": "instruction", "answer": "output"},
    {"question": "query", "answer": "response"},
    {"question": "input", "answer": "output"},
    {"question": "question", "answer": "response"},
    {"messages": "messages"},
    {"messages": "conversations"},
    {"text": "text"},
)
WORDS = {  # of names that are like a question's and an answer's, the likeliest first
    "question": ("question", "prompt", "query", "instruction", "input", "problem", "source", "user", "q"),
    "answer": ("answer", "response", "completion", "output", "reply", "target", "solution", "assistant", "gt", "a"),
}
NO_TEXT = ("", "id", "idx", "index", "unnamed: 0")  # names of columns that number the rows
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # of others' chats


@dataclass(frozen=True)
class Columns:
    """The columns of a data set, by what they are (`FIELDS`); all rows are read by the same."""

    named: Mapping[str, str]

    def __str__(self) -> str:
        """What was recognised, for people; "" where every column has its own name."""
        if "text" in self.named:
            return "texts without questions"
        if "messages" in self.named:
            return f"question and answer = the turns of {self.named['messages']}"
        question = " + ".join(self.named[field] for field in ("question", "context") if field in self.named)
        others = {field: column for field, column in self.named.items() if field in OPTIONAL and field != column}
        named = {"question": question, "answer": self.named["answer"]} | others
        own = all(field == column for field, column in named.items())
        return "" if own else ", ".join(f"{field} = {column}" for field, column in named.items())

    def values(self, row: object, where: str) -> dict[str, Any]:
        """Of a row: question, answer and what else it has, by these names. Raises TypeError or ValueError."""
        named = self.named
        if "text" in named:
            row = {named["text"]: row} if isinstance(row, str) else row  # a list of texts
            found = object_of(row, where, [named["text"]])
            return {"question": "", "answer": text_of(found[named["text"]], named["text"], where)}
        if "messages" in named:
            found = object_of(row, where, [named["messages"]])
            question, answer = turns_of(found[named["messages"]], f"{where}: {named['messages']!r}")
            return {"question": question, "answer": answer}
        found = object_of(row, where, [named["question"], named["answer"]])
        values: dict[str, Any] = {field: text_of(found[named[field]], named[field], where) for field in KNOWN[0]}
        for field in ("context", *OPTIONAL):
            column = named.get(field, field if field in OPTIONAL else None)
            if column is not None and found.get(column) not in (None, ""):  # CSV has no null
                read = texts_of if field == "perturbed_answer" else text_of
                values[field] = read(found[column], column, where)
        if "context" in values:
            values["question"] = f"{values['question']}\n\n{values.pop('context')}"
        return values


def find_columns(row: Any, where: str, given: Mapping[str, str] | None = None) -> Columns:
    """Of a data set, by its first row. given: columns by what they are, in the place of usual names.

    Usual names are `KNOWN`, upper or lower case. Raises TypeError for a row that is none, ValueError for a given column
    that is not there, and for none that is a question or an answer, with the names that come nearest.
    """
    given = dict(given or {})
    check_fields(given)
    if isinstance(row, str) and not given:
        return Columns({"text": "text"})
    if not isinstance(row, Mapping):
        object_of(row, where, ("question", "answer"))  # raises
    keys: dict[str, Any] = {}
    for key in row:  # of two that differ in case alone the usual one counts
        folded = str(key).strip().casefold()
        keys[folded] = key if folded == key else keys.get(folded, key)
    there = list(row)
    for field, column in given.items():
        if column not in there:
            raise ValueError(
                f"{where}: columns: {field} = {column}, which is not there; {hint(column, there)} (where the sets of a "
                "run differ, data.forget.columns and data.retain.columns are of one alone)"
            )
    if any(field in given for field in WHOLE):
        return Columns(given)
    for known in KNOWN:
        named = {field: given.get(field, keys.get(column)) for field, column in known.items()}
        if None not in named.values() and not (given and known.keys() & {*WHOLE}):
            return Columns({**{field: str(column) for field, column in named.items()}, **given})
    raise ValueError(
        f"{where}: no question and answer among its columns ({told_names(there)}); tell which they are: "
        f"{ways_to_tell(likely([key for key in there if isinstance(row[key], str)], given))}"
    )


def check_fields(columns: Mapping[str, str]) -> None:
    """Raises ValueError for a name that no column can have, and for more than one kind of set."""
    for field in columns:
        check_known("columns", field, FIELDS)
    whole = [field for field in WHOLE if field in columns]
    if whole and len(columns) > 1:
        raise ValueError(f"columns: {whole[0]} is all of a sample, and {', '.join(columns)} were given; leave some out")


def likely(there: Iterable[str], given: Mapping[str, str]) -> dict[str, str]:
    """What the columns may be, for people to look at; COLUMN stands for one that cannot be told."""
    free = [name for name in there if name not in given.values() and name.casefold() not in NO_TEXT]
    if len(free) == 1 and not given:
        return {"text": free[0]}
    missing, found = [field for field in WORDS if field not in given], dict(given)
    for field in missing:
        like = [column for word in WORDS[field] for column in free if is_like(column.casefold(), word)]
        for column in [*like, *near(field, free)][:1]:
            found[field] = column
            free.remove(column)
    unknown = [field for field in missing if field not in found]
    found |= dict(zip(unknown, free if len(free) == len(unknown) else ["COLUMN"] * len(unknown), strict=True))
    return {field: found[field] for field in FIELDS if field in found}


def is_like(name: str, word: str) -> bool:
    return name == word or (len(word) > 2 and word in name)


def ways_to_tell(columns: Mapping[str, str]) -> str:
    """The words that give them: in a configuration, by --set, and to commands that read one set."""
    plain = {field: name if re.fullmatch(r"\w[\w -]*", name) else json.dumps(name) for field, name in columns.items()}
    flow = ", ".join(f"{field}: {name}" for field, name in plain.items())
    option = ",".join(f"{field}={name}" for field, name in columns.items())
    return (
        f"columns: {{{flow}}} under the set's path in a configuration, --set 'data.forget.columns={{{flow}}}', or "
        f"--columns '{option}'"
    )


def turns_of(turns: object, where: str) -> tuple[str, str]:
    """The question and the answer of a chat that has these two turns alone: {role, content}, or {from, value}.

    Raises TypeError or ValueError for any other: a pair has no room for more, and nothing is left out.
    """
    if isinstance(turns, str) or not isinstance(turns, list | tuple):
        raise TypeError(f"{where} must be a list of turns, got {type_of(turns)}")
    texts = []
    for i, turn in enumerate(turns):
        at = f"{where}[{i}]"
        role, content = ("from", "value") if isinstance(turn, Mapping) and "from" in turn else ("role", "content")
        found = object_of(turn, at, (role, content))
        said = text_of(found[role], role, at)
        texts.append((ROLES.get(said, said), text_of(found[content], content, at)))
    roles = [role for role, _ in texts]
    if roles[:1] == ["system"]:
        raise ValueError(
            f"{where} begins with a system turn, {brief(texts[0][1])}, for which a question and its answer have no "
            "room; take it out of the rows, and say it before all of them by the prompt's system"
        )
    if roles != ["user", "assistant"]:
        raise ValueError(
            f"{where} needs two turns, of user and assistant, got {len(roles)} ({told_names(roles)}); earlier turns "
            "are part of what is asked: put them into the question"
        )
    return texts[0][1], texts[1][1]
