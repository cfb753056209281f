"""Rows of a step as a tree of tokens: what rows begin with alike goes through the model once, padding not at all.

What a causal model says of a token depends on the tokens before it alone. So the tokens of all batches of a step, those
that several rows begin with once, are one row of L tokens: embeddings, norms, projections and MLPs, which work token by
token, do no more than they must. Attention, which does not, sees the rows as they are: queries, keys and values are
copied out to B rows of T, padded on the right where no token looks, and its results are copied back. Gradients go the
same way back, and a shared token's keys and values get the sum over its rows, in an order that is always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .forward import Positions, select_positions

ARGUMENT = "token_rows"  # of a forward, which hands it on to its attention
Batch = Mapping[str, Tensor]


class Rows(NamedTuple):
    """Where the L tokens stand in B rows of T.

    slots: (B, T), the token there; any where there is none. owners: (L,), a place of the flattened B*T where each token
    stands. shared: (S,), the tokens that stand at others too, uses: (S, U), which; padding (S, U): where there is none.
    S and U are at least 2, of nothing but padding if need be: of sizes of 0 and 1 torch.compile makes graphs apart.
    """

    slots: Tensor
    owners: Tensor
    shared: Tensor
    uses: Tensor
    padding: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """(1, heads, L, d) -> (B, heads, T, d)."""
        rows = _Spread.apply(x.transpose(1, 2).squeeze(0), *self)
        return rows.unflatten(0, self.slots.shape).transpose(1, 2)

    def collect(self, x: Tensor) -> Tensor:
        """(B, T, heads, d) -> (1, L, heads, d)."""
        return _Collect.apply(x.flatten(0, 1), self.owners).unsqueeze(0)


class _Spread(torch.autograd.Function):
    """x[slots]. A gather in both directions: no sum whose order is left to threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, *rest: Tensor) -> Tensor:
        ctx.save_for_backward(*rest)
        return x.index_select(0, slots.flatten())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        owners, shared, uses, padding = ctx.saved_tensors
        total = grad.index_select(0, owners)
        more = grad.index_select(0, uses.flatten()).unflatten(0, uses.shape)
        more = more.masked_fill(padding[(...,) + (None,) * (grad.dim() - 1)], 0).sum(1)
        return total.index_add(0, shared, more), *[None] * 5


class _Collect(torch.autograd.Function):
    """x[owners], which are all different."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owners: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        ctx.size = x.size(0)
        return x.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (owners,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy(0, owners, grad), None


@dataclass(frozen=True)
class Tree:
    """The L tokens of some batches. ids, positions: (1, L), each token and its place in its rows. places: of each
    batch, (N,), which of the L are its positions that count; targets, sequence_ids: as in `Supervised`, (N,) each.
    padded: positions that the batches have."""

    ids: Tensor
    positions: Tensor
    rows: Rows
    places: dict[str, Tensor]
    targets: dict[str, Tensor]
    sequence_ids: dict[str, Tensor]
    sizes: dict[str, int]
    padded: int

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the model. The mask says nothing: it keeps the model from making one."""
        mask = torch.zeros(1, 1, 1, 1, device=self.ids.device)
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask, ARGUMENT: self.rows}


def grow(batches: Mapping[str, Batch], positions: Mapping[str, Positions], share: bool) -> Tree | None:
    """The tree of all their rows, each from its first token that is no padding to its last position that counts; None
    where no position does. share: False: a token is of one row alone, even where another begins with it.

    Raises what `select_positions` raises.
    """
    ids: list[int] = []
    places: list[int] = []
    children: dict[tuple[int, int], int] = {}  # (token before, or a root; id) -> token, as numbers among the L
    paths: list[list[int]] = []  # of every row, its tokens
    chosen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    at: dict[str, list[int]] = {}
    for kind, given in batches.items():
        batch = {name: value.cpu() for name, value in given.items()}  # a GPU is waited for here, and not below
        rows, _, _ = chosen[kind] = select_positions(batch, positions[kind])
        length = batch["input_ids"].size(1)
        starts, tokens = starts_of(batch), batch["input_ids"].tolist()
        of_row: list[list[int]] = [[] for _ in tokens]
        for row in rows.tolist():
            of_row[row // length].append(row % length)
        at[kind] = []
        for start, own, counted in zip(starts, tokens, of_row, strict=True):
            if not counted:
                continue
            path, before = [], -1 if share else -1 - len(paths)
            for t, token in enumerate(own[start : counted[-1] + 1]):
                before = children.setdefault((before, token), len(ids))
                if before == len(ids):
                    ids.append(token)
                    places.append(t)
                path.append(before)
            paths.append(path)
            at[kind] += [path[t - start] for t in counted]
    if not paths:
        return None
    device = next(iter(batches.values()))["input_ids"].device

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Tree(
        tensor([ids]),
        tensor([places]),
        rows_of(paths, len(ids), tensor),
        {kind: tensor(own) for kind, own in at.items()},
        {kind: targets for kind, (_, targets, _) in chosen.items()},
        {kind: owners for kind, (_, _, owners) in chosen.items()},
        {kind: len(batch["input_ids"]) for kind, batch in batches.items()},
        sum(batch["input_ids"].numel() for batch in batches.values()),
    )


def starts_of(batch: Batch) -> list[int]:
    """Where each row's first real token is."""
    mask = batch.get("attention_mask")
    return [0] * len(batch["input_ids"]) if mask is None else (mask != 0).int().argmax(1).tolist()


def rows_of(paths: Sequence[Sequence[int]], count: int, tensor: Callable[[Any], Tensor]) -> Rows:
    """`Rows` of the tokens of each, of `count` in all."""
    length = max(map(len, paths))
    owners, more = [-1] * count, dict[int, list[int]]()
    for b, path in enumerate(paths):
        for t, token in enumerate(path):
            if owners[token] < 0:
                owners[token] = b * length + t
            else:
                more.setdefault(token, []).append(b * length + t)
    shared = [*more.items(), *[(0, [])] * (2 - len(more))]
    most = max(2, *(len(own) for _, own in shared))
    return Rows(
        slots=tensor([[*path, *[0] * (length - len(path))] for path in paths]),
        owners=tensor(owners),
        shared=tensor([token for token, _ in shared]),
        uses=tensor([[*own, *[0] * (most - len(own))] for _, own in shared]),
        padding=tensor([[0] * len(own) + [1] * (most - len(own)) for _, own in shared]) != 0,
    )
