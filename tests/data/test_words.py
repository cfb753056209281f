"""Words by script: what is one, and which way of splitting a text asks for."""

from __future__ import annotations

import re
import unicodedata

import pytest

from pyunlearn.data.words import joined_words, splitter


def latin(text):
    """Stands in for a tokenizer that knows a-z and 0-9, and marks what went through it."""
    return [f"{word}." for word in re.findall(r"[a-z0-9]+", text.lower())]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Paris, 1945!", ["paris.", "1945."]),
        ("Müller", ["m.", "ller."]),  # Latin: left to the tokenizer
        ("x² is 5 µm", ["x.", "is.", "5.", "m."]),
        ("ñ", ["ñ"]),  # Latin, but nothing is left of it there
        ("Ａｂｃ", ["abc."]),
        ("Столица — Париж.", ["столица", "париж"]),
        ("ΕΛΛΆΣ ελλάς", ["ελλάσ", "ελλάσ"]),
        ("القاهرة عاصمة ١٩٤٥", ["القاهرة", "عاصمة", "١٩٤٥"]),
        ("नई दिल्ली है।", ["नई", "दिल्ली", "है"]),  # vowel signs do not part words
        ("서울은 수도", ["서울은", "수도"]),
        ("東京は、", ["東", "京", "は"]),
        ("ป็นมื", ["ป็", "น", "มื"]),
        ("It is 東京, Japan", ["it.", "is.", "東", "京", "japan."]),
        ("👍🏽 🇫🇷?", ["👍🏽", "🇫🇷", "?"]),
        ("\x00\x1b", ["\x00", "\x1b"]),
        ("\ud800", ["\ud800"]),
    ],
)
def test_words(text, words):
    assert splitter(text, latin)(text) == words


def test_the_answer_says_how_both_are_split():
    assert splitter("Tokyo", latin)("東京 Tokyo") == ["tokyo."]
    assert splitter("東京", latin)("Tokyo, 東京") == ["tokyo.", "東", "京"]


@pytest.mark.parametrize("text", ["", " \t\n\u3000"])
def test_white_space_has_no_words(text):
    with pytest.raises(ValueError, match=r"^answer='.*': needs something other than white space$"):
        splitter(text, latin)


def test_spellings_of_one_text_are_one():
    composed = "Ёлка café naïve"
    assert joined_words(unicodedata.normalize("NFD", composed)) == joined_words(composed)


def test_hyphens_and_apostrophes_join():
    assert joined_words("A dog's cat-like nap at 3.5") == ["a", "dog's", "cat-like", "nap", "at", "3", "5"]
