"""Question-answer pairs from JSON lines or from a hub dataset, in the keys of TOFU (Maini et al., 2024)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._hints import path_hint

LONGEST_TOLD = 160  # characters of a text in an error
FILE_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")


@dataclass(frozen=True)
class QA:
    """One question and its answer; the optional fields serve the truth ratio and the paraphrase metrics.

    `perturbed_answers` are wrong answers in the sentence form of `paraphrased_answer`.
    """

    question: str
    answer: str
    paraphrased_answer: str | None = None
    perturbed_answers: tuple[str, ...] = ()
    paraphrased_question: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The pair in TOFU's keys, optional ones only where present."""
        row: dict[str, Any] = {"question": self.question, "answer": self.answer}
        if self.paraphrased_answer is not None:
            row["paraphrased_answer"] = self.paraphrased_answer
        if self.perturbed_answers:
            row["perturbed_answer"] = list(self.perturbed_answers)
        if self.paraphrased_question is not None:
            row["paraphrased_question"] = self.paraphrased_question
        return row


def load_qa(
    source: str | Path, *, split: str | None = None, limit: int | None = None, name: str | None = None
) -> list[QA]:
    """Read question-answer pairs.

    source: a JSON-lines file; a folder of them (`name` is then the file's stem); or a hub id such as
        "locuslab/TOFU", read with the optional `datasets` library (`name` is then the configuration).
    split: of a hub dataset, "train" unless told; a file has no other.
    limit: keep the first `limit` pairs.

    Every row needs the strings `question` and `answer`; `paraphrased_answer`, `paraphrased_question` (strings) and
    `perturbed_answer` (list of strings) are read where present, other keys are ignored.

    Raises FileNotFoundError (path and near names), ValueError or TypeError as `file:line: what is wrong`, ValueError
    for an empty set, ImportError for a hub id without `datasets`.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"limit must be a positive integer or None, got {limit!r}")
    path = Path(source)
    if path.is_dir() and name is not None:
        path = path / f"{name}.jsonl"
    elif path.is_file() and name is not None:
        raise ValueError(f"name={name!r} picks a file in a folder or a hub configuration, but {path} is a file")
    elif _is_hub_id(source, name):
        return _load_hub(str(source), name, split or "train", limit)
    if split not in (None, "train"):
        raise ValueError(f"split={split!r} is for hub datasets; the local {path} has no splits")
    items: list[QA] = []
    for number, text in enumerate(_read_lines(path), start=1):
        if limit is not None and len(items) == limit:
            break
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{where}: not valid JSON (it is too deep)") from error
        items.append(_to_qa(row, where))
    if not items:
        raise ValueError(f"{path} holds no question-answer pairs")
    return items


def load_refusals(path: str | Path) -> list[str]:
    """Read refusals, one a line; blank lines are skipped. Raises FileNotFoundError, ValueError where none is left."""
    path = Path(path)
    refusals = [line.strip() for line in _read_lines(path) if line.strip()]
    if not refusals:
        raise ValueError(f"{path} holds no refusals (one a line)")
    return refusals


def check_disjoint(forget: Iterable[QA], retain: Iterable[QA]) -> None:
    """Raise ValueError if a pair of `forget` is in `retain` too, case and white space aside: one cannot do both."""
    retained = {_normalised(item) for item in retain}
    overlap = [item for item in forget if _normalised(item) in retained]
    if overlap:
        raise ValueError(
            f"{len(overlap)} forget pair(s) are in the retain set too; the first question is "
            f"{brief(overlap[0].question)}"
        )


def hold_out(items: Sequence[QA], holdout: float, seed: int) -> tuple[list[QA], list[QA]]:
    """(kept, held out), in the order of `items`: a seeded draw of `holdout` pairs, or of that share if it is below 1.

    A share takes one at least, and leaves one. Pairs that are the same, case and white space aside, count as one and
    stay together. 0 holds out none.

    Raises ValueError for too few pairs.
    """
    if holdout == 0:
        return list(items), []
    different = list(dict.fromkeys(map(_normalised, items)))
    count = max(1, min(round(holdout * len(different)), len(different) - 1)) if holdout < 1 else int(holdout)
    if count >= len(different):
        raise ValueError(
            f"holdout={holdout:g}: needs {count + 1} different retain pairs at least, {count} to hold out and one to "
            f"keep, got {len(different)}; 0 holds out none"
        )
    drawn = set(random.Random(f"{seed}/holdout").sample(different, count))
    chosen = [_normalised(item) in drawn for item in items]
    kept, held = ([item for item, out in zip(items, chosen, strict=True) if out == side] for side in (False, True))
    return kept, held


def _normalised(item: QA) -> tuple[str, str]:
    return " ".join(item.question.casefold().split()), " ".join(item.answer.casefold().split())


def _is_hub_id(source: str | Path, name: str | None) -> bool:
    """A string like owner/dataset that is no path here. A configuration name settles the doubtful cases."""
    if isinstance(source, Path) or Path(source).exists() or source.endswith(FILE_SUFFIXES):
        return False
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is None:
        return False
    return name is not None or not Path(source).parent.is_dir()


def _load_hub(source: str, name: str | None, split: str, limit: int | None) -> list[QA]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source!r} is not a file here, so it is read as a hub dataset, which needs the `datasets` library: "
            "install pyunlearn[hub], or give the path of a JSON-lines file"
        ) from error
    rows = datasets.load_dataset(source, name, split=split)
    where = source if name is None else f"{source}[{name}]"
    items: list[QA] = []
    for number, row in enumerate(rows):
        if limit is not None and len(items) == limit:
            break
        items.append(_to_qa(row, f"{where}:{split}:{number}"))
    if not items:
        raise ValueError(f"{where}, split {split!r}, holds no question-answer pairs")
    return items


def _read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file. Split at \\n alone, as JSON lines are: text may hold U+2028 and the like."""
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


def _to_qa(row: object, where: str) -> QA:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: needs an object with question and answer, got {_type(row)}")
    for key in ("question", "answer"):
        if key not in row:
            raise ValueError(f"{where}: key {key!r} is missing (keys there: {', '.join(map(str, row)) or 'none'})")
    perturbed = row.get("perturbed_answer")
    if perturbed is None:
        perturbed = []
    elif isinstance(perturbed, str) or not isinstance(perturbed, Sequence):
        raise TypeError(f"{where}: 'perturbed_answer' must be a list of strings, got {_type(perturbed)}")
    return QA(
        question=_text(row["question"], "question", where),
        answer=_text(row["answer"], "answer", where),
        paraphrased_answer=_optional(row, "paraphrased_answer", where),
        perturbed_answers=tuple(_text(wrong, f"perturbed_answer[{i}]", where) for i, wrong in enumerate(perturbed)),
        paraphrased_question=_optional(row, "paraphrased_question", where),
    )


def _optional(row: Mapping[str, object], key: str, where: str) -> str | None:
    return None if row.get(key) is None else _text(row[key], key, where)


def brief(text: str) -> str:
    """Its `repr` for an error; of a long text, the beginning."""
    return repr(text if len(text) <= LONGEST_TOLD else f"{text[:LONGEST_TOLD]}...")


def check_text(text: str, what: str) -> None:
    """Raises ValueError for a lone surrogate, half of a character: JSON can say it, no tokenizer can read it."""
    if (half := re.search(r"[\ud800-\udfff]", text)) is not None:
        raise ValueError(f"{what} needs whole characters, got the lone surrogate {half[0]!r} at {half.start()}")


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{where}: {key!r} must be a string, got {_type(value)}")
    check_text(value, f"{where}: {key!r}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    return value


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__
