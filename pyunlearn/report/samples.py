"""Every sample of a run side by side: what was known of it before and after, and what the models say."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

Records = Mapping[str, Sequence[Mapping[str, Any]]]  # set name -> one record per sample
Diff = list[tuple[str, str]]  # "", "ins" or "del", and the words
LIMIT = 5000  # samples on a page: about a kilobyte each, and two where their tokens were read
NUM_OPEN = 3  # of the ones that were asked, when the page opens
STATES = {
    "known": "still known",
    "forgotten": "forgotten",
    "unknown": "not known before",
}


def list_samples(moments: Mapping[str, Records], known_from: float, limit: int = LIMIT) -> list[dict[str, Any]]:
    """What a page tells of each sample, set by set: the first ones of each, `limit` in all at most.

    moments: records by set, of "before" and "after", and of "retrained" where there is such a model. known_from: the
    probability a token from which an answer counts as known.
    """
    before = moments["before"]
    most = fair_shares([len(records) for records in before.values()], limit)
    samples = [
        make_sample(name, {moment: records[name][i] for moment, records in moments.items()}, known_from)
        for name, count in zip(before, most, strict=True)
        for i in range(count)
    ]
    for sample in sorted(samples, key=lambda sample: sample["diff"] is None)[:NUM_OPEN]:
        sample["open"] = True
    return samples


def fair_shares(counts: Sequence[int], limit: int) -> list[int]:
    """As many of each as there are, or as is fair where there are more than `limit` in all.

    >>> fair_shares([40, 3000, 900], 1000)
    [40, 480, 480]
    """
    shares, left = [0] * len(counts), limit
    for place, i in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[i] = min(counts[i], left // (len(counts) - place))
        left -= shares[i]
    return shares


def make_sample(name: str, records: Mapping[str, Mapping[str, Any]], known_from: float) -> dict[str, Any]:
    """One sample: whether it is open, set, question, answer and its length in words, probability and what is written by
    moment, state, words still written (ROUGE-L), diff of what is written, tokens (`compact_tokens`)."""
    old, new = records["before"], records["after"]
    was, now = (record["probability"] >= known_from for record in (old, new))
    written = {moment: record["generated"] for moment, record in records.items() if "generated" in record}
    state = "known" if now else "forgotten" if was else "unknown"
    return {
        "open": False,
        "set": name,
        "question": old["question"],
        "answer": old["answer"],
        "length": len(old["answer"].split()),
        "probability": {moment: record["probability"] for moment, record in records.items()},
        "state": state,
        "words": new.get("rouge_l"),
        "written": written,
        "diff": diff_words(written["before"], written["after"]) if {"before", "after"} <= written.keys() else None,
        "tokens": compact_tokens(records),
    }


def diff_words(before: str, after: str) -> Diff:
    """The texts in one: words of both, of the first alone ("del") and of the second alone ("ins").

    >>> diff_words("Ada wrote short plays.", "Ada wrote no plays.")
    [('', 'Ada wrote '), ('del', 'short '), ('ins', 'no '), ('', 'plays.')]
    """
    first, second = (re.findall(r"\S+\s*", text) for text in (before, after))
    old, new = ([word.rstrip() for word in words] for words in (first, second))
    parts: Diff = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(("", "".join(second[c:d])))
            continue
        parts += [("del", "".join(first[a:b]))] if b > a else []
        parts += [("ins", "".join(second[c:d]))] if d > c else []
    return parts


def compact_tokens(records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]] | None:
    """{"tokens": texts, moment: minus a hundred times each one's log-probability, whole}: a page has thousands of
    these. None where they were not kept."""
    if "tokens" not in records["before"]:
        return None
    every = {m: [round(-100 * logp) for logp in r["token_logp"]] for m, r in records.items() if "token_logp" in r}
    return {"tokens": records["before"]["tokens"], **every}
