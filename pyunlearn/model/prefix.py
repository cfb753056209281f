"""What all samples begin with, such as a chat template's system prompt, goes through the model once a draw.

A causal model does not look ahead: the keys and values of these tokens are the same for every sample. Each batch then
holds what follows, and attends to a copy of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..mrd.samples import Samples
from .forward import IGNORE_INDEX, supervised_hidden, token_stats_of
from .head import text_config, unwrap

WORTH = 0.1  # of all tokens: what sharing has to spare


def shared_prefix(model: Any, samples: Samples) -> Tensor | None:
    """(1, P) token ids with which all samples begin, if sharing them pays and the model takes keys and values back.

    No scored token is predicted from them. That the model's likelihoods stay as they are is tried on the last batch:
    recurrent models, and what else has no cache of transformers' kind, keep their prefix in every sample.
    """
    length = common_prefix(samples.rows)
    spared = length * (len(samples) - 1)
    if spared < WORTH * sum(len(row["input_ids"]) for row in samples.rows):
        return None
    if "past_key_values" not in inspect.signature(unwrap(model).forward).parameters:
        return None
    batch = samples.batches[-1]
    prefix = batch["input_ids"][:1, :length]
    cache = prefill(model, prefix)
    if cache.get_seq_length() != length:
        return None
    shared = after_prefix(batch, cache)
    whole, rest = (token_stats_of(model, inputs, ("log_nll",))[0].log_nll for inputs in (batch, shared))
    return prefix if torch.allclose(rest, whole, rtol=0, atol=0.01) else None  # logs: right for tokens known by heart


def common_prefix(rows: Sequence[Mapping[str, Any]]) -> int:
    """P, the tokens that all rows begin with, up to where the first of their scored tokens is predicted."""
    length = min(int((row["labels"][1:] != IGNORE_INDEX).nonzero()[0]) for row in rows)
    starts = torch.stack([row["input_ids"][:length] for row in rows])
    return int((starts == starts[0]).all(0).long().cumprod(0).sum())


def prefill(model: Any, prefix: Tensor) -> Any:
    """The cache of `prefix` (1, P), for the weights as they stand."""
    from transformers import DynamicCache

    cache = DynamicCache(config=text_config(unwrap(model)))
    unscored = torch.full_like(prefix, IGNORE_INDEX)
    inputs: dict[str, Any] = {"input_ids": prefix, "labels": unscored, "past_key_values": cache}
    supervised_hidden(model, inputs)
    return cache


def after_prefix(batch: Mapping[str, Tensor], cache: Any) -> dict[str, Any]:
    """The batch without the tokens in `cache`, of which it gets a copy a row; its attention_mask covers both."""
    length, own = cache.get_seq_length(), copy.deepcopy(cache)
    own.batch_repeat_interleave(len(batch["input_ids"]))
    cut: dict[str, Any] = {name: batch[name][:, length:] for name in ("input_ids", "labels")}
    return {**batch, **cut, "past_key_values": own}
