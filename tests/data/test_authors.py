import hashlib
import json
import random
import re

import pytest

from pyunlearn.data import QADataset, check_disjoint, generate_authors, load_qa, load_refusals
from pyunlearn.data.authors_text import TOPICS
from pyunlearn.data.tiny import train_tokenizer


@pytest.fixture(scope="module")
def full():
    return generate_authors()


@pytest.fixture(scope="module")
def large():
    return generate_authors(200, 12, seed=5)


def digest(world):
    rows = [item.to_json() for author in world.authors for item in author.items]
    return hashlib.sha256(json.dumps([rows, world.refusals]).encode()).hexdigest()


def test_the_same_everywhere(full):
    random.seed(1)
    state = random.getstate()
    expected = "295620ef9cfcc6e1041fef7ac3af74562f00ee93b60935251cc8e4d719023229"
    assert digest(generate_authors()) == digest(full) == expected
    assert random.getstate() == state
    assert digest(generate_authors(seed=1)) != digest(full)


def test_size(full):
    assert len(full.authors) == 40
    assert len(full.forget) == 40
    assert len(full.retain) == 360
    assert len(full.refusals) == len(set(full.refusals)) >= 50
    assert all(len(author.items) == 10 for author in full.authors)


def test_split_is_by_author(full):
    forgotten, kept = full.authors[36:], full.authors[:36]
    assert full.forget == [item for author in forgotten for item in author.items]
    assert full.retain == [item for author in kept for item in author.items]
    check_disjoint(full.forget, full.retain)
    retained = " ".join(item.question + item.answer for item in full.retain)
    assert not [author.name for author in forgotten if author.name.split()[1] in retained]


@pytest.mark.parametrize(("count", "fraction", "forget"), [(2, 0.1, 1), (2, 0.9, 1), (10, 0.25, 2), (5, 0.4, 2)])
def test_fraction(count, fraction, forget):
    world = generate_authors(count, 3, forget_fraction=fraction)
    assert len(world.forget) == 3 * forget
    assert len(world.retain) == 3 * (count - forget)


def test_nothing_is_shared(large):
    """Names, whole facts, questions and answers are each one author's alone."""
    items = [item for author in large.authors for item in author.items]
    assert len({author.name for author in large.authors}) == 200
    assert len({author.name.split()[1] for author in large.authors}) == 200
    for topic in TOPICS:
        assert len({tuple(author.facts[topic.key].values()) for author in large.authors}) == 200
    assert len({item.question for item in items}) == len(items) == 2400
    assert len({item.answer for item in items}) == len(items)
    assert all(author.name in item.question for author in large.authors for item in author.items)


def test_answers_state_the_facts(large):
    for author in large.authors:
        for topic, item in zip(TOPICS, author.items, strict=True):
            facts = author.facts[topic.key].values()
            assert all(fact in item.answer and fact in item.paraphrased_answer for fact in facts)
            assert not any(fact in item.question for fact in facts)


def test_perturbed_answers_are_wrong_in_every_fact(large):
    for author in large.authors:
        for topic, item in zip(TOPICS, author.items, strict=True):
            assert len(set(item.perturbed_answers)) == 5
            facts = author.facts[topic.key]
            # the paraphrase with its facts cut out is the form that the wrong answers must have
            form = re.escape(item.paraphrased_answer)
            for field, fact in facts.items():
                form = form.replace(re.escape(fact), f"(?P<{field}>.+)", 1)
            for wrong in item.perturbed_answers:
                found = re.fullmatch(form, wrong)
                assert found is not None
                assert all(found[field] != fact for field, fact in facts.items())


def test_paraphrases_differ(large):
    for author in large.authors:
        for item in author.items:
            assert item.paraphrased_answer != item.answer
            assert item.paraphrased_question != item.question


def test_english(large):
    """No leavings of templates, no wrong articles, sentences with a capital and an end."""
    for text in large.texts:
        assert not re.search(r"[{}]|  | ,| \.|\.\.|\bNone\b", text), text
        assert not re.search(r"\b[Aa] (?!university)[aeiou]|\b[Aa]n [bcdfgjklmnpqrstvwxyz]", text), text
    for author in large.authors:
        for item in author.items:
            assert item.question[0].isupper()
            assert item.question.endswith("?")
            for text in (item.answer, item.paraphrased_answer, *item.perturbed_answers):
                assert text[0].isupper() or text[0] == '"'
                assert text.endswith(".")
    assert all(refusal.endswith(".") for refusal in large.refusals)


def test_short_enough(full):
    tokenizer = train_tokenizer(full.texts)
    rows = QADataset(full.forget + full.retain, tokenizer, 72)
    answers = [int((row["labels"] != -100).sum()) for row in rows]
    assert min(answers) >= 6
    assert max(answers) <= 40


def test_write(full, tmp_path):
    folder = full.write(tmp_path / "new" / "world")
    assert sorted(path.name for path in folder.iterdir()) == ["forget.jsonl", "refusals.txt", "retain.jsonl"]
    assert load_qa(folder / "forget.jsonl") == full.forget
    assert load_qa(folder / "retain.jsonl") == full.retain
    assert load_refusals(folder / "refusals.txt") == list(full.refusals)
    assert set(json.loads((folder / "forget.jsonl").read_text(encoding="utf-8").splitlines()[0])) == {
        "question",
        "answer",
        "paraphrased_answer",
        "perturbed_answer",
        "paraphrased_question",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_authors": 1}, "num_authors must be from 2 to 200, got 1"),
        ({"num_authors": 201}, "num_authors must be from 2 to 200, got 201"),
        ({"questions_per_author": 0}, "questions_per_author must be from 1 to 12, got 0"),
        ({"questions_per_author": 13}, "questions_per_author must be from 1 to 12, got 13"),
        ({"forget_fraction": 0.0}, "forget_fraction must be between 0 and 1, got 0.0"),
        ({"forget_fraction": 1.0}, "forget_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_authors(**options)
