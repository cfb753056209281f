"""Labels that a model would give which had never been taught the forget text (Who's Harry Potter?)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import read_json
from .._hints import path_hint
from ..data import QA, QADataset, collate
from ..data.prompt_format import IGNORE_INDEX
from ..data.rows import brief
from ..data.tokenise import token_texts
from ..model.causal_lm import CausalLM, eval_mode
from ..model.forward import combined_logits, length_batches, supervised_hidden


def generic_rows(
    base: Any,
    reinforced: Any,
    rows: QADataset,
    tokenizer: Any,
    strength: float,
    anchors: Mapping[str, str] | None = None,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """The rows with other labels: argmax v at every supervised token, v = v_base - a ReLU(v_reinforced - v_base).

    strength: a. anchors: terms, and the generic counterparts that stand in their place in the text of which the labels
    are made; a label belongs to the token that begins where its own does, and tokens inside of a term get none.

    Eldan and Russinovich, Who's Harry Potter?, 2023, Section 2. Raises ValueError for a row that is left without any.
    """
    sources = [rows[i] for i in range(len(rows))]
    if anchors:
        items = [QA(replaced(item.question, anchors), replaced(item.answer, anchors)) for item in rows.items]
        translated = QADataset(items, tokenizer, rows.max_length, prompt_format=rows.prompt_format)
        sources = [translated[i] for i in range(len(rows))]
    labels = likeliest(base, reinforced, sources, rows.pad_token_id, strength, batch_size)
    made = []
    for i, found in enumerate(labels):
        row = rows[i]
        if anchors:
            found = found[aligned(tokenizer, row["input_ids"], sources[i]["input_ids"], anchors)]
        made.append({**row, "labels": torch.where(row["labels"] == IGNORE_INDEX, IGNORE_INDEX, found)})
        if not bool((made[i]["labels"][1:] != IGNORE_INDEX).any()):
            raise ValueError(f"whp: no token of {brief(rows.items[i].answer)} has a label, {anchors} leave none")
    return made


def likeliest(
    base: Any, reinforced: Any, rows: Sequence[Mapping[str, Tensor]], pad: int, strength: float, batch_size: int
) -> list[Tensor]:
    """Of each row (T,) int64: argmax v at its supervised tokens, -100 elsewhere."""
    one, two = CausalLM.of(base), CausalLM.of(reinforced)
    found = [torch.full_like(row["labels"], IGNORE_INDEX) for row in rows]
    with eval_mode(one.given), eval_mode(two.given), torch.no_grad():
        for batch in length_batches([len(row["labels"]) for row in rows], batch_size):
            inputs = {name: value.to(one.device) for name, value in collate([rows[i] for i in batch], pad).items()}
            seen = supervised_hidden(one, inputs)
            best = torch.cat([v.argmax(-1).cpu() for v, _ in combined_logits(one, two, strength, seen, inputs)])
            for place, own in enumerate(best.split(torch.bincount(seen.sequence_ids, minlength=len(batch)).tolist())):
                labels = rows[batch[place]]["labels"]
                at = 1 + (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
                found[batch[place]][at] = own
    return found


def read_anchors(path: str | Path | None) -> dict[str, str] | None:
    """Terms and their counterparts, of a JSON file. Raises FileNotFoundError, and ValueError that names the file."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"unlearn.reinforce.anchors: no such file: {path}{path_hint(Path(path))}")
    anchors = read_json(path, "write it as {term: generic counterpart}")
    if (
        not isinstance(anchors, dict)
        or not anchors
        or not all(isinstance(v, str) and k and v for k, v in anchors.items())
    ):
        raise ValueError(f"{path}: needs an object of {{term: generic counterpart}}, strings that are not empty")
    return anchors


def pattern_of(anchors: Mapping[str, str]) -> re.Pattern[str]:
    """Any of the terms as a whole word, the longest first."""
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(anchors, key=len, reverse=True)))})(?!\w)")


def replaced(text: str, anchors: Mapping[str, str]) -> str:
    return pattern_of(anchors).sub(lambda match: anchors[match[0]], text)


def aligned(tokenizer: Any, ids: Tensor, others: Tensor, anchors: Mapping[str, str]) -> Tensor:
    """Of each token of a row the place in the row with anchors replaced of the token that begins where it does; the
    first place, which has no label, where none does."""
    starts, text = starts_of(tokenizer, ids)
    theirs, wanted = starts_of(tokenizer, others)
    if replaced(text, anchors) != wanted:
        raise ValueError(
            f"whp: with {anchors} {brief(text)} becomes {brief(wanted)}: a term is in the prompt's own words"
        )
    matches = list(pattern_of(anchors).finditer(text))
    places, found = {start: i for i, start in enumerate(theirs)}, []
    for start, nth in starts:
        inside = any(match.start() < start < match.end() for match in matches)
        moved = sum(len(anchors[match[0]]) - len(match[0]) for match in matches if match.end() <= start)
        found.append(0 if inside else places.get((start + moved, nth), 0))
    return torch.tensor(found)


def starts_of(tokenizer: Any, ids: Tensor) -> tuple[list[tuple[int, int]], str]:
    """Where each token begins in the text of all, white space before a word left out, and which it is of those that
    begin there; and that text."""
    pieces = token_texts(tokenizer, ids.tolist())
    starts: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        start = at + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)
        starts.append((start, sum(start == other for other, _ in starts)))
        at += len(piece)
    return starts, "".join(pieces)
