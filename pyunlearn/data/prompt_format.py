"""From question and answer to token ids, with an exact boundary between prompt and supervised answer."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any

import jinja2

from .prompts import PROMPTS, Prompt
from .rows import brief, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("pyunlearn")
IGNORE_INDEX = -100
# Values some templates read: without them Llama 3 writes today's date into the prompt, so that tomorrow's tokens
# differ, and Qwen 3 opens a chain of thought that no answer here has.
TEMPLATE_VALUES = {"date_string": "26 Jul 2024", "enable_thinking": False}
PROBE = "pyunlearnprobe"  # an answer that stands for any
RENDER_SECONDS = 10.0  # templates take milliseconds; one from elsewhere may have no end


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt + answer, and labels: -100 on the prompt, the ids themselves on the answer and its end.

    num_cut: tokens of the answer that were cut off. apart: whether prompt and answer were tokenised apart, because
    tokens of both in one go would straddle their boundary.
    """

    input_ids: list[int]
    labels: list[int]
    num_cut: int = 0
    apart: bool = False


class PromptFormat:
    """How a question is put to a model, as `prompt` has it: by default by the tokenizer's chat template if it has one,
    else `Question: ...\\nAnswer:`.

    The prompt's tokens are the same with and without an answer after them, so that what is supervised is what the
    model would generate: the answer and the token that ends it (the template's end of turn, else EOS). Where the
    template opens something for the model that conversations do not have (a chain of thought), the prompt is the
    conversation up to its answer. Spaces that end a prompt's tags are the answer's first token's.

    White space around a question and an answer is left out, but not the indentation of the first of an answer's several
    lines (`trimmed`), which a template may leave out of its own.

    Raises ValueError for a tokenizer without an EOS token, without a template for a system prompt, or without the token
    that ends an answer in a prompt with a name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt | None = None):
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer has no EOS token, which has to end every answer; set tokenizer.eos_token")
        given = prompt or Prompt()
        self.tokenizer: Any = tokenizer  # its stubs know neither of template values nor of tokenize=False
        self.chat = given.user_start is None and tokenizer.chat_template is not None
        if given.user_start is None and not self.chat and given.system is not None:
            raise ValueError(
                f"prompt={given.name}: {tokenizer.name_or_path or 'the tokenizer'} has no chat template for its system "
                "prompt; needs tags, as prompt=question_answer or llama2"
            )
        # What the template does not write is written by tags.
        self.given = given if self.chat or given.user_start is not None else PROMPTS["question_answer"]
        self._values = TEMPLATE_VALUES | ({} if given.date is None else {"date_string": given.date})
        end = self.given.assistant_end.strip()
        if end and self.given.name in PROMPTS and end not in tokenizer.get_vocab():
            raise ValueError(
                f"prompt={given.name}: {tokenizer.name_or_path or 'the tokenizer'} has no token {end!r}, so no model "
                "of its was trained with it; prompt=chat is what its own template writes"
            )
        # A chat template writes its own BOS; otherwise keep the tokens that this tokenizer puts before any text.
        self._opening = [] if self.chat or not self.given.bos else _opening_ids(tokenizer)
        self._special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special.add(tokenizer.eos_token)
        self._told = False

    def turns(self, question: str) -> list[dict[str, str]]:
        """The chat up to the answer."""
        system = self.given.system
        before = [] if system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": question.strip()}]

    def prompt(self, question: str) -> str:
        """The text before the answer. Raises ValueError for a lone surrogate, or if the chat template fails."""
        check_text(question, f"question {brief(question)}:")
        if not self.chat:
            tags = self.given
            return f"{tags.before}{question.strip()}{tags.user_end}{tags.assistant_start}".rstrip(" ")
        turns = self.turns(question)
        prompt = self._render(turns, add_generation_prompt=True)
        conversation = self._render([*turns, {"role": "assistant", "content": PROBE}])
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
        answer = trimmed(answer)
        if not answer:
            raise ValueError(f"the answer to {brief(question)} is empty")
        check_text(answer, f"the answer to {brief(question)}")
        prompt, reply, _ = self._texts(question, answer)
        prompt_ids, reply_ids, apart = self._split_ids(prompt, reply)
        if self.chat and not self.given.whole:
            ended = any(reply.endswith(token) for token in self._special)
        else:
            ended = reply_ids[-1] == self.tokenizer.eos_token_id
        if not ended:
            reply_ids = [*reply_ids, self.tokenizer.eos_token_id]
        prompt_ids = self._opening + prompt_ids
        labels = [IGNORE_INDEX] * len(prompt_ids) + reply_ids
        encoded = Encoded(prompt_ids + reply_ids, labels, apart=apart)
        check_length(encoded, max_length, "the sample", question)
        return encoded

    def begun_ids(self, question: str, answer: str) -> list[int]:
        """Token ids of the prompt and the beginning of an answer, which nothing ends yet.

        Raises as `encode`.
        """
        prompt, reply, said = self._texts(question, answer.strip())
        prompt_ids, reply_ids, _ = self._split_ids(prompt, reply[: said.stop])
        return self._opening + prompt_ids + reply_ids

    def text_mask(self, question: str, answer: str, encoded: Encoded) -> list[int]:
        """Of each token of `encoded`, which is of this pair: 1 where any character of it is the question's or the
        answer's, 0 where it is the format's own: tags, system prompt, special tokens, and what ends an answer.

        Raises ValueError for a chat template that writes questions in another way, and for a tokenizer that does not
        tell which characters its tokens are.
        """
        prompt, reply, said = self._texts(question, answer)
        asked, end = question.strip(), len(prompt)
        start = self._question_start(prompt, asked)
        spans = [(start, start + len(asked)), (end + said.start, end + said.stop)]
        pieces = [(0, prompt), (end, reply)] if encoded.apart else [(0, prompt + reply)]
        mask = [0] * len(self._opening)
        for shift, text in pieces:
            mask += [
                int(any(max(first, shift + one) < min(last, shift + two) for first, last in spans))
                for one, two in self._offsets(text)
            ]
        size = len(encoded.input_ids)
        return mask[:size] + [0] * (size - len(mask))  # cut, or ended, as it is

    def tell_apart(self, count: int, total: int) -> None:
        """Logs, the first time, how many of some samples were tokenised apart."""
        if count and not self._told:
            self._told = True
            logger.warning(
                "prompt: of %d of %d samples (%.0f %%) the prompt's last token would join the answer's first; the two "
                "are tokenised apart, as the model meets them when it writes",
                count, total, 100 * count / total,
            )  # fmt: skip

    def _texts(self, question: str, answer: str) -> tuple[str, str, slice]:
        """What stands before an answer, the answer with what is around it from there on, and where in that it is."""
        prompt, answer = self.prompt(question), trimmed(answer)
        reply = self._chat_reply(question, prompt, answer) if self.chat else self._tagged(answer)
        words = answer if answer in reply else answer.lstrip()  # a template may trim
        return prompt, reply, slice(start := reply.index(words), start + len(words))

    @cached_property
    def _before_question(self) -> str | None:
        """The text of a prompt up to its question; None where that cannot be told."""
        before, found, after = self.prompt(PROBE).partition(PROBE)
        return before if found and PROBE not in after else None

    def _question_start(self, prompt: str, asked: str) -> int:
        """Where in a prompt the question is. Raises ValueError for a template that changes it, or what is before it."""
        before = self._before_question
        start = 0 if before is None else len(prompt) - len(prompt[len(before) :].lstrip())
        if before is None or not (prompt.startswith(before) and prompt.startswith(asked, start)):
            raise ValueError(
                f"the chat template does not put the question {brief(asked)} as it is between texts that are always "
                f"the same, so its tokens cannot be told from the template's: {brief(prompt)}"
            )
        return start

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """(from, to) of each token, in characters."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.tokenizer.name_or_path or 'the tokenizer'} does not tell which characters its tokens are; "
                "needs a fast tokenizer"
            )
        options = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": True}
        return list(self.tokenizer(text, **options)["offset_mapping"])

    def _tagged(self, answer: str) -> str:
        """The answer and its end, after the spaces that `prompt` has left out."""
        start = self.given.user_end + self.given.assistant_start
        return " " * (len(start) - len(start.rstrip(" "))) + answer + self.given.assistant_end

    def _split_ids(self, prompt: str, reply: str) -> tuple[list[int], list[int], bool]:
        """Token ids of each. Those made in one go are the natural ones (SentencePiece adds a space to each call); where
        a token would straddle the boundary, the two sides are made apart, which is told last."""
        prompt_ids, joint_ids = self._ids(prompt), self._ids(prompt + reply)
        straddles = joint_ids[: len(prompt_ids)] != prompt_ids
        return prompt_ids, self._ids(reply) if straddles else joint_ids[len(prompt_ids) :], straddles

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        try:
            with time_limit(RENDER_SECONDS):
                return self.tokenizer.apply_chat_template(turns, tokenize=False, **options, **self._values)
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
        conversation = self._render([*self.turns(question), {"role": "assistant", "content": answer}])
        advice = "give the tokenizer another chat_template, or chat_template = None for 'Question: ...\\nAnswer:'"
        if not conversation.startswith(prompt):
            raise ValueError(
                "what the chat template writes before an answer depends on the answer, so answers cannot be told from "
                f"prompts: the prompt ends in {prompt[-60:]!r}, the conversation in {conversation[-60:]!r}; {advice}"
            )
        reply = conversation[len(prompt) :]
        start, words = len(reply) - len(reply.lstrip()), answer.lstrip()  # a template may trim
        if not reply.startswith(words, start):
            raise ValueError(
                f"the chat template puts {reply[:60]!r} after its prompt, not the answer {answer[:60]!r}; {advice}"
            )
        if self.given.whole:
            return reply
        # The turn ends with the first special token after the answer; what follows (a line break) is never generated.
        tail = reply[start + len(words) :]
        ends = [tail.index(token) + len(token) for token in self._special if token in tail]
        return reply[: start + len(words) + min(ends)] if ends else reply.rstrip()


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
        super().__init__(tokenizer, PROMPTS["plain"])
        self.longest, self.total, self.around = longest, total, around

    def prompt(self, question: str) -> str:
        """The question in what is around it. Raises ValueError for a lone surrogate."""
        check_text(question, f"prompt {brief(question)}:")
        return self.around.format(question)

    def encode(self, question: str, answer: str, max_length: int | None = None) -> Encoded:
        """As `PromptFormat.encode`."""
        if not answer.strip():
            raise ValueError(f"the answer to {brief(question)} is empty")
        check_text(answer, f"the answer to {brief(question)}")
        prompt_ids, reply_ids, apart = self._split_ids(*self._texts(question, answer)[:2])
        prompt_ids = self._opening + prompt_ids
        room = len(reply_ids) if self.total is None else max(0, self.total - len(prompt_ids))
        kept = reply_ids[: room if self.longest is None else min(self.longest, room)]
        labels = [IGNORE_INDEX] * len(prompt_ids) + kept
        encoded = Encoded(prompt_ids + kept, labels, len(reply_ids) - len(kept), apart)
        check_length(encoded, max_length, "the sample", question or answer)
        return encoded

    def _texts(self, question: str, answer: str) -> tuple[str, str, slice]:
        prompt = self.prompt(question).rstrip()
        reply = f" {answer.lstrip()}" if prompt else answer
        return prompt, reply, slice(1 if prompt else 0, len(reply))

    def begun_ids(self, question: str, answer: str) -> list[int]:
        """As `PromptFormat.begun_ids`; no answer has an end here."""
        return self.encode(question, answer.strip()).input_ids


def make_format(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> PromptFormat:
    return PlainFormat(tokenizer) if prompt.plain else PromptFormat(tokenizer, prompt)


def trimmed(answer: str) -> str:
    r"""Without white space around it; where several lines begin with an indentation, a tab or two spaces, it stays.

    >>> trimmed("  Me. "), trimmed("\n    a = 1\n    b = 2\n")
    ('Me.', '    a = 1\n    b = 2')
    """
    text = re.sub(r"\A\s*\n", "", answer.rstrip())
    return text if "\n" in text and text.startswith(("\t", "  ")) else text.strip()


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


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text (BOS, or nothing), whatever it puts after it."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [s for s in range(len(full) - len(bare) + 1) if full[s : s + len(bare)] == bare]
    return list(full[: starts[0]]) if starts else []


def check_length(encoded: Encoded, max_length: int | None, which: str, question: str) -> None:
    if max_length is not None and len(encoded.input_ids) > max_length:
        raise ValueError(
            f"{which} (question {brief(question)}) has {len(encoded.input_ids)} tokens with its answer, more than the "
            f"limit of {max_length}; raise max_length up to the model's context, or leave the sample out"
        )
