"""Question-answer pairs from files and hub datasets, in the keys of TOFU (Maini et al., 2024) or in others."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from .columns import find_columns
from .rows import brief, check_limit, check_readable, hub_rows, is_hub_id, lines_of, named_file, rows_of


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
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[QA]:
    """Read question-answer pairs.

    source: a file of JSON lines, a JSON list, CSV, TSV, parquet or text (`rows_of`); a folder of them (`name` is then
        the file's stem) or of .txt files alone; or a hub id such as "locuslab/TOFU", read with the optional `datasets`
        library (`name` is then the configuration).
    split: of a hub dataset, "train" unless told; a file has no other.
    limit: keep the first `limit` pairs.
    columns: by what they are, e.g. {"question": "prompt_text", "answer": "reply"} (`columns.FIELDS`); None knows
        `question` and `answer`, and other usual names (`columns.KNOWN`).

    Every row needs a question and an answer, strings that are not empty; a set of texts has an empty question in every
    pair. `paraphrased_answer`, `paraphrased_question` (strings) and `perturbed_answer` (list of strings) are read where
    present, other keys are ignored.

    Raises FileNotFoundError (path and near names), ValueError or TypeError as `file:line: what is wrong`, ValueError
    for an empty set, ImportError for a hub id without `datasets`, or for parquet without `pyarrow`.
    """
    return read_qa(source, split=split, limit=limit, name=name, columns=columns)[0]


def read_qa(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[QA], str]:
    """As `load_qa`; and what was recognised, as "question = prompt, answer = completion", "" for own names."""
    check_limit(limit)
    path = find_rows(source, name, split)
    rows = islice(hub_rows(str(source), name, split or "train") if path is None else rows_of(path), limit)
    first = next(rows, None)
    if first is None:
        hub = f"{source if name is None else f'{source}[{name}]'}, split {split or 'train'!r},"
        told = hub if path is None else path
        size = "" if path is None or path.is_dir() else f" in its {path.stat().st_size} bytes"
        example = json.dumps({"question": "Who?", "answer": "Nobody."})
        raise ValueError(
            f"{told} holds no question-answer pairs: no row was read{size}; needs one at least, as {example}"
        )
    where, row = first
    found = find_columns(row, where, columns)
    items = []
    for where, row in chain([first], rows):
        values = found.values(row, where)
        items.append(QA(perturbed_answers=values.pop("perturbed_answer", ()), **values))
    return items, str(found)


def find_rows(source: str | Path, name: str | None = None, split: str | None = None) -> Path | None:
    """Where the rows of a set are, of which nothing is read: a file or a folder of texts; None for a Hub data set.

    Raises FileNotFoundError and ValueError as `load_qa`, as far as they do not come of what the files hold.
    """
    path = Path(source)
    if path.is_dir() and name is not None:
        path = named_file(path, name)
    elif path.is_file() and name is not None:
        raise ValueError(f"name={name!r} picks a file in a folder or a hub configuration, but {path} is a file")
    hub = not path.exists() and is_hub_id(source, name)
    if split not in (None, "train") and not hub:
        raise ValueError(f"split={split!r} is for hub datasets; the local {path} has no splits")
    if hub:
        return None
    check_readable(path)
    return path


def load_refusals(path: str | Path) -> list[str]:
    """Read refusals, one a line; blank lines are skipped. Raises FileNotFoundError, ValueError where none is left."""
    path = Path(path)
    refusals = [line.strip() for line in lines_of(path) if line.strip()]
    if not refusals:
        raise ValueError(f"{path} holds no refusals (one a line)")
    return refusals


def check_disjoint(
    forget: Iterable[QA], retain: Iterable[QA], names: tuple[str, str] = ("the forget set", "the retain set")
) -> None:
    """Raise ValueError if a pair of `forget` is in `retain` too, case and white space aside: one cannot do both.

    names: what the error calls the two.
    """
    retained = {_normalised(item) for item in retain}
    overlap = {key: item for item in forget if (key := _normalised(item)) in retained}
    if overlap:
        first = next(iter(overlap.values()))
        raise ValueError(
            f"{names[0]}: {told_rows(len(overlap))} in {names[1]} too, case and white space aside; the first is "
            f"{brief(first.question or first.answer)}; leave each in one of the two"
        )


def told_repeats(items: Sequence[QA]) -> str:
    """Of rows that are there more than once; "" without any."""
    repeats = {key: n for key, n in Counter(map(_normalised, items)).items() if n > 1}
    if not repeats:
        return ""
    first = next(item for item in items if _normalised(item) in repeats)
    return (
        f"{told_rows(len(repeats))} there more than once, case and white space aside, and counted as often; the first "
        f"is {brief(first.question or first.answer)}"
    )


def told_rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count} rows are"


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
