"""Texts that a model draws at random after prompts, each a function of the model, its prompt and the seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .._progress import track
from ..data import padding_id
from ..model.causal_lm import CausalLM, eval_mode
from ..store import Store, digest_json
from .generation import check_prompts, greedy_settings, left_padded, prompt_batches, up_to, write


def sample_tokens(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    count: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 200,
    seed: int | str = 0,
    batch_size: int = 16,
    store: Store | None = None,
    description: str = "writing",
    progress: bool = True,
) -> list[list[list[int]]]:
    """Of each tokenised prompt `count` continuations, drawn from softmax(logits / temperature), in their order.

    Each ends with the end token, if it came to one, or with the context. Sample j of a prompt takes random numbers of
    its own, of (seed, prompt, j): neither the global generators nor what else is in its batch matters, but for the
    rounding of the model's dtype. store: of this model, where each prompt's texts are kept as soon as they are there;
    the batches do not depend on what it has already, so that a resumed call gives the same bits. The same prompt twice
    has the same texts. batch_size: texts that are written at once.

    Raises ValueError for count < 1, a temperature that is not above 0, and as `greedy_tokens`.
    """
    if count < 1:
        raise ValueError(f"count={count}: needs a whole number >= 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: needs a finite number > 0")
    lm, pad = CausalLM.of(model), padding_id(tokenizer)
    asked = list(dict.fromkeys(map(tuple, prompts)))
    lengths, context = check_prompts(lm, asked, max_new_tokens), lm.context_length
    store = Store(None) if store is None else store
    drawn = {"count": count, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    with eval_mode(lm.alone), torch.no_grad(), greedy_settings(lm, tokenizer) as ends:
        identities = [{"sample": digest_json(list(prompt)), **drawn, "ends": sorted(ends)} for prompt in asked]
        names = [digest_json(identity) for identity in identities]
        kept: list[Any] = [store.get(name, identity) for name, identity in zip(names, identities, strict=True)]
        batches = prompt_batches(lm, lengths, max(1, batch_size // count), max_new_tokens, pad)
        left = [batch for batch in batches if any(kept[i] is None for i in batch)]
        for batch in track(left, description, progress, done=len(asked) - sum(map(len, left))):
            ids, mask = left_padded([asked[i] for i in batch for _ in range(count)], pad)
            numbers = [random.Random(f"{seed}/{digest_json(list(asked[i]))}/{j}") for i in batch for j in range(count)]
            room = max_new_tokens if context is None else min(max_new_tokens, context - ids.size(1))
            rows = write(lm, ids, mask, room, [i for i in batch for _ in range(count)], [Draw(numbers, temperature)])
            texts = [up_to(tokens, ends) for tokens in rows.tolist()]
            for place, i in enumerate(batch):
                if kept[i] is None:
                    kept[i] = store.put(names[i], texts[place * count : (place + 1) * count], identities[i])
    by_prompt = dict(zip(asked, kept, strict=True))
    return [by_prompt[tuple(prompt)] for prompt in prompts]


class Draw:
    """Leaves one token a row, drawn by inverting the distribution function at a random number of the row's own."""

    def __init__(self, numbers: Sequence[random.Random], temperature: float):
        self.numbers, self.temperature = numbers, temperature

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        below = (logits.double() / self.temperature).softmax(-1).cumsum(-1)
        at = below.new_tensor([[number.random()] for number in self.numbers]) * below[:, -1:]
        token = torch.searchsorted(below, at, right=True).clamp_max(below.size(-1) - 1)
        return torch.full_like(logits, -torch.inf).scatter(-1, token, 0.0)
