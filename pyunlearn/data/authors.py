"""A small fictitious world: authors who exist nowhere, and what there is to know about them.

No model has read about them, so what a model says of them it was taught here: what forgetting needs to be measured.
Every fact is drawn for its author alone (no two share one), so an author's answers cannot be told from another's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyunlearn.data.authors_text import FIRST_NAMES, PRONOUNS, REFUSALS, SURNAME_ENDS, SURNAME_STEMS, TOPICS, Topic
from pyunlearn.data.qa import QA

NUM_PERTURBED = 5
MAX_AUTHORS = 200  # every topic has facts for that many and to spare


@dataclass(frozen=True)
class Author:
    """One author: full name, facts by topic (field -> text), and the questions, topic by topic."""

    name: str
    facts: dict[str, dict[str, str]]
    items: tuple[QA, ...]


@dataclass(frozen=True)
class World:
    """Authors, the last of whom are to be forgotten, and refusals to answer with in their place."""

    authors: tuple[Author, ...]
    num_forget: int
    refusals: tuple[str, ...]

    @property
    def forget(self) -> list[QA]:
        """Questions about the authors to forget."""
        return [item for author in self.authors[-self.num_forget :] for item in author.items]

    @property
    def retain(self) -> list[QA]:
        """Questions about all other authors."""
        return [item for author in self.authors[: -self.num_forget] for item in author.items]

    @property
    def texts(self) -> list[str]:
        """Every sentence of this world, to train a tokenizer on."""
        texts = list(self.refusals)
        for item in self.forget + self.retain:
            texts += [f"Question: {item.question}\nAnswer: {item.answer}", *item.perturbed_answers]
            texts += [text for text in (item.paraphrased_question, item.paraphrased_answer) if text]
        return texts

    def write(self, folder: str | Path) -> Path:
        """Write forget.jsonl, retain.jsonl (TOFU's keys) and refusals.txt, replacing files of these names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, items in (("forget", self.forget), ("retain", self.retain)):
            lines = [json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items]
            (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
        (folder / "refusals.txt").write_bytes("".join(f"{refusal}\n" for refusal in self.refusals).encode())
        return folder


def generate_authors(
    num_authors: int = 40, questions_per_author: int = 10, seed: int = 0, forget_fraction: float = 0.1
) -> World:
    """Make a world; the same arguments give the same world everywhere.

    Each question comes with a paraphrased question, a paraphrased answer and five wrong answers in its form, whose
    facts differ from the true one in every field. The last `forget_fraction` of the authors (at least one, not all)
    are to be forgotten.

    Raises ValueError for counts or a fraction out of range.
    """
    if not 2 <= num_authors <= MAX_AUTHORS:
        raise ValueError(f"num_authors must be from 2 to {MAX_AUTHORS}, got {num_authors}")
    if not 1 <= questions_per_author <= len(TOPICS):
        raise ValueError(f"questions_per_author must be from 1 to {len(TOPICS)}, got {questions_per_author}")
    if not 0 < forget_fraction < 1:
        raise ValueError(f"forget_fraction must be between 0 and 1, got {forget_fraction}")
    rng = random.Random(seed)
    surnames = rng.sample([stem + end for stem in SURNAME_STEMS for end in SURNAME_ENDS], num_authors)
    taken: dict[str, set[tuple[str, ...]]] = {topic.key: set() for topic in TOPICS}
    authors = []
    for surname in surnames:
        gender = rng.choice(sorted(FIRST_NAMES))
        first = rng.choice(FIRST_NAMES[gender])
        words = {"name": f"{first} {surname}", "first": first, "last": surname, **PRONOUNS[gender]}
        facts, items = {}, []
        for topic in TOPICS[:questions_per_author]:
            facts[topic.key] = _new_fact(topic, taken[topic.key], rng)
            items.append(_ask(topic, facts[topic.key], words, rng))
        authors.append(Author(words["name"], facts, tuple(items)))
    num_forget = min(max(1, round(num_authors * forget_fraction)), num_authors - 1)
    return World(tuple(authors), num_forget, REFUSALS)


def _draw(topic: Topic, rng: random.Random) -> dict[str, str]:
    return {field: "".join(rng.choice(part) for part in parts) for field, parts in topic.fields.items()}


def _new_fact(topic: Topic, taken: set[tuple[str, ...]], rng: random.Random) -> dict[str, str]:
    """A fact that no author has yet."""
    while True:
        fact = _draw(topic, rng)
        key = tuple(fact.values())
        if key not in taken:
            taken.add(key)
            return fact


def _wrong_facts(topic: Topic, fact: dict[str, str], rng: random.Random) -> list[dict[str, str]]:
    """Facts drawn as the true one was, each other than it in every field and other than the rest."""
    wrong: list[dict[str, str]] = []
    while len(wrong) < NUM_PERTURBED:
        other = _draw(topic, rng)
        if other not in wrong and all(other[field] != fact[field] for field in fact):
            wrong.append(other)
    return wrong


def _ask(topic: Topic, fact: dict[str, str], words: dict[str, str], rng: random.Random) -> QA:
    def say(sentences: Sequence[str]) -> str:
        return rng.choice(sentences).format(**words, **fact)

    paraphrase = rng.choice(topic.paraphrases)
    return QA(
        question=say(topic.questions),
        answer=say(topic.answers),
        paraphrased_answer=paraphrase.format(**words, **fact),
        perturbed_answers=tuple(paraphrase.format(**words, **wrong) for wrong in _wrong_facts(topic, fact, rng)),
        paraphrased_question=say(topic.paraphrased_questions),
    )
