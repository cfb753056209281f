"""Extraction likelihood: how much of an answer the model goes on to write, from any point of it on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..model.causal_lm import CausalLM
from ..model.forward import length_batches
from .generation import greedy_tokens
from .reading import read_rows


def extraction_likelihood(
    model: nn.Module | CausalLM, tokenizer: Any, dataset: Any, *, ngram: int = 10, batch_size: int = 16
) -> list[float]:
    """EL_n of every row of a data set (rows of input_ids and labels), in [0, 1].

    Jang et al. (2023), as arXiv:2504.06658, Appendix C.4: the mean over the answer's prefixes of the share of n-grams
    of the greedy continuation that are n-grams of the true one. The prompt is given, x_1 .. x_T are the supervised
    tokens, continuations have at most as many tokens as are left and may end earlier. An answer of n tokens or fewer
    is measured by (T - 1)-grams.

    Where the greedy token is the true one, the continuation goes on as that of the next prefix, so that only prefixes
    before a wrong token are generated from: none for an answer known by heart.

    Raises ValueError for no rows, a row whose supervised tokens are not its last ones or fewer than two, ngram < 1, or
    log-probabilities that are not finite.
    """
    if ngram < 1:
        raise ValueError(f"ngram={ngram}: needs a whole number >= 1")
    rows = [dataset[i] for i in range(len(dataset))]
    lm = CausalLM.of(model)
    right = [reading.greedy.tolist() for reading in read_rows(lm, rows, batch_size=batch_size, progress=False)]
    starts = [len(row["input_ids"]) - len(known) for row, known in zip(rows, right, strict=True)]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if bool((row["labels"][start:] == -100).any()):
            raise ValueError(f"dataset[{i}]: its supervised tokens are not its last ones")
        if len(right[i]) == 1:
            raise ValueError(f"dataset[{i}]: has 1 supervised token, extraction likelihood needs 2 at least")
    written = write_from_errors(lm, tokenizer, rows, starts, right, batch_size)
    return [
        overlap_of(row["input_ids"].tolist()[start:], known, texts, ngram)
        for row, start, known, texts in zip(rows, starts, right, written, strict=True)
    ]


def write_from_errors(
    lm: CausalLM,
    tokenizer: Any,
    rows: Sequence[Any],
    starts: Sequence[int],
    right: Sequence[Sequence[bool]],
    batch_size: int,
) -> list[dict[int, list[int]]]:
    """For each row, wrong position t -> the greedy continuation of x_<t, of at most T - t tokens."""
    wanted = [(i, t) for i, known in enumerate(right) for t, good in enumerate(known) if not good]
    limits = [len(right[i]) - t for i, t in wanted]
    written: list[dict[int, list[int]]] = [{} for _ in rows]
    for batch in length_batches(limits, batch_size):
        some, room = [wanted[j] for j in batch], limits[batch[0]]
        prompts = [rows[i]["input_ids"][: starts[i] + t].tolist() for i, t in some]
        texts = greedy_tokens(lm, tokenizer, prompts, max_new_tokens=room, batch_size=batch_size, progress=False)
        for (i, t), text in zip(some, texts, strict=True):
            written[i][t] = text[: len(right[i]) - t]
    return written


def overlap_of(answer: list[int], right: Sequence[bool], written: dict[int, list[int]], ngram: int) -> float:
    """The mean over prefixes. Positions count from 0: the attack at t is given answer[:t] and has to write the rest."""
    total = len(answer)
    n = min(ngram, total - 1)
    continuation: list[int] = []
    shares = 0.0
    for t in range(total - 1, -1, -1):
        continuation = [answer[t], *continuation] if right[t] else written[t]
        if t < total - n:
            shares += overlap(continuation, answer[t:], n)
    return shares / (total - n)


def overlap(a: Sequence[int], b: Sequence[int], n: int) -> float:
    """The share of a's n-grams that b has; 0 where a has none."""
    theirs = {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
    ours = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
    return sum(gram in theirs for gram in ours) / len(ours) if ours else 0.0
