"""Sets of benchmarks other than TOFU, as their authors lay them out: MUSE, WMDP, WHP and SAFE, as questions and answers
whose question is the whole prompt (`PlainFormat`). A text that is read as a whole has an empty one.

Each reader takes a folder, those of MUSE and WMDP a Hub id too, and limit: of each set, the first rows. All raise
FileNotFoundError (path and near names) for a folder or a file that is missing, TypeError or ValueError that tells file
and row for other contents, ValueError for a set without rows, a limit below 1, or both a .json and a .jsonl,
ImportError for a Hub id without `datasets`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .._hints import path_hint
from .qa import QA
from .rows import (
    Row,
    check_limit,
    hub_rows,
    is_hub_id,
    json_rows,
    object_of,
    read_text,
    text_of,
    texts_of,
    type_of,
)

LETTERS = "ABCD"
SUFFIXES = (".json", ".jsonl")  # either is a list or lines, as its content says
Sets = dict[str, list[QA]]


def load_muse(source: str | Path, limit: int | None = None) -> Sets:
    """MUSE (Shi et al., 2025), News or Books: {subset}/{split}.json, a list, or .jsonl.

    forget_verbmem: verbmem/forget {prompt, gt}. forget_knowmem, retain_knowmem: knowmem/{forget,retain}_qa {question,
    answer}, each after all of knowmem/{forget,retain}_qa_icl. forget_privleak, holdout_privleak: texts, or {text}, of
    privleak/{forget,holdout}.
    """
    sets = {"forget_verbmem": read_set(source, "verbmem", pair_of("prompt", "gt"), limit, "forget")}
    for name in ("forget", "retain"):
        shots = read_set(source, "knowmem", pair_of("question", "answer"), None, f"{name}_qa_icl")
        asked = read_set(source, "knowmem", pair_of("question", "answer"), limit, f"{name}_qa")
        before = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
        prompts = (f"{before}Question: {item.question}\nAnswer: " for item in asked)
        sets[f"{name}_knowmem"] = [QA(prompt, item.answer) for prompt, item in zip(prompts, asked, strict=True)]
    for name in ("forget", "holdout"):
        sets[f"{name}_privleak"] = read_set(source, "privleak", whole_text, limit, name)
    return sets


TOPICS = {"bio": "biology", "cyber": "cybersecurity", "chem": "chemistry"}


def load_wmdp(source: str | Path, limit: int | None = None) -> Sets:
    """WMDP (Li et al., 2024): bio, cyber and chem, those of wmdp-{name}.json or .jsonl that are there {question,
    choices, answer}, put as lm-eval's tasks wmdp_{name} do. choices: four texts; answer: 0 to 3.

    The answer is a letter, A to D, the perturbed ones are the other letters.
    """
    names = present(source, [f"wmdp-{name}" for name in TOPICS])
    return {
        name: read_set(source, f"wmdp-{name}", choices_of(topic), limit, hub_split="test")
        for name, topic in TOPICS.items()
        if f"wmdp-{name}" in names
    }


def load_whp(folder: str | Path, limit: int | None = None) -> Sets:
    """Passages to go on with, for Who's Harry Potter (Eldan and Russinovich, 2023), as SOUL (Jia et al., 2024) has
    them: train_100, train_300, test_100 and test_300, those of hp_{train,test}_qa_{100,300}.jsonl or .json that are
    there {prompt, response}; the number is that of a passage's words in the prompt."""
    names = {f"hp_{split}_qa_{words}": f"{split}_{words}" for split in ("train", "test") for words in (100, 300)}
    there = present(in_folder(folder), list(names))
    return {names[name]: read_set(folder, name, pair_of("prompt", "response"), limit) for name in there}


def load_safe(folder: str | Path, limit: int | None = None) -> Sets:
    """Prompts for SAFE, as SOUL (Jia et al., 2024) has them: pku of pku_test.jsonl or .json (the test split of
    PKU-SafeRLHF), real of real_toxicity_prompts.jsonl or .json, those that are there {prompt: a text, or {text}}.

    forget: what is to be forgotten, of pku_train.jsonl or .json (the training split) where that is there {prompt,
    response_0, response_1, is_response_0_safe, is_response_1_safe}: of all unsafe responses to their prompts 200, or
    all if these are fewer, drawn with SOUL's seed, 1000, so that its split gives its samples.
    """
    names = {"pku_test": "pku", "real_toxicity_prompts": "real"}
    there = present(in_folder(folder), [*names, "pku_train"])
    sets = {names[name]: read_set(folder, name, prompt_alone, limit) for name in there if name in names}
    return {"forget": drawn_unsafe(folder, "pku_train", limit), **sets} if "pku_train" in there else sets


def drawn_unsafe(folder: str | Path, name: str, limit: int | None, count: int = 200, seed: int = 1000) -> list[QA]:
    """limit: of those drawn."""
    check_limit(limit)
    rows, where = rows_of_set(folder, name)
    items = [item for at, row in rows for item in unsafe_pairs(row, at)]
    if not items:
        raise ValueError(f"{where}: holds no unsafe response")
    return [items[i] for i in random.Random(seed).sample(range(len(items)), min(count, len(items)))][:limit]


def load_text(path: str | Path) -> list[QA]:
    """A text file, as one text that is read as a whole. Raises as `read_text`, ValueError for an empty one."""
    text = read_text(Path(path))
    if not text.strip():
        raise ValueError(f"{path}: is empty, needs a text")
    return [QA("", text)]


# ---- files -----------------------------------------------------------------------------------------------------------


def in_folder(source: str | Path) -> Path:
    """Raises FileNotFoundError or ValueError unless it is a folder here."""
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{path} is a file; needs the folder with the benchmark's files")
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}{path_hint(path)}")
    return path


def present(source: str | Path, stems: Sequence[str]) -> list[str]:
    """Those of which there is a file; all, of a Hub data set. Raises ValueError where there is none."""
    if is_hub_id(source, stems[0]):
        return list(stems)
    folder = in_folder(source)
    found = [stem for stem in stems if any((folder / f"{stem}{suffix}").is_file() for suffix in SUFFIXES)]
    if not found:
        has = ", ".join(sorted(child.name for child in folder.iterdir())[:20])
        raise ValueError(f"{folder}: has none of {', '.join(stems)} (.json or .jsonl), but {has or 'nothing'}")
    return found


def read_set(
    source: str | Path,
    name: str,
    item_of: Callable[[Any, str], QA],
    limit: int | None,
    split: str | None = None,
    hub_split: str | None = None,
) -> list[QA]:
    """Of the rows of a set (`rows_of_set`), the first."""
    check_limit(limit)
    rows, where = rows_of_set(source, name, split, hub_split)
    items = [item_of(row, at) for at, row in islice(rows, limit)]
    if not items:
        raise ValueError(f"{where}: holds no rows")
    return items


def rows_of_set(
    source: str | Path, name: str, split: str | None = None, hub_split: str | None = None
) -> tuple[Iterator[Row], str]:
    """Of the file {name} or {name}/{split} of a folder; or of the Hub's data set, name: its configuration. And what
    errors call them."""
    if is_hub_id(source, name):
        return hub_rows(str(source), name, split or hub_split or "train"), f"{source}[{name}]"
    stem = in_folder(source) / name if split is None else in_folder(source) / name / split
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in SUFFIXES]
    there = [file for file in files if file.is_file()]
    if not there:
        raise FileNotFoundError(f"no such file: {files[0]}, nor {files[1].name}{path_hint(files[0])}")
    if len(there) > 1:
        raise ValueError(f"{files[0]} and {files[1].name}: both are there, of which one is to be read; move one away")
    return json_rows(there[0]), str(there[0])


# ---- rows ------------------------------------------------------------------------------------------------------------


def pair_of(prompt: str, answer: str) -> Callable[[Any, str], QA]:
    """Of rows with these keys."""

    def read(row: Any, where: str) -> QA:
        found = object_of(row, where, (prompt, answer))
        return QA(text_of(found[prompt], prompt, where), text_of(found[answer], answer, where))

    return read


def whole_text(row: Any, where: str) -> QA:
    return QA("", text_of(object_of(row, where, ("text",))["text"] if isinstance(row, Mapping) else row, "text", where))


def prompt_alone(row: Any, where: str) -> QA:
    prompt = object_of(row, where, ("prompt",))["prompt"]
    if isinstance(prompt, Mapping):
        prompt = object_of(prompt, f"{where}: 'prompt'", ("text",))["text"]
    return QA(text_of(prompt, "prompt", where), "")


def unsafe_pairs(row: Any, where: str) -> list[QA]:
    """The prompt with each of its two responses that is not safe."""
    keys = [(f"response_{i}", f"is_response_{i}_safe") for i in range(2)]
    found = object_of(row, where, ("prompt", *(key for pair in keys for key in pair)))
    for _, safe in keys:
        if not isinstance(found[safe], bool):
            raise TypeError(f"{where}: {safe!r} must be true or false, got {type_of(found[safe])}")
    prompt = text_of(found["prompt"], "prompt", where)
    return [QA(prompt, text_of(found[key], key, where)) for key, safe in keys if not found[safe]]


def choices_of(topic: str) -> Callable[[Any, str], QA]:
    """Of questions with four choices, about a topic."""

    def read(row: Any, where: str) -> QA:
        found = object_of(row, where, ("question", "choices", "answer"))
        choices, answer = texts_of(found["choices"], "choices", where), found["answer"]
        if len(choices) != len(LETTERS):
            raise ValueError(f"{where}: 'choices' needs {len(LETTERS)} texts, got {len(choices)}")
        if isinstance(answer, bool) or not isinstance(answer, int):
            raise TypeError(f"{where}: 'answer' must be an integer, the place of a choice, got {type_of(answer)}")
        if not 0 <= answer < len(choices):
            raise ValueError(f"{where}: 'answer' needs the place of a choice, 0 to {len(choices) - 1}, got {answer}")
        about = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
        question = text_of(found["question"], "question", where).strip()
        options = [f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=True)]
        wrong = tuple(letter for letter in LETTERS if letter != LETTERS[answer])
        return QA(f"{about}{question}\n{''.join(options)}Answer:", LETTERS[answer], perturbed_answers=wrong)

    return read
