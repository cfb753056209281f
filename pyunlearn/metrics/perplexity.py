"""Perplexity: of an answer, and of a text as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data import QA
from ..model.causal_lm import CausalLM
from .metric import Several, metric
from .reading import Kept, Reading, read_rows
from .utility import exp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .evaluate import Examination


@metric()
def perplexity(answer: Reading) -> float:
    """exp of the mean negative log-likelihood of the answer's tokens, its end token included: 1 / probability.

    Infinite for a loss beyond 709 nats, of which float64 has no exponential.
    """
    return exp(answer.loss)


@metric("text_perplexity", batched=True)
def text_perplexity_of(item: Sequence[QA], examination: Examination, *, window: Several = 4096) -> list[float]:
    """Perplexity per token of each answer as a text of its own, whatever the question, in windows (`text_perplexity`).

    window: of tokens; the model's context where that is less.
    """
    lm = examination.reader()
    return [
        text_perplexity(
            lm,
            examination.tokenizer,
            each.answer,
            window=min(window, lm.context_length or window),
            batch_size=min(4, examination.batch_size),  # windows are long
            kept=examination.kept,
            progress=examination.progress,
        )
        for each in item
    ]


def text_perplexity(
    model: nn.Module | CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int | None = None,
    batch_size: int = 4,
    kept: Kept | None = None,
    progress: bool = True,
) -> float:
    """exp of the mean negative log-likelihood, in nats, over the tokens of a text, such as WikiText's test set.

    Infinite for a mean beyond 709, of which float64 has no exponential.

    The text is cut into windows of `window` tokens (None: the model's context), which do not overlap and do not know of
    each other; each begins with what the tokenizer puts before any text, and otherwise its first token is not scored.
    Perplexities of other windows or tokenizers do not compare.

    Raises ValueError for window < 2, or beyond the context, a text of fewer than two tokens, or a model without a
    context length where window is None; and what `read_rows` raises.
    """
    lm = CausalLM.of(model)
    context = lm.context_length
    window = context if window is None else window
    if window is None or not 2 <= window <= (context or window):
        raise ValueError(f"window={window}: needs a number of tokens from 2 to the model's context, {context}")
    opening = [] if tokenizer.bos_token_id is None else list(tokenizer("")["input_ids"])
    opening = opening[:1] if opening[:1] == [tokenizer.bos_token_id] else []
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    width = window - len(opening)
    pieces = [opening + ids[start : start + width] for start in range(0, len(ids), width)]
    tensors = [torch.tensor(piece) for piece in pieces if len(piece) > 1]
    if not tensors:
        raise ValueError(f"text: has {len(ids)} tokens, perplexity needs 2 at least")
    rows: list[dict[str, Any]] = [{"input_ids": piece, "labels": piece, "index": i} for i, piece in enumerate(tensors)]
    readings = read_rows(lm, rows, batch_size=batch_size, kept=kept, progress=progress)
    return exp(math.fsum(each.nll for each in readings) / sum(each.num_tokens for each in readings))
