"""`token_stats_of`: a causal LM and a batch in, per-token statistics in the batch's own shape out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._declined import decline
from .._hints import check_known
from ..ops import TokenStats, token_stats
from .cache import ReferenceCache
from .causal_lm import CausalLM, UnknownHeadError
from .forward import place, select_positions, supervised_stats
from .head import Head
from .reference import Source, as_reference

FUSED = "fused head"
OPTIONS = ("budget_bytes", "k", "backend", "temperature")


def token_stats_of(
    model: nn.Module | CausalLM | ReferenceCache,
    batch: Mapping[str, Tensor],
    outputs: str | Sequence[str] = ("logp",),
    *,
    reference: Source | None = None,
    positions: Literal["supervised", "real", "followed"] = "supervised",
    **options: Any,
) -> TokenStats:
    """Per-token statistics of a model on a batch, with gradients for its weights and without logits of the batch.

    As `token_stats(model(...).logits[:, :-1], labels[:, 1:])` where no label is on padding (there it gives 0), but only
    the positions that count meet the head, in `linear_token_stats`, which holds as many logits as `budget_bytes` allow.
    Where the model does something to its logits that is not known here, or its head is no plain matrix, the logits are
    its own, and `stats.declined["fused head"]` says why.

    Args:
        model: a transformers causal LM, plain or inside DistributedDataParallel, FSDP, DeepSpeed, peft or accelerate;
            or a `ReferenceCache` of the batch's rows, which has "logp" alone.
        batch: input_ids, attention_mask and labels (B, T), on the model's device, other inputs of the model, and for a
            cache index (B,). Labels are not shifted: label t is predicted from the tokens before it; -100: not at all.
        outputs: names from `pyunlearn.ops.OUTPUTS`.
        reference: of kl_pq and kl_qp: a frozen model, a `ReferenceCache` with kl=True, or a `Reference`.
        positions: "supervised": those before a label; "real": before any token that is no padding, the prompt's too;
            "followed": padding too, as it is behind a row: that before one says what it would say there.
        options: budget_bytes, k and backend of `linear_token_stats`; temperature, which divides the logits that the
            models make.

    Returns:
        TokenStats of shape (B, T - 1): entry t is of token t + 1. `.mask`: the positions that count; 0 elsewhere.

    Raises ValueError or TypeError that names what does not fit: a batch, an output, a reference that is missing or not
    wanted, a model that is not causal.
    """
    if not isinstance(model, nn.Module | CausalLM | ReferenceCache):
        raise TypeError(f"model: needs a causal LM or a ReferenceCache, got {type(model).__name__}")
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(f"batch: needs a mapping with input_ids, attention_mask and labels, got {type(batch).__name__}")
    if not batch["input_ids"].numel():
        raise ValueError(f"batch: input_ids is empty, of shape {tuple(batch['input_ids'].shape)}")
    for name in options:
        check_known("option", name, OPTIONS)
    if positions not in ("supervised", "real", "followed"):
        raise ValueError(f"positions={positions!r}: needs 'supervised', 'real' or 'followed': the last token is last")
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if isinstance(model, ReferenceCache):
        if names != ("logp",) or reference is not None or positions != "supervised" or options:
            raise ValueError(f"outputs={names!r}: a ReferenceCache has 'logp' of supervised tokens and nothing else")
        return padded(as_reference(model).scalars(batch), batch, positions)
    wanted = bool({"kl_pq", "kl_qp"} & {*names})
    if wanted != (reference is not None):
        needs = "kl_pq or kl_qp in outputs" if reference is not None else "reference=, a frozen model or ReferenceCache"
        raise ValueError(f"outputs={names!r}, reference={type(reference).__name__}: needs {needs}")
    lm = CausalLM.of(model)
    pair: tuple[Tensor, Head] | None = None
    if reference is not None:
        frozen = as_reference(reference)
        frozen.check("reference", positions, True, ())
        hidden = frozen.hidden(batch, positions)
        pair = hidden, frozen.head(hidden)
    try:
        lm.check_head()
    except (UnknownHeadError, TypeError) as error:
        options.pop("budget_bytes", None)
        stats = logits_stats(lm, batch, names, positions, pair, **options)
        return padded(stats.as_dict(), batch, positions, {**stats.declined, FUSED: decline(FUSED, str(error))})
    stats, _ = supervised_stats(lm, batch, names, positions=positions, reference=pair, **options)
    return padded(stats.as_dict(), batch, positions, stats.declined)


def logits_stats(
    lm: CausalLM,
    batch: Mapping[str, Tensor],
    outputs: Sequence[str],
    positions: Any,
    reference: tuple[Tensor, Head] | None,
    **options: Any,
) -> TokenStats:
    """Statistics (N,) of the logits that the model itself makes; arguments as in `supervised_stats`."""
    inputs, rows, targets, _ = place(lm, batch, positions)
    logits = lm.called(**inputs, use_cache=False).logits
    logits = logits.flatten(0, 1).index_select(0, rows.to(logits.device))
    other = None if reference is None else reference[1].logits(reference[0]).to(logits.device)
    return token_stats(logits, targets.to(logits.device), outputs, reference=other, ignore_index=-1, **options)


def padded(
    values: Mapping[str, Tensor], batch: Mapping[str, Tensor], positions: Any, declined: dict[str, str] | None = None
) -> TokenStats:
    """Statistics (N,) at the positions that count -> (B, T - 1), 0 elsewhere."""
    rows, _, sequence_ids = select_positions(batch, positions)
    size, length = batch["input_ids"].shape
    at = rows - sequence_ids  # b (T - 1) + t

    def spread(flat: Tensor) -> Tensor:
        return flat.new_zeros(size * (length - 1)).index_put((at.to(flat.device),), flat).view(size, length - 1)

    first = next(iter(values.values()))
    mask = spread(first.detach().new_ones(len(first), dtype=torch.bool))
    return TokenStats({name: spread(flat) for name, flat in values.items()}, mask, declined)
