"""The caller's batches as samples, and these in new batches of similar length that every forward shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._hints import check_known
from ..data import collate
from ..model.forward import IGNORE_INDEX, length_batches, select_positions

KEYS = ("input_ids", "attention_mask", "labels", "index")
Labels = Literal["answers", "all"]
LABELS = get_args(Labels)


@dataclass(frozen=True)
class Samples:
    """Samples in the caller's order, and right-padded batches of them: longest first, the same in every forward.

    rows: {"input_ids", "labels", "index"} of each sample, without padding. members[j]: the samples of batches[j].
    owners[j]: (N_j,) int64, the sample of each scored token of batch j. num_tokens: (n,) int64, scored tokens.
    """

    rows: list[dict[str, Any]]
    batches: list[dict[str, Tensor]]
    members: list[list[int]]
    owners: list[Tensor]
    num_tokens: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def per_sample(self, values: Tensor, batches: Iterable[int]) -> Tensor:
        """(n,) float64: sums of what the scored tokens of these batches have, (N,), in order, on the CPU."""
        owners = torch.cat([self.owners[j] for j in batches])
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, owners, values)


def scored_rows(rows: Any, labels: Labels = "answers") -> list[dict[str, Any]]:
    """The rows of a data set with what MRD scores as their labels: "answers", as they are; "all", every token, which is
    x_1 .. x_n of arXiv:2504.06658. Raises ValueError for other labels.
    """
    check_known("labels", labels, LABELS)
    return [rows[i] | ({"labels": rows[i]["input_ids"]} if labels == "all" else {}) for i in range(len(rows))]


def make_samples(batches: Iterable[Mapping[str, Tensor]], batch_size: int, device: torch.device) -> Samples:
    """Takes batches apart, drops padding, and batches anew. Raises TypeError or ValueError; the message names where."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: needs an iterable of batches (dicts of tensors), got {type(batches).__name__}")
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches):
        for place, (ids, labels) in enumerate(unpadded(batch, f"batches[{number}]")):
            if not bool((labels[1:] != IGNORE_INDEX).any()):
                raise ValueError(
                    f"batches[{number}]: row {place} has no scored token: all labels after its first token are "
                    f"{IGNORE_INDEX} or padding"
                )
            rows.append({"input_ids": ids, "labels": labels, "index": len(rows)})
    if not rows:
        raise ValueError("batches: is empty, needs at least one sample")
    members = length_batches([len(row["input_ids"]) for row in rows], batch_size)
    padded = [collate([rows[i] for i in batch], 0) for batch in members]
    owners = [torch.tensor(batch)[select_positions(inputs)[2]] for batch, inputs in zip(members, padded, strict=True)]
    num_tokens = torch.bincount(torch.cat(owners), minlength=len(rows))
    moved = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in padded]
    return Samples(rows, moved, members, owners, num_tokens)


def unpadded(batch: Mapping[str, Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of every row, on the CPU, where attention_mask is not 0."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"{where}: needs a dict of tensors, got {type(batch).__name__}")
    unknown = sorted(set(batch) - set(KEYS))
    if unknown:
        raise ValueError(f"{where}: key {unknown[0]!r} is not supported; needs input_ids, attention_mask and labels")
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor) or batch[name].dim() != 2:
            got = batch.get(name)
            came = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise ValueError(f"{where}[{name!r}]: needs a tensor of shape (B, T), got {came}")
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask.cpu()
    for name, tensor in (("labels", labels), ("attention_mask", mask)):
        if tensor.shape != ids.shape:
            raise ValueError(
                f"{where}[{name!r}]: needs the shape of input_ids {tuple(ids.shape)}, got {tuple(tensor.shape)}"
            )
    rows = []
    for place, real in enumerate(mask != 0):
        inside = real.nonzero().squeeze(-1)
        if len(inside) and int(inside[-1] - inside[0]) + 1 != len(inside):
            raise ValueError(f"{where}['attention_mask']: row {place} has a gap; needs padding at the ends only")
        rows.append((ids[place][real], labels[place][real]))
    return rows
