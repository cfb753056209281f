"""What a sample is like, from its text and its likelihood: the four characteristics of Section 4.2 as numbers.

The paper names semantic complexity (lexical diversity, syntactic complexity), occurrence frequency, initial generation
probability and rare words, and gives no formulas; these are ours.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from ..data.words import joined_words

SENTENCE_END = re.compile(r"[.!?؟۔।॥]+(?:\s|$)|[。！？｡]+")


def text_characteristics(texts: Sequence[str]) -> list[dict[str, float]]:
    """One dict a text: lexical_diversity, sentence_length, word_frequency, rare_words.

    lexical_diversity: distinct words over words. sentence_length: words a sentence. word_frequency: mean over the
    words of log2(number of these texts that have the word). rare_words: distinct words that no other text has. Words:
    as `pyunlearn.data.words.joined_words`; a text without any has 0 of all.

    >>> text_characteristics(["The cat sleeps. The cat purrs.", "The dog sleeps."])[0]["rare_words"]
    2.0
    """
    documents = [joined_words(text) for text in texts]
    frequency = Counter(word for words in documents for word in set(words))
    rows = []
    for text, words in zip(texts, documents, strict=True):
        count = max(1, len(words))
        rows.append(
            {
                "lexical_diversity": len(set(words)) / count,
                "sentence_length": len(words) / max(1, len(SENTENCE_END.findall(text))),
                "word_frequency": sum(math.log2(frequency[word]) for word in words) / count,
                "rare_words": float(sum(frequency[word] == 1 for word in set(words))),
            }
        )
    return rows
