import hashlib
import json
import random
import re

import pytest

from pyunlearn.data import QADataset, check_disjoint, generate_authors, load_qa, load_refusals
from pyunlearn.data.authors_text import REFUSALS, TOPICS
from pyunlearn.data.tiny import train_tokenizer


@pytest.fixture(scope="module")
def full():
    return generate_authors(num_unknown=240)


@pytest.fixture(scope="module")
def large():
    return generate_authors(200, 12, seed=5, num_unknown=240)


def digest(world):
    rows = [item.to_json() for author in world.authors for item in author.items]
    return hashlib.sha256(json.dumps([rows, world.refusals]).encode()).hexdigest()


def test_the_same_everywhere(full):
    random.seed(1)
    state = random.getstate()
    expected = "295620ef9cfcc6e1041fef7ac3af74562f00ee93b60935251cc8e4d719023229"
    assert digest(generate_authors(num_unknown=240)) == digest(full) == expected
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


def test_unknown_authors_are_asked_about_and_refused(full, large):
    """A name each, which no author of the world has; none held out is taught; questions that the authors get too."""
    for world, topics in ((full, TOPICS[:10]), (large, TOPICS)):
        assert (len(world.unknown), len(world.unknown_held_out)) == (240, 60)
        items = [*world.unknown, *world.unknown_held_out]
        known = {author.name.split()[1] for author in world.authors}
        forms = [form for topic in topics for form in topic.questions]
        names = []
        for item in items:
            assert item.answer in REFUSALS
            assert item.paraphrased_question != item.question
            named = [found for form in forms if (found := re.fullmatch(pattern(form), item.question))]
            assert named, item.question
            names.append(named[0]["name"])
            assert names[-1] in item.paraphrased_question
        surnames = {name.split()[1] for name in names}
        assert len(surnames) == len(items)
        assert not surnames & known
        assert len({item.answer for item in items}) == len(REFUSALS)
        check_disjoint(world.forget, world.retain + items)


def pattern(form):
    """Of a question's form, which names the author once."""
    named = re.escape(form).replace(r"\{name\}", "(?P<name>[A-Z][a-z]+ [A-Z][a-z]+)", 1)
    return re.sub(r"\\\{\w+\\\}", r"\\w+", named)


def test_the_unknown_leave_the_world_as_it_is(full):
    fewer = generate_authors(num_unknown=10)
    assert (fewer.authors, fewer.num_forget) == (full.authors, full.num_forget)
    assert (len(fewer.unknown), len(fewer.unknown_held_out)) == (10, 2)
    assert full.unknown != generate_authors(seed=1, num_unknown=240).unknown
    assert generate_authors().unknown == generate_authors().unknown_held_out == ()


def test_texts_hold_all_that_is_said(full):
    for item in [*full.forget, *full.retain, *full.unknown, *full.unknown_held_out]:
        assert f"Question: {item.question}\nAnswer: {item.answer}" in full.texts
        assert item.paraphrased_question in full.texts


def test_write(full, tmp_path):
    folder = full.write(tmp_path / "new" / "world")
    sets = ("forget", "retain", "unknown", "unknown_held_out")
    assert {path.name for path in folder.iterdir()} == {"refusals.txt", *(f"{name}.jsonl" for name in sets)}
    for name in sets:
        assert load_qa(folder / f"{name}.jsonl") == list(getattr(full, name))
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
        ({"num_unknown": -1}, "num_unknown must be from 0 to 240, got -1"),
        ({"num_unknown": 241}, "num_unknown must be from 0 to 240, got 241"),
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
