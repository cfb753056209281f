"""From question and answer to token ids, with an exact boundary between prompt and supervised answer."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import jinja2
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pyunlearn.data.qa import QA
from pyunlearn.data.rows import brief, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
# Values some templates read: without them Llama 3 writes today's date into the prompt, so that tomorrow's tokens
# differ, and Qwen 3 opens a chain of thought that no answer here has.
TEMPLATE_VALUES = {"date_string": "26 Jul 2024", "enable_thinking": False}
PROBE = "pyunlearnprobe"  # an answer that stands for any
RENDER_SECONDS = 10.0  # templates take milliseconds; one from elsewhere may have no end


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + answer, and labels: -100 on the prompt, the ids themselves on the answer and its end.

    num_cut: tokens of the answer that were cut off.
    """

    input_ids: list[int]
    labels: list[int]
    num_cut: int = 0


class PromptFormat:
    """How a question is put to a model: by the tokenizer's chat template if it has one, else `Question: ...\\nAnswer:`.

    The prompt's tokens are the same with and without an answer after them, so that what is supervised is what the
    model would generate: the answer and the token that ends it (the template's end of turn, else EOS). Where the
    template opens something for the model that conversations do not have (a chain of thought), the prompt is the
    conversation up to its answer.

    Raises ValueError for a tokenizer without an EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no EOS token, which has to end every answer; set tokenizer.eos_token")
        self.tokenizer: Any = tokenizer  # its stubs know neither of template values nor of tokenize=False
        self.chat = tokenizer.chat_template is not None
        # A chat template writes its own BOS; otherwise keep the tokens that this tokenizer puts before any text.
        self._opening = [] if self.chat else _opening_ids(tokenizer)
        self._special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special.add(tokenizer.eos_token)

    def prompt(self, question: str) -> str:
        """The text before the answer. Raises ValueError for a lone surrogate, or if the chat template fails."""
        check_text(question, f"question {brief(question)}:")
        if not self.chat:
            return f"Question: {question.strip()}\nAnswer:"
        turn = {"role": "user", "content": question.strip()}
        prompt = self._render([turn], add_generation_prompt=True)
        conversation = self._render([turn, {"role": "assistant", "content": PROBE}])
        before, probe, _ = conversation.rpartition(PROBE)
        return before if probe and not conversation.startswith(prompt) else prompt

    def prompt_ids(self, question: str) -> list[int]:
        """Token ids of the prompt, opening tokens included: what generation starts from."""
        return self._opening + self._ids(self.prompt(question))

    def encode(self, question: str, answer: str, max_length: int | None = None) -> Encoded:
        """Token ids and labels of one pair.

        Raises ValueError if it is longer than max_length (nothing is ever cut off), if the answer is empty, for a lone
        surrogate, or if the chat template writes the answer in another way, or another text before it than before other
        answers.
        """
        answer = answer.strip()
        if not answer:
            raise ValueError(f"the answer to {brief(question)} is empty")
        check_text(answer, f"the answer to {brief(question)}")
        prompt = self.prompt(question)
        reply = self._chat_reply(question, prompt, answer) if self.chat else f" {answer}"
        prompt_ids, reply_ids = self._split_ids(prompt, reply)
        if not (self.chat and any(reply.endswith(token) for token in self._special)):
            reply_ids = [*reply_ids, self.tokenizer.eos_token_id]
        prompt_ids = self._opening + prompt_ids
        encoded = Encoded(prompt_ids + reply_ids, [IGNORE_INDEX] * len(prompt_ids) + reply_ids)
        _check_length(encoded, max_length, "the sample", question)
        return encoded

    def _split_ids(self, prompt: str, reply: str) -> tuple[list[int], list[int]]:
        """Token ids of each. Those made in one go are the natural ones (SentencePiece adds a space to each call); where
        a token would straddle the boundary, the two sides are made apart."""
        prompt_ids, joint_ids = self._ids(prompt), self._ids(prompt + reply)
        straddles = joint_ids[: len(prompt_ids)] != prompt_ids
        return prompt_ids, self._ids(reply) if straddles else joint_ids[len(prompt_ids) :]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        try:
            with time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_chat_template(turns, tokenize=False, **options, **TEMPLATE_VALUES)
        except ImportError:
            raise
        except Exception as error:  # a template is a program: anything may be raised in it
            kind = "" if isinstance(error, jinja2.TemplateError | TimeoutError) else f"{type(error).__name__}: "
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} fails on a "
                f"{'/'.join(t['role'] for t in turns)} chat: {kind}{error}"
            ) from None

    def _chat_reply(self, question: str, prompt: str, answer: str) -> str:
        """The text from the end of the prompt to the end of the assistant's turn."""
        turns = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer}]
        conversation = self._render(turns)
        advice = "give the tokenizer another chat_template, or chat_template = None for 'Question: ...\\nAnswer:'"
        if not conversation.startswith(prompt):
            raise ValueError(
                "what the chat template writes before an answer depends on the answer, so answers cannot be told from "
                f"prompts: the prompt ends in {prompt[-60:]!r}, the conversation in {conversation[-60:]!r}; {advice}"
            )
        reply = conversation[len(prompt) :]
        start = len(reply) - len(reply.lstrip())
        if not reply.startswith(answer, start):
            raise ValueError(
                f"the chat template puts {reply[:60]!r} after its prompt, not the answer {answer[:60]!r}; {advice}"
            )
        # The turn ends with the first special token after the answer; what follows (a line break) is never generated.
        tail = reply[start + len(answer) :]
        ends = [tail.index(token) + len(token) for token in self._special if token in tail]
        return reply[: start + len(answer) + min(ends)] if ends else reply.rstrip()


class PlainFormat(PromptFormat):
    """A question is the prompt as it stands, by no template, and no token ends its answer: for texts to be gone on
    with, and for texts that are read as a whole.

    An answer follows its prompt after one space, white space at the prompt's end aside; after an empty prompt it stands
    as it is. longest: most tokens of an answer, total: of it and its prompt; the rest of the answer is cut off. None of
    both cuts none. around: the text that a question stands in, at "{}".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        longest: int | None = None,
        total: int | None = None,
        around: str = "{}",
    ):
        super().__init__(tokenizer)
        self.chat, self.longest, self.total, self.around = False, longest, total, around
        self._opening = _opening_ids(tokenizer)

    def prompt(self, question: str) -> str:
        """The question in what is around it. Raises ValueError for a lone surrogate."""
        check_text(question, f"prompt {brief(question)}:")
        return self.around.format(question)

    def encode(self, question: str, answer: str, max_length: int | None = None) -> Encoded:
        """As `PromptFormat.encode`."""
        if not answer.strip():
            raise ValueError(f"the answer to {brief(question)} is empty")
        check_text(answer, f"the answer to {brief(question)}")
        prompt = self.prompt(question).rstrip()
        prompt_ids, reply_ids = self._split_ids(prompt, f" {answer.lstrip()}" if prompt else answer)
        prompt_ids = self._opening + prompt_ids
        room = len(reply_ids) if self.total is None else max(0, self.total - len(prompt_ids))
        kept = reply_ids[: room if self.longest is None else min(self.longest, room)]
        labels = [IGNORE_INDEX] * len(prompt_ids) + kept
        encoded = Encoded(prompt_ids + kept, labels, len(reply_ids) - len(kept))
        _check_length(encoded, max_length, "the sample", question or answer)
        return encoded


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


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a template, rendered inside by this thread, that takes longer.

    Without signals, so in any thread, and none is left running. It is looked at with each call and each piece of text,
    not with each line, which would take longer than the template: loops are over ranges, which the sandbox keeps short,
    or over what is in memory. One call into C is not broken off.
    """
    end, before = time.monotonic() + seconds, sys.gettrace()

    def trace(frame: FrameType, *_: Any) -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"it has not ended after {seconds:g} seconds")

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class QADataset(Dataset):
    """Tokenised pairs. `[i]` -> {"input_ids", "labels"} (int64, 1-d, same length) and "index" (int, = i).

    items: the pairs; answers: what to supervise in place of the items' own answers, one each (refusals, perturbed
    answers, ...). max_length: longest sequence allowed, in tokens (the model's context); None for no limit.
    prompt_format: None is `PromptFormat`. `fingerprint` is a SHA-256 of all token ids and labels; `num_cut` counts the
    answers that the format has cut.

    Raises ValueError if a sample is longer than max_length (which, and how long), for no items, or for a wrong number
    of answers.
    """

    def __init__(
        self,
        items: Sequence[QA],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        answers: Sequence[str] | None = None,
        prompt_format: PromptFormat | None = None,
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
        self.num_cut = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        digest = hashlib.sha256()
        for index, item in enumerate(self.items):
            answer = item.answer if answers is None else answers[index]
            encoded = self.prompt_format.encode(item.question, answer)
            _check_length(encoded, max_length, f"sample {index}", item.question or answer)
            self.num_cut += encoded.num_cut > 0
            row = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
            self._rows.append(row)
            digest.update(len(encoded.labels).to_bytes(8, "little"))
            for tensor in row:
                digest.update(tensor.numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        input_ids, labels = self._rows[index]
        return {"input_ids": input_ids, "labels": labels, "index": int(index) % len(self)}


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int, pad_to: int | None = None) -> dict[str, Tensor]:
    """Stack B rows, right padded to T: input_ids, attention_mask, labels (B, T), index (B,), all int64.

    T is pad_to, or the longest row's length. Padding has attention_mask 0 and labels -100.
    Raises ValueError for no rows, no pad_token_id, or a row longer than pad_to.
    """
    if not rows:
        raise ValueError("rows is empty: nothing to collate")
    if pad_token_id is None:
        raise ValueError("pad_token_id is None; take it from padding_id(tokenizer)")
    ids, labels = [row["input_ids"] for row in rows], [row["labels"] for row in rows]
    longest = max(map(len, ids))
    if pad_to is not None and pad_to < longest:
        raise ValueError(f"pad_to={pad_to}: needs at least the longest row's {longest} tokens")

    def padded(tensors: Sequence[Tensor], value: int) -> Tensor:
        stacked = pad_sequence(list(tensors), batch_first=True, padding_value=value)
        return stacked if pad_to is None else F.pad(stacked, (0, pad_to - longest), value=value)

    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([torch.ones_like(i) for i in ids], 0),
        "labels": padded(labels, IGNORE_INDEX),
        "index": torch.tensor([row["index"] for row in rows], dtype=torch.int64),
    }


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else EOS (labels and attention_mask tell padding apart).

    Raises ValueError if the tokenizer has neither.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        raise ValueError("tokenizer has neither a pad nor an EOS token to pad with; set tokenizer.pad_token")
    return eos if pad is None else pad


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text (BOS, or nothing), whatever it puts after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [s for s in range(len(full) - len(bare) + 1) if full[s : s + len(bare)] == bare]
    return list(full[: starts[0]]) if starts else []


def _check_length(encoded: Encoded, max_length: int | None, which: str, question: str) -> None:
    if max_length is not None and len(encoded.input_ids) > max_length:
        raise ValueError(
            f"{which} (question {brief(question)}) has {len(encoded.input_ids)} tokens with its answer, more than the "
            f"limit of {max_length}; raise max_length up to the model's context, or leave the sample out"
        )
