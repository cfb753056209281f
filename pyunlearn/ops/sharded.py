"""A head sharded over the vocabulary: a DTensor whose rows, one a token id, lie on the ranks of a mesh dimension.

Every rank streams its own columns of the logits. The states of all ranks are gathered in one collective and merged in
rank order, so that every rank has the same bits; in backward every rank makes its columns of d(logits) and the gradient
of its own shard, and one all-reduce adds up d(hidden).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import is_sharded, local, whole


@dataclass(frozen=True)
class Columns:
    """The columns of the logits that are made here: `count` from `first` on."""

    first: int
    count: int
    vocabulary: int
    most: int  # columns of the rank that makes most
    group: Any = None  # the ranks that make the others; None: all are made here
    layout: tuple[Any, ...] = ()  # (mesh, placements) of a head that is a DTensor

    @staticmethod
    def all(vocabulary: int, layout: tuple[Any, ...] = ()) -> Columns:
        return Columns(0, vocabulary, vocabulary, vocabulary, layout=layout)

    @staticmethod
    def of(weight: Any, whole: bool = False) -> Columns:
        """Those of a head (V, H), plain or a DTensor; `whole`: all of them whatever it is. Raises ValueError."""
        if not is_sharded(weight):
            return Columns.all(weight.size(0))
        from torch.distributed.tensor import Shard

        layout = mesh, placements = layout_of(weight)
        over = [i for i, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
        if len(over) != 1 or not all(p.is_replicate() for i, p in enumerate(placements) if i not in over):
            raise ValueError(
                f"weight: needs Shard(0) on one mesh dimension and Replicate() on others, got {in_words(layout)}"
            )
        vocabulary = weight.size(0)
        most = -(-vocabulary // mesh.size(over[0]))
        first = min(most * mesh.get_local_rank(over[0]), vocabulary)
        count, rows = min(most, vocabulary - first), local(weight).size(0)
        if rows != count:
            raise ValueError(f"weight: needs {count} of its {vocabulary} rows on this rank, in even chunks, got {rows}")
        if whole:
            return Columns.all(vocabulary, layout)
        return Columns(first, count, vocabulary, most, mesh.get_group(over[0]), layout)

    def rows(self, name: str, tensor: Any) -> Tensor:
        """What is needed here of a tensor (V, ...) laid out as the head is. Raises ValueError."""
        if layout_of(tensor) != self.layout:
            raise ValueError(
                f"{name}: needs the layout of weight, {in_words(self.layout)}; got {in_words(layout_of(tensor))}"
            )
        if not self.layout:
            return tensor
        return whole(tensor) if self.group is None else tensor.to_local(grad_placements=tensor.placements)

    def frozen_rows(self, name: str, tensor: Any) -> Tensor:
        """The same for what takes no gradient, which may also be whole on every rank."""
        return self.rows(name, tensor) if is_sharded(tensor) else tensor[self.first : self.first + self.count]

    def replica(self, name: str, tensor: Any) -> Tensor:
        """The plain tensor behind what is the same on every rank. Raises ValueError."""
        if not is_sharded(tensor):
            return tensor
        mesh, placements = layout_of(tensor)
        if mesh not in self.layout or not all(placement.is_replicate() for placement in placements):
            raise ValueError(
                f"{name}: needs a plain tensor, or Replicate() over the mesh of weight, {in_words(self.layout)}; "
                f"got {in_words((mesh, placements))}"
            )
        return tensor.to_local(grad_placements=placements)

    def gather(self, state: Tensor) -> Tensor:
        """The states (rows, parts, fields) of all ranks, as parts in rank order."""
        if self.group is None or state.numel() == 0:
            return state
        states = state.new_empty(self.group.size() * state.size(0), *state.shape[1:])
        torch.distributed.all_gather_into_tensor(states, state, group=self.group)
        filled = -(-self.vocabulary // self.most)  # ranks behind these have no column
        return states.unflatten(0, (-1, state.size(0)))[:filled].transpose(0, 1).flatten(1, 2)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None and partial.numel() > 0:
            torch.distributed.all_reduce(partial, group=self.group)
        return partial


def layout_of(tensor: Any) -> tuple[Any, ...]:
    return (tensor.device_mesh, tuple(tensor.placements)) if is_sharded(tensor) else ()


def in_words(layout: tuple[Any, ...]) -> str:
    return f"{layout[1]} over a mesh of shape {tuple(layout[0].shape)}" if layout else "a plain tensor"
