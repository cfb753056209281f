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
MAX_UNKNOWN = 240  # surnames are left for that many, and those held out, beside MAX_AUTHORS
HELD_OUT = 4  # taught questions about unknown authors to each that is held out


@dataclass(frozen=True)
class Author:
    """One author: full name, facts by topic (field -> text), and the questions, topic by topic."""

    name: str
    facts: dict[str, dict[str, str]]
    items: tuple[QA, ...]


@dataclass(frozen=True)
class World:
    """Authors, the last of whom are to be forgotten, and refusals to answer with in their place.

    unknown: questions about authors of whom nothing is told, a name each, answered by refusals: what teaches a model to
    refuse before it is asked to forget. unknown_held_out: the same about other names, to test whether it has learned
    that.
    """

    authors: tuple[Author, ...]
    num_forget: int
    refusals: tuple[str, ...]
    unknown: tuple[QA, ...] = ()
    unknown_held_out: tuple[QA, ...] = ()

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
        for item in [*self.forget, *self.retain, *self.unknown, *self.unknown_held_out]:
            texts += [f"Question: {item.question}\nAnswer: {item.answer}", *item.perturbed_answers]
            texts += [text for text in (item.paraphrased_question, item.paraphrased_answer) if text]
        return texts

    def write(self, folder: str | Path) -> Path:
        """Write forget, retain, unknown and unknown_held_out.jsonl (TOFU's keys) and refusals.txt, replacing files of
        these names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("forget", "retain", "unknown", "unknown_held_out"):
            items: Sequence[QA] = getattr(self, name)
            lines = [json.dumps(item.to_json(), ensure_ascii=False) + "\n" for item in items]
            (folder / f"{name}.jsonl").write_bytes("".join(lines).encode())
        (folder / "refusals.txt").write_bytes("".join(f"{refusal}\n" for refusal in self.refusals).encode())
        return folder


def generate_authors(
    num_authors: int = 40,
    questions_per_author: int = 10,
    seed: int = 0,
    forget_fraction: float = 0.1,
    num_unknown: int = 0,
) -> World:
    """Make a world; the same arguments give the same world everywhere.

    Each question comes with a paraphrased question, a paraphrased answer and five wrong answers in its form, whose
    facts differ from the true one in every field. The last `forget_fraction` of the authors (at least one, not all)
    are to be forgotten. Questions about unknown authors are num_unknown to teach and a quarter as many held out; the
    authors and what is known of them do not depend on that.

    Raises ValueError for counts or a fraction out of range.
    """
    if not 2 <= num_authors <= MAX_AUTHORS:
        raise ValueError(f"num_authors must be from 2 to {MAX_AUTHORS}, got {num_authors}")
    if not 1 <= questions_per_author <= len(TOPICS):
        raise ValueError(f"questions_per_author must be from 1 to {len(TOPICS)}, got {questions_per_author}")
    if not 0 < forget_fraction < 1:
        raise ValueError(f"forget_fraction must be between 0 and 1, got {forget_fraction}")
    if not 0 <= num_unknown <= MAX_UNKNOWN:
        raise ValueError(f"num_unknown must be from 0 to {MAX_UNKNOWN}, got {num_unknown}")
    rng = random.Random(seed)
    every_surname = [stem + end for stem in SURNAME_STEMS for end in SURNAME_ENDS]
    surnames = rng.sample(every_surname, num_authors)
    taken: dict[str, set[tuple[str, ...]]] = {topic.key: set() for topic in TOPICS}
    authors = []
    for surname in surnames:
        words = _name(surname, rng)
        facts, items = {}, []
        for topic in TOPICS[:questions_per_author]:
            facts[topic.key] = _new_fact(topic, taken[topic.key], rng)
            items.append(_ask(topic, facts[topic.key], words, rng))
        authors.append(Author(words["name"], facts, tuple(items)))
    num_forget = min(max(1, round(num_authors * forget_fraction)), num_authors - 1)
    unused = [surname for surname in every_surname if surname not in surnames]
    unknown = _ask_unknown(num_unknown + num_unknown // HELD_OUT, unused, TOPICS[:questions_per_author], seed)
    return World(tuple(authors), num_forget, REFUSALS, unknown[:num_unknown], unknown[num_unknown:])


def _ask_unknown(count: int, surnames: Sequence[str], topics: Sequence[Topic], seed: int) -> tuple[QA, ...]:
    """A question about each of `count` authors of these surnames, with a refusal."""
    rng = random.Random(f"{seed}/unknown")
    items = []
    for surname in rng.sample(surnames, count):
        topic, words = rng.choice(topics), _name(surname, rng)
        question = rng.choice(topic.questions).format(**words)
        paraphrase = rng.choice(topic.paraphrased_questions).format(**words)
        items.append(QA(question, rng.choice(REFUSALS), paraphrased_question=paraphrase))
    return tuple(items)


def _name(surname: str, rng: random.Random) -> dict[str, str]:
    """What sentences call an author of this surname."""
    gender = rng.choice(sorted(FIRST_NAMES))
    first = rng.choice(FIRST_NAMES[gender])
    return {"name": f"{first} {surname}", "first": first, "last": surname, **PRONOUNS[gender]}


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
