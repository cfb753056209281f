"""The words of a text in any script: what metrics count that the models' tokens are not asked for."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import regex

# Written without spaces: a character with its marks is the unit, as no dictionary here parts words.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
UNIT = rf"(?:[[\p{{L}}\p{{N}}]&&[{UNSPACED}]]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+)"
WORD = regex.compile(UNIT, regex.V1)
JOINED = regex.compile(rf"{UNIT}(?:['’-]{UNIT})*", regex.V1)
FOREIGN = regex.compile(r"[\p{L}--[\p{Latin}\p{Common}]]|[\p{Nd}--[0-9]]", regex.V1)
CHARACTER = regex.compile(r"\X")


def unified(text: str) -> str:
    """One spelling for what looks alike (NFKC), without case."""
    return unicodedata.normalize("NFKC", text).casefold()


def joined_words(text: str) -> list[str]:
    """Words of any script; hyphens and apostrophes inside join. Of scripts without spaces, every character is one.

    >>> joined_words("The dog's cat-like nap, 東京 3.5")
    ['the', "dog's", 'cat-like', 'nap', '東', '京', '3', '5']
    """
    return JOINED.findall(unified(text))


def splitter(text: str, latin: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """How `text`, and what is compared with it, is split: the first of these ways that finds words in it.

    `latin`, which knows a-z and 0-9, where all letters are Latin and all digits 0-9; the words of any script, those of
    a-z and 0-9 as `latin` has them; characters other than white space, for a text of signs (emoji) alone.

    Raises ValueError for a text of white space alone.
    """

    def any_script(text: str) -> list[str]:
        return [part for word in WORD.findall(unified(text)) for part in (latin(word) if word.isascii() else [word])]

    def characters(text: str) -> list[str]:
        return [sign for sign in CHARACTER.findall(unified(text)) if not sign.isspace()]

    ways = [any_script, characters] if FOREIGN.search(text) else [latin, any_script, characters]
    for way in ways:
        if way(text):
            return way
    raise ValueError(f"answer={text!r}: needs something other than white space")
