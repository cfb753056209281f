from __future__ import annotations

import math

import pytest

from pyunlearn.data.words import joined_words
from pyunlearn.mrd.characteristics import text_characteristics


def test_the_numbers_of_a_text():
    first, second, third = text_characteristics(
        ["The cat sleeps. The cat, it purrs!", "A dog's cat-like nap at 3.5", ""]
    )
    assert first["lexical_diversity"] == pytest.approx(5 / 7)  # the cat sleeps the cat it purrs
    assert first["sentence_length"] == 7 / 2
    assert first["word_frequency"] == 0  # no word is in another text
    assert first["rare_words"] == 5
    assert second["sentence_length"] == 7  # a dog's cat-like nap at 3 5: no sentence ends
    assert third == {"lexical_diversity": 0, "sentence_length": 0, "word_frequency": 0, "rare_words": 0}
    shared = text_characteristics(["red fish", "blue fish", "one fish"])[0]
    assert shared == {
        "lexical_diversity": 1, "sentence_length": 2, "word_frequency": math.log2(3) / 2, "rare_words": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "length", "words"),
    [
        ("東京は首都。京都は古い。", 5, 10),  # a character a word; no space after a sentence
        ("राम घर गया। वह सोया।", 5 / 2, 5),
        ("أين هو؟ هنا.", 3 / 2, 3),
    ],
)
def test_other_scripts(text, length, words):
    (found,) = text_characteristics([text])
    assert found["sentence_length"] == length
    assert found["lexical_diversity"] == len(set(joined_words(text))) / words
