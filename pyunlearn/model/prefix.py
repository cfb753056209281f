"""What all samples begin with, such as a chat template's system prompt, goes through the model once a draw.

A causal model does not look ahead: the keys and values of these tokens are the same for every sample. Each batch then
holds what follows, and attends to a copy of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .causal_lm import CausalLM, rotary_limits
from .forward import IGNORE_INDEX, supervised_hidden, supervised_stats

WORTH = 0.1  # of all tokens: what sharing has to spare
ARGUMENTS = ("cache", "past_key_values")  # of a forward: since transformers 5.24, and before


class Prefix(NamedTuple):
    """Tokens with which all samples begin. tokens: (1, P); argument: by which the model's forward takes their cache."""

    tokens: Tensor
    argument: str

    def fill(self, lm: CausalLM) -> Any:
        """The cache of its tokens, for the weights as they stand."""
        from transformers import DynamicCache

        cache = DynamicCache(config=lm.config)
        unscored = torch.full_like(self.tokens, IGNORE_INDEX)
        inputs: dict[str, Any] = {"input_ids": self.tokens, "labels": unscored, self.argument: cache}
        supervised_hidden(lm, inputs)
        return cache

    def cut(self, batch: Mapping[str, Tensor], cache: Any) -> dict[str, Any]:
        """The batch without these tokens, with a copy of their cache a row; its attention_mask covers both."""
        own, length = copy.deepcopy(cache), self.tokens.size(1)
        own.batch_repeat_interleave(len(batch["input_ids"]))
        rest: dict[str, Any] = {name: batch[name][:, length:] for name in ("input_ids", "labels")}
        return {**batch, **rest, self.argument: own}


def shared_prefix(
    lm: CausalLM, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]
) -> tuple[Prefix | None, str | None]:
    """(what all `rows` begin with, None), or (None, why it is not shared), for samples {"input_ids", "labels"}.

    Shared where that spares a tenth of all tokens and the model takes keys and values back. No scored token is
    predicted from them. That the model's likelihoods stay as they are is tried on `batch`, some of the samples:
    recurrent models, and what else has no cache of transformers' kind, keep their prefix in every sample.
    """
    length = common_prefix(rows)
    total, spared = sum(len(row["input_ids"]) for row in rows), length * (len(rows) - 1)
    if spared < WORTH * total:
        return None, f"the {len(rows)} samples share {length} tokens, which spares {spared} of {total}, under a tenth"
    if rotary_limits(lm.config):
        return None, f"the rotary factors of {lm.name} depend on the length of a sequence"
    parameters = inspect.signature(lm.inner.forward).parameters
    argument = next((name for name in ARGUMENTS if name in parameters), None)
    if argument is None:
        return None, f"the forward of {lm.name} has no argument {' or '.join(ARGUMENTS)}"
    prefix = Prefix(batch["input_ids"][:1, :length], argument)
    try:
        cache = prefix.fill(lm)
        if length_of(cache) != length:
            return None, f"{lm.name} leaves no keys and values of its tokens in a cache"
        shared = supervised_stats(lm, prefix.cut(batch, cache), ("log_nll",))[0].log_nll
    except Exception as error:  # caches of hybrid models fail in ways of their own; without one the model is right
        return None, f"{lm.name} does not go on from a cache of them ({type(error).__name__})"
    log_nll = supervised_stats(lm, batch, ("log_nll",))[0].log_nll
    if not torch.allclose(shared, log_nll, rtol=0, atol=0.01):  # logs: right for tokens known by heart
        return None, f"the likelihoods of {lm.name} are others with it"
    return prefix, None


def common_prefix(rows: Sequence[Mapping[str, Any]]) -> int:
    """P, the tokens that all rows begin with, up to where the first of their scored tokens is predicted."""
    length = min(int((row["labels"][1:] != IGNORE_INDEX).nonzero()[0]) for row in rows)
    starts = torch.stack([row["input_ids"][:length] for row in rows])
    return int((starts == starts[0]).all(0).long().cumprod(0).sum())


def length_of(cache: Any) -> int:
    """Tokens in a cache; 0 for one of a recurrent model, of which newer transformers do not know it."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return 0
