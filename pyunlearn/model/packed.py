"""Texts with the same prompt go through the model as one row: the prompt once, then what follows it in each.

A token of the row sees what it sees in its own text, by an attention mask of four dimensions, and counts its position
as there, so that a causal model says of it what it says of the text alone. A question with its true, paraphrased and
wrong answers is such a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import collate
from ..ops import TokenStats
from .causal_lm import CausalLM, rotary_limits
from .combined import parts_of
from .forward import IGNORE_INDEX, supervised_stats
from .head import head_stats
from .prefix import WORTH
from .tap import Tap

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # in configurations: a mask of ours has none
LONGEST = 4096  # tokens of a row of several texts: its mask has the square of that
LOGP_TOLERANCE = 1e-3  # nats, and 16 roundings of the dtype: what sharing may change
Row = Mapping[str, Tensor]


@dataclass(frozen=True)
class Packed:
    """B rows of L tokens that hold R texts. inputs: input_ids and position_ids (B, L), attention_mask (B, 1, L, L),
    added to the scores. places: (N,) int64, of the flattened B*L, where the N scored tokens are predicted, text after
    text; targets: (N,) int64, these tokens; sequence_ids: (N,) int64, whose they are, in [0, R)."""

    inputs: dict[str, Tensor]
    places: Tensor
    targets: Tensor
    sequence_ids: Tensor

    def stats(self, lm: CausalLM, outputs: Sequence[str]) -> TokenStats:
        """Of every scored token, as `supervised_stats` gives them for the texts as rows of their own."""
        lm.check_head()
        device = lm.device
        tap = Tap(lm, ())
        tap.run({name: value.to(device) for name, value in self.inputs.items()})
        hidden = tap.at(tap.last, self.places, self.inputs["input_ids"].shape)
        return head_stats(lm.read_head(), hidden, self.targets.to(hidden.device), outputs)


def prompt_length(row: Row) -> int:
    """Tokens before the first scored one, at least one."""
    return int((row["labels"][1:] != IGNORE_INDEX).nonzero()[0]) + 1


def scored_length(row: Row) -> int:
    """Tokens up to the last scored one: what follows is predicted by it, and by nothing."""
    return int((row["labels"] != IGNORE_INDEX).nonzero()[-1])


def by_prompt(rows: Sequence[Row], most: int) -> list[list[int]]:
    """Places of rows with the same prompt, in the order of the first of each: together at most so many, and no more
    than make a row of LONGEST tokens."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for i, row in enumerate(rows):
        own = groups.setdefault(tuple(row["input_ids"][: prompt_length(row)].tolist()), [[]])
        if own[-1] and (len(own[-1]) >= most or packed_length([rows[j] for j in [*own[-1], i]]) > LONGEST):
            own.append([])
        own[-1].append(i)
    return [group for own in groups.values() for group in own]


def packed_length(rows: Sequence[Row]) -> int:
    """Tokens of the row that rows with one prompt make."""
    prompt = prompt_length(rows[0])
    return prompt + sum(scored_length(row) - prompt for row in rows)


def reason_not_to_pack(lm: CausalLM, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> str | None:
    """Why the prompts of `groups` are not shared, as far as that can be told without a forward; None: they may be."""
    if parts_of(lm) is not None:
        return f"the logits of {lm.name} are of two models"
    longest = max(len(row["input_ids"]) for row in rows)
    total = sum(map(scored_length, rows))
    spared = total - sum(packed_length([rows[i] for i in group]) for group in groups)
    if spared < WORTH * total:
        return f"sharing prompts spares {spared} of {total} tokens, under a tenth"
    if any(longest > limit for _, limit in rotary_limits(lm.config)):
        return f"the rotary factors of {lm.name} depend on the length of a sequence"
    if "position_ids" not in inspect.signature(lm.inner.forward).parameters:
        return f"the forward of {lm.name} has no argument position_ids"
    for name in WINDOWS:
        if (window := getattr(lm.config, name, None)) and longest > window:
            return f"texts of {longest} tokens are longer than the {name} of {lm.name}, {window}"
    return None


def pack(groups: Sequence[Sequence[Row]], dtype: torch.dtype) -> Packed:
    """Each group, rows with the same prompt, as one row. dtype: of the attention mask, the model's."""
    length = max(packed_length(group) for group in groups)
    ids = torch.zeros(len(groups), length, dtype=torch.int64)
    position, text = torch.zeros_like(ids), torch.full_like(ids, -1)  # text: 0 is the prompt, -1 padding
    places, targets, owners = [], [], []
    count = 0
    for b, group in enumerate(groups):
        prompt = end = prompt_length(group[0])
        ids[b, :prompt], position[b, :prompt], text[b, :prompt] = (
            group[0]["input_ids"][:prompt],
            torch.arange(prompt),
            0,
        )
        for j, row in enumerate(group, 1):
            last = scored_length(row)
            begin, end = end, end + last - prompt
            ids[b, begin:end] = row["input_ids"][prompt:last]
            position[b, begin:end], text[b, begin:end] = torch.arange(prompt, last), j
            scored = (row["labels"][1:] != IGNORE_INDEX).nonzero()[:, 0]  # where each is predicted, in its text
            places.append(b * length + torch.where(scored < prompt, scored, scored - prompt + begin))
            targets.append(row["labels"][scored + 1])
            owners.append(torch.full_like(scored, count))
            count += 1
    before = torch.ones(length, length, dtype=torch.bool).tril()
    seen = before & ((text[:, None, :] == 0) | (text[:, None, :] == text[:, :, None]))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    inputs = {"input_ids": ids, "position_ids": position, "attention_mask": mask.unsqueeze(1)}
    return Packed(inputs, torch.cat(places), torch.cat(targets), torch.cat(owners))


def reason_from_trial(lm: CausalLM, group: Sequence[Row]) -> str | None:
    """Why a group of rows with one prompt has to go through the model a row a text, by trying both; None: it has not.

    Tried on the first and the last text, before which all the others stand. Models that take no mask of four
    dimensions, or do not keep to it and to the positions, fail here in ways of their own.
    """
    dtype = lm.inner.get_input_embeddings().weight.dtype
    ends = [group[0], group[-1]]
    try:
        texts = pack([group], dtype)
        logp: Any = texts.stats(lm, ("logp",)).logp.cpu()
        packed = torch.cat([logp[texts.sequence_ids == place] for place in (0, len(group) - 1)])
    except Exception as error:
        return f"{lm.name} does not take texts that share a row ({type(error).__name__})"
    batch = {name: value.to(lm.device) for name, value in collate(ends, 0).items()}
    alone = supervised_stats(lm, batch, ("logp",))[0].logp.cpu()
    if not torch.allclose(packed, alone, rtol=0, atol=LOGP_TOLERANCE + 16 * torch.finfo(dtype).eps):
        return f"the likelihoods of {lm.name} are others for texts that share a row"
    return None
