"""Forget rows beside retain rows and refusals: what one step of an unlearning run needs."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyunlearn.data.rows import brief
from pyunlearn.data.tokenise import IGNORE_INDEX, QADataset, collate

ROLES = ("forget", "retain")
Row = Mapping[str, Any]


class ForgetRetainDataset(Dataset):
    """Item i is forget row i with a retain row, and with refusals of either question where asked.

    `[i]` -> {"forget": row, "retain": row, "forget_refusal": row, "retain_refusal": row}, the last three only if there
    is a retain set and if `refuse` names the role. A row is a QADataset row; a refusal's "index" is its question's.

    retain: rows come from one endless stream of seeded shuffles, epoch e taking up where e - 1 stopped, so that every
        retain row is seen equally often however much larger the retain set is. None for forget rows alone.
    refusals: texts, drawn afresh for each (seed, epoch, index); with fixed_refusals each question keeps the refusal of
        epoch 0 in all epochs (what a cached reference needs: see `refusal`).
    refuse: any of "forget", "retain".
    pad_to: pads every row to this many tokens, as code bases do whose losses count padding; None: to the longest of its
        kind in the batch.
    together: by kind, further rows of the forget questions, as many of each, those of question i from i * N on: an item
        has all N of its question in a list, and so has the batch.
    apart: the same, of which an item has one. The data set is then N times as long: item i is forget row
        i % len(forget) with the i // len(forget)-th of its rows.

    Everything is a function of (seed, epoch, i), whatever the number of dataloader workers; the epoch is in shared
    memory, so that set_epoch reaches workers that are already running.

    Raises ValueError for refusals missing or unused, an unknown role, a row longer than pad_to, or a refusal that would
    exceed max_length or pad_to.
    """

    def __init__(
        self,
        forget: QADataset,
        retain: QADataset | None = None,
        *,
        refusals: Sequence[str] | None = None,
        refuse: Sequence[str] = (),
        fixed_refusals: bool = False,
        seed: int = 0,
        pad_to: int | None = None,
        together: Mapping[str, Sequence[Row]] | None = None,
        apart: Mapping[str, Sequence[Row]] | None = None,
    ):
        unknown = sorted(set(refuse) - set(ROLES))
        if unknown:
            raise ValueError(f"refuse must name roles of {ROLES}, got {unknown[0]!r}")
        if "retain" in refuse and retain is None:
            raise ValueError("refuse names 'retain', but retain is None")
        if refuse and not refusals:
            raise ValueError(f"refuse={tuple(refuse)} needs refusals, got {refusals!r}")
        self.forget, self.retain = forget, retain
        self.refusals = list(refusals or ())
        self.refuse = tuple(role for role in ROLES if role in refuse)
        self.fixed_refusals = fixed_refusals
        self.seed = seed
        self.pad_to = pad_to
        self.together, self.apart = dict(together or {}), dict(apart or {})
        for kind, own in {**self.together, **self.apart}.items():
            if not own or len(own) % len(forget):
                raise ValueError(
                    f"{kind}: has {len(own)} rows, needs as many of each of {len(forget)} forget questions"
                )
        copies = {kind: len(rows) // len(forget) for kind, rows in self.apart.items()}
        if len(set(copies.values())) > 1:
            raise ValueError(f"apart: needs as many rows of every kind, got of a question {copies}")
        self.copies = next(iter(copies.values()), 1)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if pad_to is not None:
            for rows in filter(None, (forget, retain)):
                longest = max(len(rows[i]["input_ids"]) for i in range(len(rows)))
                if longest > pad_to:
                    raise ValueError(f"pad_to={pad_to}: needs at least the longest row's {longest} tokens")
        for role in self.refuse:
            self._check_refusals(self._rows(role))

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose retain rows and refusals `[i]` gives; trainers call this."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.forget) * self.copies

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index = int(index) % len(self)
        return self.pair(index % len(self.forget), self.epoch * len(self) + index)

    def pair(self, index: int, place: int) -> dict[str, Any]:
        """Forget row `index` as `[index]` gives it, beside the retain row at `place` of the stream (0, 1, ...)."""
        item: dict[str, Any] = {"forget": self.forget[index]}
        if self.retain is not None:
            block, at = divmod(place, len(self.retain))
            item["retain"] = self.retain[_shuffled(len(self.retain), self.seed, block)[at]]
        for role in self.refuse:
            item[f"{role}_refusal"] = self._refusal_row(role, item[role]["index"])
        for kind, rows in self.together.items():
            count = len(rows) // len(self.forget)
            item[kind] = list(rows[index * count : (index + 1) * count])
        for kind, rows in self.apart.items():
            item[kind] = rows[index * self.copies + place // len(self.forget) % self.copies]
        return item

    def refusal(self, role: str, index: int) -> str:
        """The refusal that question `index` of `role` gets: in this epoch, or in all of them with fixed_refusals.

        With fixed_refusals, `QADataset(forget.items, tokenizer, max_length, answers=[pairs.refusal("forget", i) for i
        in range(len(forget))])` holds the very rows this dataset gives, for a reference cache.
        """
        if not self.refusals:
            raise ValueError("this dataset was made without refusals")
        epoch = 0 if self.fixed_refusals else self.epoch
        return random.Random(f"{self.seed}/{epoch}/{role}/{index}").choice(self.refusals)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
        """Batch each kind of row: the items' keys, each with what `pyunlearn.data.collate` gives."""
        if not items:
            raise ValueError("items is empty: nothing to collate")
        pad = self.forget.pad_token_id
        return {kind: collate(flat([item[kind] for item in items]), pad, self.pad_to) for kind in items[0]}

    def _rows(self, role: str) -> QADataset:
        rows = self.forget if role == "forget" else self.retain
        if rows is None:
            raise ValueError(f"there are no {role} rows")
        return rows

    def _refusal_row(self, role: str, index: int) -> dict[str, Any]:
        rows = self._rows(role)
        question, refusal = rows.items[index].question, self.refusal(role, index)
        encoded = rows.prompt_format.encode(question, refusal, rows.max_length)
        return {**rows.row(question, refusal, encoded), "index": index}

    def _check_refusals(self, rows: QADataset) -> None:
        """Any refusal may meet any question, so the longest of both must fit: found now, not in some later epoch."""
        limits = [limit for limit in (rows.max_length, self.pad_to) if limit is not None]
        if not limits:
            return
        prompts = [int((rows[i]["labels"] == IGNORE_INDEX).sum()) for i in range(len(rows))]
        question = rows.items[prompts.index(max(prompts))].question
        replies = [rows.prompt_format.encode(question, refusal) for refusal in self.refusals]
        longest = max(range(len(replies)), key=lambda i: len(replies[i].input_ids))
        length = len(replies[longest].input_ids)
        if length > min(limits):
            raise ValueError(
                f"refusal {brief(self.refusals[longest])} to {brief(question)} has {length} tokens, more than the "
                f"limit of {min(limits)}; raise max_length (or pad_to) or leave the refusal out"
            )


def flat(rows: Sequence[Any]) -> list[Row]:
    """Rows, and those of lists of rows, in their order."""
    return [each for row in rows for each in (row if isinstance(row, list) else [row])]


@functools.lru_cache(maxsize=8)
def _shuffled(count: int, seed: int, block: int) -> list[int]:
    """The block-th shuffle of range(count) in the stream of retain rows."""
    order = list(range(count))
    random.Random(f"{seed}/{block}/retain").shuffle(order)
    return order
