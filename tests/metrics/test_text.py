"""Metrics of a written text by itself, against counts by hand, and on texts that have and have not collapsed."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.data import QA, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import Examination, evaluate, fluency, token_entropy
from pyunlearn.metrics.text import known_share, longest_loop, token_ids, unigram_entropy, vocabulary_of

WORLD = generate_authors(12, 6, seed=0, forget_fraction=0.5)
TOKENS = st.lists(st.integers(0, 3), max_size=24)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORLD.texts, vocab_size=500)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        ([], 0.0),
        ([7], 0.0),
        ([7, 8], 1.0),
        ([7, 7, 7, 7], 0.0),
        ([1, 1, 2, 2], 0.5),  # one bit of two
        ([1, 1, 1, 2], (0.75 * math.log2(4 / 3) + 0.25 * 2) / 2),
    ],
)
def test_token_entropy_by_hand(tokens, value):
    assert unigram_entropy(tokens) == pytest.approx(value)


@given(TOKENS)
def test_token_entropy_is_a_share_whatever_the_order(tokens):
    value = unigram_entropy(tokens)
    assert 0 <= value <= 1
    assert unigram_entropy(sorted(tokens)) == pytest.approx(value)
    assert (value == 1) == (len(tokens) > 1 and len(set(tokens)) == len(tokens))


def loop_by_hand(tokens):
    """The longest stretch that repeats the whole of what stands before it, looked for everywhere."""
    n = len(tokens)
    found = [
        end - start
        for period in range(1, n)
        for start in range(period, n)
        for end in range(start + period, n + 1)
        if all(tokens[i] == tokens[i - period] for i in range(start, end))
    ]
    return max(found, default=0) / n if n else 0.0


@given(TOKENS)
def test_longest_loop(tokens):
    assert longest_loop(tokens) == loop_by_hand(tokens)


@pytest.mark.parametrize(
    ("text", "share"),
    [("ab ab ab ab", 0.75), ("a b a b a", 0.6), ("one two three", 0), ("it is as it was", 0), ("", 0), ("x", 0)],
)
def test_loops_of_words(text, share):
    assert longest_loop([hash(word) for word in text.split()]) == share


def test_known_words_are_those_of_all_texts_of_an_item_and_numbers():
    item = QA("Who wrote it?", "Ada did.", "It was Ada.", ("Bo did.",), "By whom?")
    vocabulary = vocabulary_of([item], ["Elsewhere"])
    assert known_share("Ada, Bo, WHOM and elsewhere in 1987", vocabulary) == pytest.approx(6 / 7)  # not: and
    assert known_share("zq xw", vocabulary) == known_share("?!", vocabulary) == known_share("", vocabulary) == 0
    assert known_share("I do not know the answer to that.", vocabulary) == 1  # a refusal


def fluent(written, tokenizer, **options):
    return [each.value for each in fluency(WORLD.forget, written, tokenizer, **options)]


def test_language_is_fluent_and_what_has_collapsed_is_not(tokenizer):
    answers = [item.answer for item in WORLD.forget]
    assert min(fluent(answers, tokenizer)) == 1
    assert min(fluent(list(WORLD.refusals), tokenizer)) == 1
    loops = [f"{' '.join(words[:6])} {' '.join(words[6:9] * 12)}" for words in map(str.split, answers) if words[6:]]
    assert len(loops) > 20
    assert max(fluent(loops, tokenizer)) == 0
    letters = random.Random(0)
    salad = [" ".join("".join(letters.choices("bcdfghjklm", k=5)) for _ in range(20)) for _ in range(20)]
    assert max(fluent(salad, tokenizer)) == 0
    assert fluent(["", "!!!!!!!!", "the the the the the", "\n"], tokenizer) == [0, 0, 0, 0]


def test_each_part_decides_and_is_told(tokenizer):
    text = "the the a the the of the the"
    (told,) = fluency(WORLD.forget, [text], tokenizer)
    assert told.more["token_entropy"] == token_entropy(text, tokenizer) < 0.7
    assert told.more["longest_repeat"] == longest_loop(token_ids(tokenizer, text))
    assert told.more["known_words"] == 1
    assert told.value == 0
    lenient = {"least_entropy": 0.1, "longest_repeat": 0.5}
    assert fluent([text], tokenizer, **lenient) == [1]
    assert fluent(["Quibble zebu yurt"], tokenizer) == [0]
    assert fluent(["Quibble zebu yurt"], tokenizer, texts=["A yurt, a zebu: quibble!"]) == [1]


def test_in_an_evaluation_the_parts_are_in_the_records(tokenizer):
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=96)
    names = ["fluency", "token_entropy"]
    result = evaluate(model, tokenizer, WORLD.forget[:3], metrics=names, max_new_tokens=8, progress=False)
    for record in result.records:
        assert record["token_entropy"] == token_entropy(record["generated"], tokenizer)
        assert {"fluency", "longest_repeat", "known_words"} <= record.keys()
    assert set(result.summary) == set(names)
    options = {"fluency": {"least_entropy": 0.0, "longest_repeat": 1.0, "least_known": 0.0}}
    lenient = evaluate(
        model, tokenizer, WORLD.forget[:3], metrics=names[:1], options=options, max_new_tokens=8, progress=False
    )
    assert lenient.summary["fluency"] == 1.0


def test_words_of_items_that_were_not_asked_are_known(tokenizer, monkeypatch):
    items = [QA("Zebu?", "Yurt."), QA("Quibble?", "Okapi.")]
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=96)
    monkeypatch.setattr(Examination, "_write", lambda self, questions: ["zebu okapi yurt" for _ in questions])
    result = evaluate(model, tokenizer, items, metrics=["fluency"], rouge_samples=1, progress=False)
    (record,) = (each for each in result.records if "generated" in each)
    assert record["known_words"] == 1
