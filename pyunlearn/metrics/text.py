"""Metrics of what a model writes by itself: does it still read as language, or has the model collapsed?

What tells collapse from forgetting: both leave the true answer out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data import QA
from ..data.authors_text import REFUSALS
from ..data.words import joined_words
from .metric import Part, Told, metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unigram_entropy(tokens: Sequence[int]) -> float:
    """Entropy of the distribution of a text's tokens over log2 of their number, in [0, 1]; 0 for fewer than two.

    TE of Yuan et al. (2024, arXiv:2410.08109): 1 where no token comes twice, 0 where one is all there is.
    """
    if len(tokens) < 2:
        return 0.0
    share = np.unique(np.asarray(tokens), return_counts=True)[1] / len(tokens)
    return min(1.0, abs(float((share * np.log2(share)).sum())) / float(np.log2(len(tokens))))


def longest_loop(tokens: Sequence[int]) -> float:
    """Share of a text that the longest of its loops takes, in [0, 1).

    A loop repeats what stands just before it, once at least and whole: in a b a b a, the last three tokens.
    """
    text, longest = np.asarray(tokens), 0
    for period in range(1, len(text) // 2 + 1):
        same = text[period:] == text[:-period]
        ends = np.flatnonzero(np.diff(same, prepend=False, append=False)).reshape(-1, 2)  # of each stretch that is
        stretch = int(np.diff(ends).max(initial=0))
        longest = max(longest, stretch if stretch >= period else 0)
    return longest / len(text) if len(text) else 0.0


def known_share(text: str, vocabulary: set[str]) -> float:
    """Share of a text's words (`pyunlearn.data.words.joined_words`) that are in a vocabulary; numbers always are.

    0 for a text without words.
    """
    words = joined_words(text)
    return sum(word in vocabulary or word.isdecimal() for word in words) / len(words) if words else 0.0


def vocabulary_of(items: Iterable[QA], texts: Iterable[str] = ()) -> set[str]:
    """Words of questions and answers, paraphrased and perturbed ones too, of `texts` and of refusals."""
    own = {
        text
        for item in items
        for text in (
            item.question, item.answer, item.paraphrased_question, item.paraphrased_answer, *item.perturbed_answers
        )
        if text is not None
    }  # fmt: skip
    return {word for text in (*own, *texts, *REFUSALS) for word in joined_words(text)}


@metric()
def token_entropy(written: str, tokenizer: PreTrainedTokenizerBase) -> float:
    """Unigram entropy of the written tokens over log2 of their number: low where the text repeats itself.

    `unigram_entropy`; 0 for fewer than two tokens.
    """
    return unigram_entropy(token_ids(tokenizer, written))


@metric(batched=True)
def fluency(
    item: Sequence[QA],
    written: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str] = (),
    *,
    least_entropy: Part = 0.7,
    longest_repeat: Part = 0.25,
    least_known: Part = 0.5,
) -> list[Told]:
    """1 where the written text reads as language, 0 where it has collapsed, by counting alone: no model is asked.

    Fluent is a text whose tokens have an entropy of least_entropy at least (or are one alone, as in "Paris"), of which
    no loop takes more than longest_repeat (`longest_loop`), and of whose words least_known at least are known
    (`known_share`): in the items, in refusals, or in `texts`, the data of the whole run. The three parts are in the
    record. An empty text is not fluent.

    The thresholds stand between what was measured on the 1,634 answers in TOFU's published logs of two Llama-2-7b
    (entropy >= .85, loops <= .11, known >= .58), answers of TOFU that loop (entropy .54 in the median, loops .76), and
    tokens drawn at random (known <= .42). They ask for language, not for sense.
    """
    vocabulary = vocabulary_of(item, texts)
    told = []
    for text in written:
        tokens = token_ids(tokenizer, text)
        entropy, loop, known = unigram_entropy(tokens), longest_loop(tokens), known_share(text, vocabulary)
        varied = len(tokens) == 1 or entropy >= least_entropy
        fluent = varied and loop <= longest_repeat and known >= least_known
        told.append(Told(float(fluent), {"token_entropy": entropy, "longest_repeat": loop, "known_words": known}))
    return told


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
