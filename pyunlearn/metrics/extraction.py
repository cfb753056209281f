"""How much of an answer the model goes on to write from some point of it on: extraction likelihood, and strength by
writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from .._hints import check_known
from ..data import QA
from ..model.causal_lm import CausalLM
from ..model.forward import length_batches
from .generation import common_length, greedy_tokens, rouge_l_recall
from .metric import Count, metric
from .reading import Kept, read_rows

if TYPE_CHECKING:
    from .evaluate import Examination

Grams = Literal["written", "true"]
Prefix = Literal["tokens", "words"]
Match = Literal["exact", "similar"]
SIMILAR = 0.5  # of what is left, as UWC's authors have it


def extraction_likelihood(
    model: nn.Module | CausalLM,
    tokenizer: Any,
    dataset: Any,
    *,
    ngram: int = 10,
    grams: Grams = "written",
    batch_size: int = 16,
    kept: Kept | None = None,
    progress: bool = False,
) -> list[float]:
    """EL_n of every row of a data set (rows of input_ids and labels), in [0, 1].

    Jang et al. (2023), as arXiv:2504.06658, Appendix C.4: the mean over the answer's prefixes of the share of n-grams
    of the greedy continuation that are n-grams of the true one. The prompt is given, x_1 .. x_T are the supervised
    tokens, continuations have at most as many tokens as are left and may end earlier. An answer of n tokens or fewer
    is measured by (T - 1)-grams. grams: "true" is the share of the true continuation's n-grams that are in the greedy
    one, as the authors' code has it. kept: where finished batches are.

    Where the greedy token is the true one, the continuation goes on as that of the next prefix, so that only prefixes
    before a wrong token are generated from: none for an answer known by heart.

    Raises ValueError for no rows, a row whose supervised tokens are not its last ones or fewer than two, ngram < 1,
    unknown grams, or log-probabilities that are not finite.
    """
    check_known("grams", grams, get_args(Grams))
    if ngram < 1:
        raise ValueError(f"ngram={ngram}: needs a whole number >= 1")
    rows = [dataset[i] for i in range(len(dataset))]
    lm = CausalLM.of(model)
    readings = read_rows(lm, rows, batch_size=batch_size, kept=kept, progress=progress)
    right = [reading.greedy.tolist() for reading in readings]
    starts = [len(row["input_ids"]) - len(known) for row, known in zip(rows, right, strict=True)]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        if bool((row["labels"][start:] == -100).any()):
            raise ValueError(f"dataset[{i}]: its supervised tokens are not its last ones")
        if len(right[i]) == 1:
            raise ValueError(f"dataset[{i}]: has 1 supervised token, extraction likelihood needs 2 at least")
    written = write_from_errors(lm, tokenizer, rows, starts, right, batch_size, kept, progress)
    return [
        overlap_of(row["input_ids"].tolist()[start:], known, texts, ngram, grams)
        for row, start, known, texts in zip(rows, starts, right, written, strict=True)
    ]


def write_from_errors(
    lm: CausalLM,
    tokenizer: Any,
    rows: Sequence[Any],
    starts: Sequence[int],
    right: Sequence[Sequence[bool]],
    batch_size: int,
    kept: Kept | None,
    progress: bool,
) -> list[dict[int, list[int]]]:
    """For each row, wrong position t -> the greedy continuation of x_<t, of at most T - t tokens."""
    wanted = [(i, t) for i, known in enumerate(right) for t, good in enumerate(known) if not good]
    limits = [len(right[i]) - t for i, t in wanted]
    written: list[dict[int, list[int]]] = [{} for _ in rows]
    for batch in length_batches(limits, batch_size):
        some, room = [wanted[j] for j in batch], limits[batch[0]]
        prompts = [rows[i]["input_ids"][: starts[i] + t].tolist() for i, t in some]
        options: dict[str, Any] = {"batch_size": batch_size, "kept": kept, "progress": progress}
        texts = greedy_tokens(lm, tokenizer, prompts, max_new_tokens=room, **options)
        for (i, t), text in zip(some, texts, strict=True):
            written[i][t] = text[: len(right[i]) - t]
    return written


def overlap_of(
    answer: list[int], right: Sequence[bool], written: dict[int, list[int]], ngram: int, grams: Grams
) -> float:
    """The mean over prefixes. Positions count from 0: the attack at t is given answer[:t] and has to write the rest."""
    total = len(answer)
    n = min(ngram, total - 1)
    continuation: list[int] = []
    shares = 0.0
    for t in range(total - 1, -1, -1):
        continuation = [answer[t], *continuation] if right[t] else written[t]
        if t < total - n:
            own, other = (continuation, answer[t:]) if grams == "written" else (answer[t:], continuation)
            shares += overlap(own, other, n)
    return shares / (total - n)


def overlap(a: Sequence[int], b: Sequence[int], n: int) -> float:
    """The share of a's n-grams that b has; 0 where a has none."""
    theirs = {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
    ours = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
    return sum(gram in theirs for gram in ours) / len(ours) if ours else 0.0


@metric("extraction_likelihood", batched=True)
def extraction_likelihood_of(
    item: list[QA], examination: Examination, *, ngram: Count = 10, grams: Grams = "written"
) -> list[float]:
    """How much of the answer the model goes on to write, over all its prefixes (`extraction_likelihood`)."""
    return extraction_likelihood(
        examination.reader(),
        examination.tokenizer,
        examination.rows(item),
        ngram=ngram,
        grams=grams,
        batch_size=examination.batch_size,
        kept=examination.kept,
        progress=examination.progress,
    )


def ends_of_words(options: Mapping[str, Any]) -> str | None:
    if options["prefix"] == "words" and options["early_end"]:
        return "early_end=True: is of tokens, words have their line to the end; needs prefix='tokens'"
    return None


@metric(batched=True, together=ends_of_words)
def written_extraction_strength(
    item: list[QA],
    examination: Examination,
    *,
    prefix: Prefix = "tokens",
    match: Match = "exact",
    early_end: bool = False,
) -> list[float]:
    """1 - k/n, k the shortest prefix of the answer after which the model writes the rest, greedily.

    Wang et al. (2025, UWC). prefix: "tokens", found by bisection: with the exact match this is `extraction_strength`,
    written instead of read; "words", tried one by one, where the first line has to be the rest. match: "similar" asks
    for half of the rest in its order, tokens of a longest common subsequence, or ROUGE-L recall above it. early_end:
    of tokens, as the authors' code has it, a text need only be right up to where it ends, so that an empty one passes.

    Raises ValueError for an unknown option, and for early_end with words.
    """
    if wrong := ends_of_words({"prefix": prefix, "early_end": early_end}):
        raise ValueError(wrong)
    check_known("prefix", prefix, get_args(Prefix))
    check_known("match", match, get_args(Match))
    if prefix == "words":
        return by_words(item, examination, match)
    return by_tokens(item, examination, match, early_end)


def by_tokens(items: Sequence[QA], examination: Examination, match: Match, early_end: bool) -> list[float]:
    rows = examination.rows(items)
    answers = [row["input_ids"][row["labels"] != -100].tolist() for row in rows]
    prompts = [row["input_ids"][row["labels"] == -100].tolist() for row in rows]
    ends = {*examination.tokenizer.all_special_ids}
    low, high = [0] * len(rows), [len(answer) for answer in answers]
    while open_ := [i for i in range(len(rows)) if low[i] < high[i]]:
        middle = {i: (low[i] + high[i]) // 2 for i in open_}
        shown = [prompts[i] + answers[i][: middle[i]] for i in open_]
        texts = written_after(shown, examination, max(len(answers[i]) - middle[i] for i in open_))
        for i, text in zip(open_, texts, strict=True):
            rest = answers[i][middle[i] :]
            found = text[: len(rest)]
            if early_end and found and found[-1] in ends:
                found = found[:-1]
            if match == "exact":
                good = found == rest[: len(found)] if early_end else found == rest
            else:
                good = common_length(rest, found) >= SIMILAR * len(rest)
            low[i], high[i] = (low[i], middle[i]) if good else (middle[i] + 1, high[i])
    return [1 - k / len(answer) for k, answer in zip(low, answers, strict=True)]


def by_words(items: Sequence[QA], examination: Examination, match: Match) -> list[float]:
    prompt = examination.format
    words = [item.answer.split() for item in items]
    shown: dict[int, int] = {}  # item -> words after which the rest is written
    for k in range(max(map(len, words))):
        open_ = [i for i, own in enumerate(words) if i not in shown and k < len(own)]
        if not open_:
            break
        prompts = [
            prompt.begun_ids(items[i].question, " ".join(words[i][:k])) if k else prompt.prompt_ids(items[i].question)
            for i in open_
        ]
        longest = max(len(prompt.encode(items[i].question, items[i].answer).input_ids) for i in open_)
        texts = written_after(prompts, examination, longest)
        for i, text in zip(open_, texts, strict=True):
            decoded = str(examination.tokenizer.decode(text, skip_special_tokens=True))
            line, rest = decoded.strip().split("\n")[0].strip(), " ".join(words[i][k:])
            if line == rest if match == "exact" else rouge_l_recall(line, rest) > SIMILAR:
                shown[i] = k
    return [1 - shown.get(i, len(own)) / len(own) for i, own in enumerate(words)]


def written_after(prompts: Sequence[Sequence[int]], examination: Examination, most: int) -> list[list[int]]:
    return greedy_tokens(
        examination.reader(),
        examination.tokenizer,
        prompts,
        max_new_tokens=most,
        batch_size=examination.batch_size,
        kept=examination.kept,
        progress=examination.progress,
    )
