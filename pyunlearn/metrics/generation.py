"""Metrics of what a model writes when it is asked: greedy answers and their overlap with the true ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .._progress import track
from ..data import padding_id
from ..data.words import splitter
from ..model.causal_lm import CausalLM, eval_mode
from ..model.forward import length_batches


def rouge_l_recall(generated: str, answer: str) -> float:
    """ROUGE-L recall: longest common subsequence of stemmed words over words of `answer`, in [0, 1].

    Lin (2004). An answer in Latin letters and digits 0-9 is split by the `rouge-score` package with use_stemmer=True,
    as in TOFU, where words are runs of a-z and 0-9. That package knows no other script: an answer in one is split as
    `pyunlearn.data.words.splitter` says, of Han, kana, Thai and the like into characters, and so is what is compared
    with it. Raises ValueError for an answer of white space alone.
    """
    split = splitter(answer, _latin_words())
    known = split(answer)
    return common_length(known, split(generated)) / len(known)


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a word of `b` at a time: bit i of `open_` is 0 where it grows at a[i].

    Hyyro, Bit-Parallel LCS-length Computation Revisited, 2004.
    """
    places: dict[str, int] = {}
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
    batch_size: int = 16,
    progress: bool = True,
) -> list[str]:
    """Greedy continuations of tokenised prompts, as stripped text without special tokens, in their order.

    Arguments, errors and the rest as `greedy_tokens`.
    """
    written = greedy_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def greedy_tokens(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 16,
    progress: bool = True,
) -> list[list[int]]:
    """Greedy continuations of tokenised prompts, in their order; each ends with the end token, if it came to one.

    Batches of similar length are padded on the left. Plain argmax: what the model's own generation settings
    say of sampling, beams or penalties does not apply; its end tokens do. Where the context is shorter than
    the batch's longest prompt + max_new_tokens, the batch ends with it.

    Raises ValueError for an empty prompt, one that fills the context, or max_new_tokens < 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: needs a whole number >= 1")
    lm, pad = CausalLM.of(model), padding_id(tokenizer)
    context = lm.context_length
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < (context or len(prompt) + 1):
            raise ValueError(
                f"prompts[{i}]: has {len(prompt)} tokens, needs 1 or more, fewer than the context, {context}"
            )
    written: list[list[int]] = [[] for _ in prompts]
    with eval_mode(lm.alone), torch.no_grad():
        for batch in track(length_batches([len(p) for p in prompts], batch_size), "writing", progress):
            longest = max(len(prompts[i]) for i in batch)
            padding = [longest - len(prompts[i]) for i in batch]
            ids = torch.tensor([[pad] * p + list(prompts[i]) for i, p in zip(batch, padding, strict=True)])
            mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding])
            room = max_new_tokens if context is None else min(max_new_tokens, context - longest)
            config = _greedy_config(lm.alone, tokenizer, room)
            inputs = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
            output = lm.alone.generate(**inputs, generation_config=config)
            ends = set(config.eos_token_id or ())
            for i, tokens in zip(batch, output[:, longest:].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                written[i] = tokens[: end + 1]
    return written


def _greedy_config(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        # Given one by one, because anything left out is taken from the model's own settings.
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        min_length=0,
    )


@lru_cache(maxsize=1)
def _latin_words() -> Callable[[str], list[str]]:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True).tokenize
