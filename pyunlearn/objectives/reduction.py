"""From per-token values to one scalar: masks, sequences, and the four reductions, counted globally.

===================== =========================================== ==========================
reduction             loss                                        what `count` counts
===================== =========================================== ==========================
token_mean            sum over all tokens / number of tokens      supervised tokens
sequence_mean         sum over all tokens / number of sequences   sequences with such a token
sequence_token_mean   mean over sequences of their token mean     sequences with such a token
sum                   sum over all tokens                         (nothing is divided)
===================== =========================================== ==========================

`count` replaces the batch's own number. With the total of the whole optimiser step (all micro-batches, all
ranks) in its place, the parts simply add up to the loss of the whole. A batch without a supervised token
gives 0, with a graph and zero gradients. Nothing here waits for a device, except to count the sequences of
the flat form when `num_sequences` is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_token_mean", "sum")
UNITS = {
    "token_mean": "tokens",
    "sequence_mean": "sequences",
    "sequence_token_mean": "sequences",
    "sum": "tokens",
}

Count = int | float | Tensor


class Selection(NamedTuple):
    """Which of a sequence's tokens count: not the first `skip`; of the n left, int(keep n), at least one, with the
    smallest loss -logp, or with the largest; of equals the first. How many depends on their number alone."""

    skip: int = 0
    keep: float = 1.0
    largest: bool = False

    def num_kept(self, tokens: Tensor) -> Tensor:
        """(S,) numbers of tokens -> how many of them count, (S,) int64."""
        left = (tokens.long() - self.skip).clamp_min(0)
        return torch.where(left > 0, (self.keep * left.double()).long().clamp_min(1), left)


@dataclass(frozen=True)
class TokenInputs:
    """The statistics of one batch of sequences, flat (N,) over its supervised tokens or (B, T) with a `mask`.

    Attributes:
        values: output name of `pyunlearn.token_stats` -> tensor, for example {"logp": (N,) float32}; "hidden",
            (B, T, H) or (N, H), for `rmu` and `rr`.
        ref_logp, ref_hidden, ref_entropy: the frozen reference's at the same tokens, or None.
        sequence_ids: (N,) int64 in [0, num_sequences), the sequence of each flat token; None for (B, T).
        num_sequences: number of sequences of the flat form. None: largest id + 1, which waits for the device.
        vocab_size: V, for `me`.
        mask: bool, the supervised tokens; None: all of them.
        labelled: bool, which of the positions are supervised, for presets that count others too.
        num_positions: T - 1 of rows padded to T, for presets that divide by it.
    """

    values: Mapping[str, Tensor]
    ref_logp: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_sequences: int | None = None
    vocab_size: int | None = None
    mask: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_entropy: Tensor | None = None
    labelled: Tensor | None = None
    num_positions: int | None = None


@dataclass(frozen=True)
class Layout:
    """Which tokens of a (B, T) or (N,) statistic are supervised, and which sequence each belongs to.

    Hidden states have one dimension more, and `like` is their first number of every token.
    """

    like: Tensor
    name: str
    prefix: str
    mask: Tensor | None
    sequence_ids: Tensor | None
    num_sequences: int | None

    @classmethod
    def of(cls, inputs: TokenInputs, like: Tensor, name: str, prefix: str) -> Layout:
        """The layout of the statistic `like`, called `name`; `prefix` goes before the names of mask and ids.

        Raises: ValueError or TypeError naming the argument that does not fit.
        """
        mask, ids, size = inputs.mask, inputs.sequence_ids, inputs.num_sequences
        if mask is not None:
            check_matches(prefix + "mask", mask, name, like, (torch.bool,))
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
            raise ValueError(f"num_sequences={size!r}: needs a whole number >= 0")
        if like.dim() == 2:
            if ids is not None:
                raise ValueError(
                    f"{prefix}sequence_ids goes with flat (N,) statistics, but {name} has shape "
                    f"{tuple(like.shape)}: its rows are the sequences already"
                )
            if size not in (None, like.size(0)):
                raise ValueError(f"num_sequences={size}: {name} has {like.size(0)} rows, one a sequence")
            size = like.size(0)
        elif ids is not None:
            check_matches(prefix + "sequence_ids", ids, name, like, (torch.int64, torch.int32))
        return cls(like, name, prefix, mask, ids, size)

    def with_size(self, num_sequences: int) -> Layout:
        return replace(self, num_sequences=num_sequences)

    def select(self, selection: Selection, logp: Tensor | None) -> Layout:
        """The layout of the tokens that count still. logp: as `like`, where some are kept by it."""
        if selection == Selection():
            return self
        size = common_size([self])
        rows = self.like.size(-1) if self.like.dim() == 2 else None
        ids = self.needed_ids().long() if rows is None else torch.arange(size, device=self.like.device)[:, None]
        ids = ids.expand(self.like.shape).flatten()
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((ids < 0) | (ids >= size)).any()):
            raise IndexError(self.ids_needed(size))
        if self.mask is not None:
            ids = torch.where(self.mask.flatten(), ids, size)  # what does not count is a sequence behind all others
        tokens = torch.zeros(size + 1, dtype=torch.int64, device=ids.device).index_add_(0, ids, torch.ones_like(ids))
        starts = tokens.cumsum(0) - tokens
        order = torch.argsort(ids, stable=True)

        def place_in_sequence(order: Tensor) -> Tensor:
            place = torch.arange(len(order), device=order.device) - starts[ids[order]]
            return torch.empty_like(place).scatter_(0, order, place)

        skipped = place_in_sequence(order) < selection.skip
        if selection.keep < 1 and logp is not None:
            loss = logp.detach().flatten() * (1 if selection.largest else -1)
            by_loss = torch.argsort(loss, stable=True)
            by_loss = by_loss[torch.argsort(skipped[by_loss].to(torch.uint8), stable=True)]
            order = by_loss[torch.argsort(ids[by_loss], stable=True)]
            kept = place_in_sequence(order) < selection.num_kept(tokens)[ids]
        else:
            kept = ~skipped
        return replace(self, mask=(kept & (ids < size)).view(self.like.shape))

    def largest_id(self) -> int:
        """Number of sequences that the ids speak of. Waits for the device."""
        ids = self.needed_ids()
        return int(ids.max()) + 1 if ids.numel() else 0

    def needed_ids(self) -> Tensor:
        if self.sequence_ids is None:
            raise ValueError(
                f"{self.prefix}sequence_ids is needed with flat (N,) statistics: an int64 tensor of shape "
                f"{tuple(self.like.shape)}, the sequence of each token, got None"
            )
        return self.sequence_ids

    def fill(self, values: Tensor) -> Tensor:
        """`values` with 0 where nothing is supervised, whatever stood there (NaN included), gradients too."""
        if self.mask is None:
            return values
        mask = self.mask if values.dim() == self.mask.dim() else self.mask.unsqueeze(-1)
        return torch.where(mask, values, 0.0)

    def num_tokens(self) -> Count:
        return self.like.numel() if self.mask is None else self.mask.sum()

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """(B, T) or (N,), already filled -> (S,)."""
        if values.dim() == 2:
            return values.sum(-1)
        ids, size = self.needed_ids().long(), self.num_sequences
        zeros = values.new_zeros(self.largest_id() if size is None else size)
        if values.is_cuda:  # index_add adds atomically there, in any order; index_put sorts the ids first
            return zeros.index_put((ids,), values, accumulate=True)
        try:
            return zeros.index_add(0, ids, values)
        except IndexError as error:
            raise IndexError(self.ids_needed(len(zeros))) from error

    def ids_needed(self, size: int) -> str:
        return f"{self.prefix}sequence_ids: needs 0 <= id < num_sequences={size}"

    def tokens_by_sequence(self) -> Tensor:
        """(S,) number of supervised tokens, in the statistics' dtype."""
        return self.sum_by_sequence(self.fill(torch.ones_like(self.like)))

    def inverse_length(self) -> Tensor:
        """0-d mean of 1 / (number of supervised tokens) over the sequences of this batch that have one."""
        tokens = self.tokens_by_sequence()
        present = tokens > 0
        return (present / tokens.clamp_min(1)).sum() / present.sum().clamp_min(1)


def check_matches(name: str, tensor: Tensor, like_name: str, like: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raises unless `tensor` has the shape and device of `like` and one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: needs a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: needs {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: needs the shape of {like_name}, {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: needs the device of {like_name}, {like.device}, got {tensor.device}")


def common_size(layouts: list[Layout]) -> int:
    """The number of sequences all batches share, sequence i of one paired with sequence i of the other."""
    known = {layout.prefix: layout.num_sequences for layout in layouts if layout.num_sequences is not None}
    if len(set(known.values())) > 1:
        counts = ", ".join(f"{prefix.rstrip('_')} has {size}" for prefix, size in known.items())
        raise ValueError(f"needs as many sequences in each batch, sequence i paired with sequence i: {counts}")
    sizes = [size for size in known.values() if size is not None]
    return sizes[0] if sizes else max(layout.largest_id() for layout in layouts)


def reduce_tokens(values: Tensor, layout: Layout, reduction: str, count: Count | None) -> Tensor:
    """Per-token values, (B, T) or (N,) -> scalar."""
    values = layout.fill(values)
    if reduction in ("sequence_mean", "sequence_token_mean"):
        layout = layout.with_size(common_size([layout]))
        return reduce_sequences(layout.sum_by_sequence(values), [layout.tokens_by_sequence()], reduction, count)
    if reduction == "sum":
        return values.sum()
    return values.sum() / at_least_one(layout.num_tokens() if count is None else count)


def reduce_sequences(values: Tensor, tokens: list[Tensor], reduction: str, count: Count | None) -> Tensor:
    """Per-sequence values (S,) -> scalar; `tokens` holds (S,) token counts, one tensor a batch.

    A sequence's value counts as the sum over its tokens. It is left out where a batch has no token of it.
    """
    present = torch.stack(tokens).amin(0) > 0
    values = torch.where(present, values, 0.0)
    if reduction == "sequence_token_mean":
        values = values / tokens[0].clamp_min(1)
    if reduction == "sum":
        return values.sum()
    own = tokens[0].sum() if reduction == "token_mean" else present.sum()
    return values.sum() / at_least_one(own if count is None else count)


def at_least_one(count: Count) -> Count:
    """`count` clamped to 1, so that an empty batch divides 0 by 1. Raises ValueError on what is no count."""
    if isinstance(count, Tensor):
        if count.dim() != 0:
            raise ValueError(f"count: needs a number or a 0-d tensor, got shape {tuple(count.shape)}")
        return count.clamp_min(1)
    if isinstance(count, bool) or not isinstance(count, Real) or not 0 <= count < float("inf"):
        raise ValueError(f"count={count!r}: needs a finite number >= 0 or a 0-d tensor")
    return max(count, 1)
