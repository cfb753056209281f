"""Metrics of what a model writes when it is asked: greedy answers and their overlap with the true ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from .._declined import decline
from .._hints import check_known
from ..data import QA, padding_id
from ..data.words import splitter
from ..model.causal_lm import CausalLM, eval_mode, rotary_limits
from ..model.forward import length_batches
from ..store import digest_json
from .metric import Count, metric
from .reading import Kept

# model -> (its kind, what `pads_left` says)
_PADS: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def rouge_l_recall(generated: str, answer: str) -> float:
    """ROUGE-L recall as TOFU has it: `rouge_scores` of stemmed words."""
    return rouge_scores(generated, answer)["rougeL_recall"]


def rouge_scores(generated: str, answer: str, stemmed: bool = True) -> dict[str, float]:
    """rouge1_recall, rougeL_recall and rougeL_f1, in [0, 1].

    Lin (2004). ROUGE-1: words that both have, as often as both; ROUGE-L: their longest common subsequence. Recall is
    over the words of `answer`, F1 the harmonic mean of that and the same over those of `generated`.

    An answer in Latin letters and digits 0-9 is split by the `rouge-score` package, where words are runs of a-z and
    0-9; stemmed: its use_stemmer, which TOFU and OpenUnlearning set and MUSE does not. That package knows no other
    script: an answer in one is split as `pyunlearn.data.words.splitter` says, of Han, kana, Thai and the like into
    characters, and so is what is compared with it. Raises ValueError for an answer of white space alone.
    """
    split = splitter(answer, _latin_words(stemmed))
    known, found = split(answer), split(generated)
    same = common_length(known, found)
    return {
        "rouge1_recall": (Counter(known) & Counter(found)).total() / len(known),
        "rougeL_f1": 2 * same / (len(known) + len(found)),
        "rougeL_recall": same / len(known),
    }


Rouge = Literal["recall", "f1"]


@metric()
def rouge_l(
    item: QA,
    written: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    score: Rouge = "recall",
    stemmed: bool = True,
    longest: Count | None = None,
) -> float:
    """ROUGE-L of what the model writes against the true answer (`rouge_scores`), or its first tokens, longest at most
    (`first_tokens`)."""
    check_known("score", score, get_args(Rouge))
    return rouge_scores(written, first_tokens(item.answer, tokenizer, longest), stemmed)[f"rougeL_{score}"]


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase | None, longest: int | None) -> str:
    """The text of a text's first tokens, those that the tokenizer puts before it among them, as MUSE cuts passages.

    longest: tokens; None is the whole text. Raises ValueError for fewer than 1, or no tokenizer to cut by.
    """
    if longest is None:
        return text
    if longest < 1 or tokenizer is None:
        raise ValueError(f"longest={longest}: needs a number of tokens >= 1, and a tokenizer, got {tokenizer!r}")
    return str(tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][:longest], skip_special_tokens=True))


@metric()
def rouge_1(item: QA, written: str, *, stemmed: bool = True) -> float:
    """ROUGE-1 recall of what the model writes against the true answer (`rouge_scores`)."""
    return rouge_scores(written, item.answer, stemmed)["rouge1_recall"]


@metric()
def answer_accuracy(item: QA, written: str) -> float:
    """Whether the model writes the true answer, letter by letter, capitals aside (Jia et al., 2024, SOUL)."""
    return float(item.answer.strip().casefold() in written.casefold())


def common_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, a word of `b` at a time: bit i of `open_` is 0 where it grows at a[i].

    Hyyro, Bit-Parallel LCS-length Computation Revisited, 2004.
    """
    places: dict[Hashable, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = open_ = (1 << len(a)) - 1
    for word in b:
        hits = open_ & places.get(word, 0)
        open_ = (open_ + hits | open_ - hits) & every
    return len(a) - open_.bit_count()


def greedy_generate(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    stops: Sequence[str] = (),
    batch_size: int = 16,
    kept: Kept | None = None,
    progress: bool = True,
) -> list[str]:
    """Greedy continuations of tokenised prompts, as stripped text without special tokens, in their order.

    A text ends before the first of stops that it has. Arguments, errors and the rest as `greedy_tokens`.
    """
    written = greedy_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, kept=kept, progress=progress
    )
    return [before_stops(text, stops).strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of stops; all where it has none."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]


def greedy_tokens(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    kept: Kept | None = None,
    progress: bool = True,
) -> list[list[int]]:
    """Greedy continuations of tokenised prompts, in their order; each ends with the end token, if it came to one.

    Plain argmax: nothing that the model's own generation settings say applies but its end tokens. A text ends with the
    context, whatever it is batched with. Batches of similar length are padded on the left, where that has been seen to
    change nothing (`pads_left`); else each batch has prompts of one length. kept: where finished batches are.

    Raises ValueError for an empty prompt, one that fills the context, max_new_tokens < 1, or prompts after which the
    model gives NaN or infinite logits, naming them.
    """
    lm, pad = CausalLM.of(model), padding_id(tokenizer)
    lengths, context = check_prompts(lm, prompts, max_new_tokens), lm.context_length
    written: list[list[int]] = [[] for _ in prompts]
    with eval_mode(lm.alone), torch.no_grad(), greedy_settings(lm, tokenizer) as ends:

        def write_batch(batch: Sequence[int]) -> list[list[int]]:
            ids, mask = left_padded([prompts[i] for i in batch], pad)
            room = max_new_tokens if context is None else min(max_new_tokens, context - ids.size(1))
            return [up_to(tokens, ends) for tokens in write(lm, ids, mask, room, batch).tolist()]

        def identity(batch: Sequence[int]) -> dict[str, Any]:
            asked = digest_json([list(prompts[i]) for i in batch])
            return {"write": asked, "max_new_tokens": max_new_tokens, "ends": sorted(ends)}

        batches = prompt_batches(lm, lengths, batch_size, max_new_tokens, pad)
        for batch, texts in (kept or Kept(None, lm)).finish(batches, write_batch, identity, "writing", progress):
            for i, text in zip(batch, texts, strict=True):
                written[i] = text
    return written


def check_prompts(lm: CausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Their lengths. Raises ValueError for an empty prompt, one that fills the context, or max_new_tokens < 1."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: needs a whole number >= 1")
    lengths, context = [len(prompt) for prompt in prompts], lm.context_length
    for i, length in enumerate(lengths):
        if not 0 < length < (context or length + 1):
            raise ValueError(f"prompts[{i}]: has {length} tokens, needs 1 or more, fewer than the context, {context}")
    return lengths


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, T), int64."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


def up_to(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens to the first end token, that one included; all where there is none."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


def prompt_batches(
    lm: CausalLM, lengths: Sequence[int], batch_size: int, max_new_tokens: int, pad: int
) -> list[list[int]]:
    """Prompts in batches of similar length; of one length where padding, or the others' length, would change a text."""
    limits = [lm.context_length, *(limit for _, limit in rotary_limits(lm.config))]
    limit = min(limit for limit in limits if limit is not None) if any(limits) else None
    batches: list[list[int]] = []
    for batch in length_batches(lengths, batch_size):
        longest = lengths[batch[0]]
        fits = limit is None or longest + max_new_tokens <= limit
        if lengths[batch[-1]] == longest or (fits and pads_left(lm, pad)):
            batches.append(batch)
        else:
            batches += [list(same) for _, same in groupby(batch, key=lambda i: lengths[i])]
    return batches


def write(
    lm: CausalLM,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    prompts: Sequence[int],
    choose: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
) -> Tensor:
    """(B, N) int64: the greedy tokens after prompts (B, T); prompts: what an error calls them. choose: made of the
    tokens so far and the logits (B, V), what the greedy token is taken of."""

    def check(_: Tensor, logits: Tensor) -> Tensor:
        bad = ~logits.amax(-1).isfinite()
        if bool(bad.any()):
            names = sorted(prompts[i] for i in bad.nonzero().flatten().tolist())
            raise ValueError(f"model: its logits after prompts {names} are NaN or infinite")
        return logits

    inputs = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
    processors = LogitsProcessorList([check, *choose])
    return lm.alone.generate(**inputs, max_new_tokens=max_new_tokens, logits_processor=processors)[:, ids.size(1) :]


@contextmanager
def greedy_settings(lm: CausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[set[int]]:
    """Inside, `generate` knows no settings but its defaults and these; the end tokens are the model's and EOS."""
    own = lm.inner.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    plain = GenerationConfig(
        do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=padding_id(tokenizer), use_cache=True
    )  # fmt: skip
    changed: list[tuple[Any, str, Any]] = [(lm.inner, "generation_config", plain)]
    if getattr(lm.config, "output_router_logits", False):  # for a loss, which fails on a cache
        changed.append((lm.config, "output_router_logits", False))
    before = [getattr(owner, name) for owner, name, _ in changed]
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        yield ends
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


def pads_left(lm: CausalLM, pad: int) -> bool:
    """Whether padding on the left leaves what the model writes as it is: tried once a model, on two tokens.

    It does not where positions or states count padding, nor in float64 under eager attention, which is NaN there.
    """
    kind = lm.inner.dtype, getattr(lm.config, "_attn_implementation", None)
    if lm.inner in _PADS and _PADS[lm.inner][0] == kind:
        return _PADS[lm.inner][1]
    ids = torch.tensor([[0, 1]])
    options: dict[str, Any] = {
        "max_new_tokens": 2,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    steps = []
    for padding in (0, 3):
        inputs = {"input_ids": F.pad(ids, (padding, 0), value=pad), "attention_mask": F.pad(ids + 1, (padding, 0)) > 0}
        moved = {name: tensor.to(lm.device) for name, tensor in inputs.items()}
        steps.append(torch.cat(lm.alone.generate(**moved, **options).logits).float())
    tolerance = 3e-2 if lm.inner.dtype.itemsize < 4 else 1e-3
    alone, padded = steps
    same = torch.allclose(padded, alone, rtol=0, atol=tolerance * float(alone.nan_to_num(0, 0, 0).abs().max()))
    if not same:
        decline("a batch of prompts of several lengths", f"{lm.name} writes otherwise after padding")
    _PADS[lm.inner] = kind, same
    return same


@lru_cache(maxsize=2)
def _latin_words(stemmed: bool) -> Callable[[str], list[str]]:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=stemmed).tokenize
