"""Data sets of token ids and labels, batches of them, and the text of every token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from .prompt_format import IGNORE_INDEX, Encoded, PromptFormat, check_length
from .qa import QA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QADataset(Dataset):
    """Tokenised pairs. `[i]` -> {"input_ids", "labels"} (int64, 1-d, same length) and "index" (int, = i).

    text_mask: rows have "text_mask" too, 1 where a token is of the question or the answer and 0 where it is of the
    prompt's format (`PromptFormat.text_mask`): for objectives at `template_free` positions.

    items: the pairs; answers: what to supervise in place of the items' own answers, one each (refusals, perturbed
    answers, ...). max_length: longest sequence allowed, in tokens (the model's context); None for no limit.
    prompt_format: None is `PromptFormat`. `fingerprint` is a SHA-256 of all token ids and labels; `num_cut` counts the
    answers that the format has cut, `num_apart` those that were tokenised apart from their prompt (`Encoded.apart`),
    which the format tells once.

    Raises ValueError if a sample is longer than max_length (which, and how long), for no items, for a wrong number
    of answers, and with text_mask as that.
    """

    def __init__(
        self,
        items: Sequence[QA],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        answers: Sequence[str] | None = None,
        prompt_format: PromptFormat | None = None,
        text_mask: bool = False,
    ):
        if not items:
            raise ValueError("items is empty: a dataset needs at least one question-answer pair")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be a positive number of tokens or None, got {max_length}")
        if answers is not None and len(answers) != len(items):
            raise ValueError(f"answers has {len(answers)} entries for {len(items)} items; give one each")
        self.items = list(items)
        self.max_length = max_length
        self.prompt_format = PromptFormat(tokenizer) if prompt_format is None else prompt_format
        self.pad_token_id = padding_id(tokenizer)
        self.num_cut = self.num_apart = 0
        self.text_mask = text_mask
        self._rows: list[dict[str, Tensor]] = []
        digest = hashlib.sha256()
        for index, item in enumerate(self.items):
            answer = item.answer if answers is None else answers[index]
            encoded = self.prompt_format.encode(item.question, answer)
            check_length(encoded, max_length, f"sample {index}", item.question or answer)
            self.num_cut += encoded.num_cut > 0
            self.num_apart += encoded.apart
            row = self.row(item.question, answer, encoded)
            self._rows.append(row)
            digest.update(len(encoded.labels).to_bytes(8, "little"))
            for name in ("input_ids", "labels"):
                digest.update(row[name].numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()
        self.prompt_format.tell_apart(self.num_apart, len(self.items))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        return {**self._rows[index], "index": int(index) % len(self)}

    def row(self, question: str, answer: str, encoded: Encoded) -> dict[str, Tensor]:
        """The tensors of this pair, encoded."""
        row = {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
        if self.text_mask:
            row["text_mask"] = torch.tensor(self.prompt_format.text_mask(question, answer, encoded))
        return row


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to: int | None = None) -> dict[str, Tensor]:
    """Stack B rows, right padded to T: input_ids, attention_mask, labels (B, T), index (B,), all int64; and text_mask
    (B, T) where all rows have one.

    T is pad_to, or the longest row's length. Padding has attention_mask 0, labels -100 and text_mask 0.
    Raises ValueError for no rows, no pad_token_id, or a row longer than pad_to.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to collate")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; take it from padding_id(tokenizer)")
    if missing := [key for key in ("input_ids", "labels", "index") if any(key not in row for row in rows)]:
        raise ValueError(
            f"rows: have no {missing[0]!r}; needs those of a QADataset as they are (of transformers' Trainer: "
            "remove_unused_columns=False)"
        )
    ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    longest = max(map(len, ids))
    if pad_to is not None and pad_to < longest:
        raise ValueError(f"pad_to={pad_to}: needs at least the longest row's {longest} tokens")

    def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
        stacked = pad_sequence(list(tensors), batch_first=True, padding_value=value)
        return stacked if pad_to is None else F.pad(stacked, (0, pad_to - longest), value=value)

    batch = {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([torch.ones_like(i) for i in ids], 0),
        "labels": padded(labels, IGNORE_INDEX),
        "index": torch.tensor([row["index"] for row in rows], dtype=torch.int64),
    }
    if all("text_mask" in row for row in rows):
        batch["text_mask"] = padded([row["text_mask"] for row in rows], 0)
    return batch


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else EOS (labels and attention_mask tell padding apart).

    Raises ValueError if the tokenizer has neither.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        raise ValueError("tokenizer has neither a pad nor an EOS token to pad with; set tokenizer.pad_token")
    return eos if pad is None else pad


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of every token, as it reads in its place: joined they are the text of all, special tokens written out.

    Of a character that several tokens make, the last one has the text, and the others have none.
    """
    # Decoded with what stands before it: alone, SentencePiece's tokens lose their space, and parts of a character are
    # all the same replacement.
    texts: list[str] = []
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, now = _decoded(tokenizer, ids[start:done]), _decoded(tokenizer, ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            start, done = done, end
    return texts


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
