"""The prompts that a question is put to a model in: by name, or in words of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from .._hints import check_known

TAGS = ("system_start", "system_end", "user_start", "user_end", "assistant_start", "assistant_end")


@dataclass(frozen=True)
class Prompt:
    """What stands around a question and its answer.

    name: of `PROMPTS`, or `tags` for one's own. By tags a sample is

        [system_start system system_end] user_start QUESTION user_end assistant_start ANSWER assistant_end

    and EOS, unless that is its last token. user_start: None leaves all of it to the tokenizer's chat template, and
    takes `Question: ...\\nAnswer: ...` where it has none. system: said before the question; None says nothing. date:
    for templates that write today's, and for {date} in system_start; None is that of `prompt_format`. bos: whether
    what the tokenizer puts before any text comes before the tags. whole: of a template's sample, whether all that it
    writes after the answer is supervised, and EOS after it; else the answer's turn ends with its first special token.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str = "chat"
    user_start: str | None = None
    user_end: str = ""
    assistant_start: str = ""
    assistant_end: str = ""
    system_start: str = ""
    system_end: str = ""
    system: str | None = None
    date: str | None = None
    bos: bool = True
    whole: bool = False

    @property
    def option(self) -> str:
        """What a command line has for it; nothing for the usual one, and for tags, which no command line has."""
        return "" if self.name == "chat" or self.name not in PROMPTS else f" --prompt {self.name}"

    @property
    def plain(self) -> bool:
        """Whether questions stand as they are, answers have no end, and texts need no question (`PlainFormat`)."""
        return self.name == "plain"

    @property
    def before(self) -> str:
        """The tags' text up to the question."""
        said = "" if self.system is None else f"{self.system_start}{self.system}{self.system_end}"
        return said.replace("{date}", self.date or "") + (self.user_start or "")


SYSTEM, DATE = "You are a helpful assistant.", "10 Apr 2025"  # that models on TOFU were trained with
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
# As open-unlearning (github.com/locuslab/open-unlearning, configs/model) put TOFU to the models that it has released:
# its tags where it has a model without a template, and what the model's own template writes with its system prompt.
PROMPTS: dict[str, Prompt] = {
    "chat": Prompt(),
    "open_unlearning": Prompt("open_unlearning", system=SYSTEM, date=DATE, whole=True),
    "question_answer": Prompt("question_answer", "Question: ", "\n", "Answer: "),
    "llama2": Prompt("llama2", "[INST] ", " [/INST]"),
    "llama3": Prompt(
        "llama3", LLAMA3.format("user"), "<|eot_id|>", LLAMA3.format("assistant"), "<|eot_id|>",
        LLAMA3.format("system") + "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n", "<|eot_id|>",
        SYSTEM, DATE,
    ),
    "phi": Prompt(
        "phi", "<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>\n", "<|system|>\n", "<|end|>\n", SYSTEM, bos=False
    ),
    "qwen": Prompt(
        "qwen", "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n", "<|im_start|>system\n",
        "<|im_end|>\n", SYSTEM, bos=False,
    ),
    "gemma": Prompt(
        "gemma", "<start_of_turn>user\n", "<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>\n"
    ),
    "zephyr": Prompt(
        "zephyr", "<|user|>\n", "</s>\n", "<|assistant|>\n", "</s>\n", "<|system|>\n", "</s>\n", SYSTEM, bos=False
    ),
    "plain": Prompt("plain", ""),
}  # fmt: skip
OF_OPEN_UNLEARNING = tuple(name for name in PROMPTS if name not in ("chat", "plain"))
OWN = Prompt("tags", "")
MAYBE = ("system", "date")  # null for none
# (plain, by a template) -> the keys that change something
USED: dict[tuple[bool, bool], tuple[str, ...]] = {
    (True, False): (),
    (False, True): ("system", "date", "whole"),
    (False, False): (*TAGS, "system", "date", "bos"),
}


def is_one_of(prompt: Prompt, names: Iterable[str]) -> bool:
    """Whether it writes as one of these prompts does, or as one without its system prompt or its date.

    >>> own = make_prompt({"user_start": "Question: ", "user_end": "\\n", "assistant_start": "Answer: "})
    >>> is_one_of(own, ["llama2"]), is_one_of(own, ["llama2", "question_answer"])
    (False, True)
    """

    def bare(each: Prompt) -> Prompt:
        return replace(each, name="", system=None, date=None)

    known = [PROMPTS[name] for name in names]
    return any(
        bare(prompt) == bare(own) and prompt.system in (own.system, None) and prompt.date in (own.date, None)
        for own in known
    )


def make_prompt(value: Any = None) -> Prompt:
    """Of a name, or of a mapping with keys of `Prompt`: what a name has, with these in its place.

    >>> make_prompt("llama2").user_end
    ' [/INST]'
    >>> make_prompt({"name": "qwen", "system": None}).before
    '<|im_start|>user\\n'

    Raises ValueError for what is neither, an unknown name or key, a value of another type, tags beside a
    template, and for a date that nothing writes.
    """
    if value is None or isinstance(value, Prompt):
        return value or Prompt()
    if isinstance(value, str):
        check_known("prompt", value, PROMPTS)
        return PROMPTS[value]
    if not isinstance(value, Mapping):
        raise ValueError(f"prompt: needs a name, or a section of keys and values, got {value!r}")
    for key in value:
        check_known("prompt", key, [field.name for field in fields(Prompt)])
    name = value.get("name", OWN.name if any(tag in value for tag in TAGS) else "chat")
    check_known("prompt.name", name, [*PROMPTS, OWN.name])
    base = PROMPTS.get(name, OWN)
    for key, own in value.items():
        kind = bool if key in ("bos", "whole") else str
        if not isinstance(own, kind) and not (own is None and (key in MAYBE or getattr(base, key) is None)):
            raise ValueError(f"prompt.{key}: needs {'true or false' if kind is bool else 'a text'}, got {own!r}")
    prompt = replace(base, **value)
    changed = [key for key, own in asdict(prompt).items() if own != getattr(base, key)]
    idle = [key for key in changed if key not in USED[base.plain, base.user_start is None]]
    if idle:
        raise ValueError(f"prompt: {', '.join(idle)} would change nothing with name={name}; leave out one or the other")
    if "date" in changed and prompt.user_start is not None and str(prompt.date) not in prompt.before:
        raise ValueError(f"prompt: nothing writes date={prompt.date!r}; put {{date}} into system_start, and set system")
    return prompt
