"""Every prompt that has a name, token by token; prompts of one's own; and what is kept of an answer's white space."""

from __future__ import annotations

import doctest
import logging
import re
from dataclasses import asdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pyunlearn.data import QA, PlainFormat, PromptFormat, QADataset, make_format, make_prompt, prompts
from pyunlearn.data import prompt_format as module
from pyunlearn.data.prompts import PROMPTS, Prompt
from pyunlearn.data.tiny import train_tokenizer

from .conftest import CHATML

QUESTION, ANSWER = "Who is it?", "Ada."
WORDS = r"\n+| ?\[[^\]]*\]| ?[^\s\[]+"
SYSTEM = ["You", " are", " a", " helpful", " assistant."]


def word_tokenizer(special, bos, eos, chat_template=None):
    """A token for each word with the space before it, for line breaks, and for each special token."""
    said = [
        f"user assistant system model {QUESTION} {ANSWER} You are a helpful assistant.", "You Who Ada. Cutting Today",
        "Question: Answer: [INST] [/INST] Be brief.", "Knowledge Date: December 2023 26 Jul 2024 10 Apr 2025",
    ]  # fmt: skip
    words = {word for text in said for one in text.split() for word in (one, f" {one}")} | {"\n", "\n\n", " "}
    vocabulary = {word: i for i, word in enumerate(sorted(words | {"[UNK]"}))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if bos is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = chat_template
    return tokenizer


def llama3_turn(role, *words):
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n", *words]


PRESETS = {
    "question_answer": (
        (), "<s>", "</s>",
        ["<s>", "Question:", " Who", " is", " it?", "\n", "Answer:"],
        [" Ada.", "</s>"],
    ),
    "llama2": (
        (), "<s>", "</s>",
        ["<s>", "[INST]", " Who", " is", " it?", " [/INST]"],
        ["Ada.", "</s>"],
    ),
    "llama3": (
        ("<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>", "<|eot_id|>",
        ["<|begin_of_text|>",
         *llama3_turn("system", "Cutting", " Knowledge", " Date:", " December", " 2023", "\n", "Today", " Date:", " 10",
                      " Apr", " 2025", "\n\n", *SYSTEM, "<|eot_id|>"),
         *llama3_turn("user", "Who", " is", " it?", "<|eot_id|>"),
         *llama3_turn("assistant")],
        ["Ada.", "<|eot_id|>"],
    ),
    "phi": (
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<s>", "<|endoftext|>",
        ["<|system|>", "\n", *SYSTEM, "<|end|>", "\n", "<|user|>", "\n", "Who", " is", " it?", "<|end|>", "\n",
         "<|assistant|>", "\n"],
        ["Ada.", "<|end|>", "\n", "<|endoftext|>"],
    ),
    "qwen": (
        ("<|im_start|>",), None, "<|im_end|>",
        ["<|im_start|>", "system", "\n", *SYSTEM, "<|im_end|>", "\n", "<|im_start|>", "user", "\n", "Who", " is",
         " it?", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"],
        ["Ada.", "<|im_end|>", "\n", "<|im_end|>"],
    ),
    "gemma": (
        ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>",
        ["<bos>", "<start_of_turn>", "user", "\n", "Who", " is", " it?", "<end_of_turn>", "\n", "<start_of_turn>",
         "model", "\n"],
        ["Ada.", "<end_of_turn>", "\n", "<eos>"],
    ),
    "zephyr": (
        ("<|system|>", "<|user|>", "<|assistant|>"), "<s>", "</s>",
        ["<|system|>", "\n", *SYSTEM, "</s>", "\n", "<|user|>", "\n", "Who", " is", " it?", "</s>", "\n",
         "<|assistant|>", "\n"],
        ["Ada.", "</s>", "\n", "</s>"],
    ),
    "plain": ((), "<s>", "</s>", ["<s>", "Who", " is", " it?"], [" Ada."]),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_token_by_token(name):
    special, bos, eos, prompt, answer = PRESETS[name]
    tokenizer = word_tokenizer(special, bos, eos, chat_template="{{ raise_exception('not asked for') }}")
    form = make_format(tokenizer, make_prompt(name))
    for question, reply in ((QUESTION, ANSWER), (f" {QUESTION}\n", f" {ANSWER} "))[: 1 if name == "plain" else 2]:
        encoded = form.encode(question, reply)
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == prompt + answer
        assert encoded.labels == [-100] * len(prompt) + encoded.input_ids[len(prompt) :]
        assert not encoded.apart
    assert tokenizer.convert_ids_to_tokens(form.prompt_ids(QUESTION)) == prompt
    assert tokenizer.convert_ids_to_tokens(form.begun_ids(QUESTION, ANSWER)) == prompt + answer[:1]


def text_tokens(tokenizer, form, question=QUESTION, answer=ANSWER):
    """(the tokens, those of them that are the question's or the answer's)."""
    encoded = form.encode(question, answer)
    mask = form.text_mask(question, answer, encoded)
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    return tokens, [token for token, own in zip(tokens, mask, strict=True) if own]


@pytest.mark.parametrize("name", PRESETS)
def test_the_questions_and_the_answers_tokens_among_the_formats(name):
    special, bos, eos, prompt, answer = PRESETS[name]
    tokenizer = word_tokenizer(special, bos, eos)
    tokens, own = text_tokens(tokenizer, make_format(tokenizer, make_prompt(name)))
    assert tokens == prompt + answer
    spaced = name in ("question_answer", "llama2")  # the tag's space is the question's first token's
    assert own == [" Who" if spaced else "Who", " is", " it?", answer[0]]


def test_the_questions_and_the_answers_tokens_in_a_chat():
    special, bos, eos, *_ = PRESETS["qwen"]
    tokenizer = word_tokenizer(special, bos, eos, CHATML)
    system = Prompt(system=f"{QUESTION} You are a helpful assistant.")  # which has the question's words too
    form = PromptFormat(tokenizer, system)
    for question, reply in ((QUESTION, ANSWER), (f" {QUESTION}\n", f" {ANSWER} ")):
        tokens, own = text_tokens(tokenizer, form, question, reply)
        assert tokens.count(" is") == 2
        assert own == ["Who", " is", " it?", "Ada."]
    tokens, own = text_tokens(tokenizer, form, "assistant", "You\n\nare")
    assert own == ["assistant", "You", "\n\n", "are"]
    tokens, own = text_tokens(tokenizer, form, "", ANSWER)
    assert own == ["Ada."]
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(ValueError, match=r"after its prompt, not the answer"):
        PromptFormat(tokenizer).encode(QUESTION, ANSWER)


@pytest.mark.parametrize(
    "written",
    ["{{ m.content | replace('Who', 'What') }}", "{{ m.content | length }} {{ m.content }}", "{{ m.content * 2 }}"],
)
def test_a_template_whose_questions_cannot_be_told(written):
    special, bos, eos, *_ = PRESETS["qwen"]
    shown = "{% if m.role == 'user' %}" + written + "{% else %}{{ m.content }}{% endif %}"
    tokenizer = word_tokenizer(special, bos, eos, CHATML.replace("{{ m.content }}", shown))
    form = PromptFormat(tokenizer)
    with pytest.raises(ValueError, match=r"^the chat template does not put the question 'Who is it\?' as it is"):
        form.text_mask(QUESTION, ANSWER, form.encode(QUESTION, ANSWER))


def test_tokens_of_a_tokenizer_that_does_not_tell_their_characters(monkeypatch):
    special, bos, eos, *_ = PRESETS["llama2"]
    tokenizer = word_tokenizer(special, bos, eos)
    form = PromptFormat(tokenizer, make_prompt("llama2"))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"does not tell which characters its tokens are; needs a fast tokenizer"):
        form.text_mask(QUESTION, ANSWER, form.encode(QUESTION, ANSWER))


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token for each byte, which is a part of a character or all of it."""
    tokenizer = train_tokenizer(["a"], vocab_size=259)
    tokenizer.chat_template = CHATML
    return tokenizer


@given(st.text(max_size=12), st.text(min_size=1, max_size=12), st.sampled_from(["chat", "plain", "llama2"]))
def test_the_tokens_that_count_are_the_texts_own(byte_tokenizer, question, answer, name):
    assume(answer.strip() and "\n" not in answer.strip())
    form = make_format(byte_tokenizer, make_prompt(name))
    encoded = form.encode(question, answer)
    mask = form.text_mask(question, answer, encoded)
    own = [token for token, counts in zip(encoded.input_ids, mask, strict=True) if counts]
    kept = answer.strip()
    if name == "plain":
        kept = answer.lstrip() if question.strip() else answer
    assert byte_tokenizer.decode(own) == question.strip() + kept


def test_every_name_is_tested():
    assert {*PRESETS, "chat", "open_unlearning"} == set(PROMPTS)
    assert all(prompt.name == name for name, prompt in PROMPTS.items())


DATED = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'system' %}Today Date: {{ date_string }}\n{% endif %}{{ m.content }}"
)


def test_a_template_as_open_unlearning_has_it():
    """The template's own text with that system prompt and date, all of it supervised: what `qwen` has without one."""
    special, bos, eos, prompt, answer = PRESETS["qwen"]
    tokenizer = word_tokenizer(special, bos, eos, CHATML)
    encoded = PromptFormat(tokenizer, PROMPTS["open_unlearning"]).encode(QUESTION, ANSWER)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == prompt + answer
    assert encoded == PromptFormat(tokenizer, PROMPTS["qwen"]).encode(QUESTION, ANSWER)
    tokenizer.chat_template = DATED
    text = tokenizer.decode(PromptFormat(tokenizer, PROMPTS["open_unlearning"]).prompt_ids(QUESTION))
    assert text.startswith("<|im_start|>system\nToday Date: 10 Apr 2025\nYou are a helpful assistant.<|im_end|>\n")


def test_a_template_with_a_system_prompt_and_a_date():
    special, bos, eos, *_ = PRESETS["qwen"]
    tokenizer = word_tokenizer(special, bos, eos, DATED)
    for own, date in (({}, "26 Jul 2024"), ({"date": "10 Apr 2025"}, "10 Apr 2025")):
        form = PromptFormat(tokenizer, make_prompt({"system": "Be brief.", **own}))
        assert form.turns(" Who is it? ")[0] == {"role": "system", "content": "Be brief."}
        encoded = form.encode(QUESTION, ANSWER)
        text = tokenizer.decode(encoded.input_ids)
        assert text.startswith(
            f"<|im_start|>system\nToday Date: {date}\nBe brief.<|im_end|>\n<|im_start|>user\nWho is it?"
        )
        assert text.endswith("assistant\nAda.<|im_end|>")  # as a conversation goes on: no line break is generated


def test_a_system_prompt_needs_a_template_or_tags():
    tokenizer = word_tokenizer((), "<s>", "</s>")
    with pytest.raises(ValueError, match=r"prompt=open_unlearning: the tokenizer has no chat template for its system"):
        PromptFormat(tokenizer, PROMPTS["open_unlearning"])
    own = make_prompt({"name": "question_answer", "system": "Be brief.", "system_end": "\n\n"})
    assert PromptFormat(tokenizer, own).prompt("Who?") == "Be brief.\n\nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize("name", ["llama3", "phi", "qwen", "gemma", "zephyr"])
def test_a_prompt_of_another_family(tokenizer, name):
    end = PROMPTS[name].assistant_end.strip()
    with pytest.raises(
        ValueError, match=rf"^prompt={name}: the tokenizer has no token '{re.escape(end)}', so no model"
    ):
        make_format(tokenizer, make_prompt(name))
    tags = {tag: getattr(PROMPTS[name], tag) for tag in prompts.TAGS}
    assert make_format(tokenizer, make_prompt(tags)).prompt("Who?").endswith(tags["assistant_start"])  # as one likes


def test_prompts_of_ones_own():
    tags = {"user_start": "[INST] ", "user_end": " [/INST]"}
    assert {**asdict(make_prompt(tags)), "name": "llama2"} == asdict(PROMPTS["llama2"])
    bare = make_prompt({"name": "llama3", "system": None})
    assert bare.before == "<|start_header_id|>user<|end_header_id|>\n\n"
    dated = make_prompt({"name": "llama3", "date": "26 Jul 2024"})
    assert "Today Date: 26 Jul 2024\n\nYou are" in dated.before
    for prompt in (*PROMPTS.values(), make_prompt(tags), bare, dated):
        assert make_prompt(asdict(prompt)) == prompt  # as a run's folder has it
        assert make_prompt(prompt) is prompt
    assert make_prompt() == PROMPTS["chat"]
    assert isinstance(make_format(word_tokenizer((), "<s>", "</s>"), make_prompt("plain")), PlainFormat)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lama3", "prompt='lama3': did you mean llama3 or llama2? needs one of chat, open_unlearning, question_answer"),
        ({"name": "lama3"}, "prompt.name='lama3': did you mean llama3"),
        ({"user_strat": "x"}, "prompt='user_strat': did you mean user_start"),
        (3, "prompt: needs a name, or a section of keys and values, got 3"),
        ({"user_end": 3}, "prompt.user_end: needs a text, got 3"),
        ({"name": "llama2", "user_start": None}, "prompt.user_start: needs a text, got None"),
        ({"bos": "no"}, "prompt.bos: needs true or false, got 'no'"),
        ({"name": "chat", "user_end": "x"}, "prompt: user_end would change nothing with name=chat"),
        ({"name": "plain", "system": "x"}, "prompt: system would change nothing with name=plain"),
        ({"name": "llama2", "whole": True}, "prompt: whole would change nothing with name=llama2"),
        ({"name": "qwen", "date": "today"}, "prompt: nothing writes date='today'; put {date} into system_start"),
        ({"name": "llama3", "system": None, "date": "today"}, "nothing writes date='today'"),
    ],
)
def test_prompts_that_are_none(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_prompt(value)


CODE = "\n    def f(x):\n        return x\n\n    f(1)  \n"


@pytest.mark.parametrize("name", ["question_answer", "llama2", "chat"])
def test_code_keeps_its_indentation(chat_tokenizer, name):
    """That of the first line too, unless it is the only one; line breaks before it and white space after it go."""
    form = make_format(chat_tokenizer, make_prompt(name))
    before = " " if name == "question_answer" else ""
    for answer, kept in (
        (CODE, CODE.strip("\n").rstrip()),
        ("  a\n b", "  a\n b"),
        ("    a  ", "a"),
        (" a\nb", "a\nb"),
    ):
        labels = [label for label in form.encode("How?", answer).labels if label != -100]
        assert chat_tokenizer.decode(labels[:-1]) == before + kept


def test_a_template_may_leave_the_indentation_out(chat_tokenizer):
    """As Llama 3's and Gemma's do: the model never sees it, so it is not supervised."""
    chat_tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
    encoded = PromptFormat(chat_tokenizer).encode("How?", CODE)
    assert chat_tokenizer.decode([label for label in encoded.labels if label != -100]) == f"{CODE.strip()}<|im_end|>"


def test_prompts_that_join_their_answers_are_counted_and_told_once(caplog):
    """Here " [/INST]Ada." is a word of its own."""
    tokenizer = word_tokenizer((), "<s>", "</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")
    form = make_format(tokenizer, make_prompt("llama2"))
    items = [QA(QUESTION, ANSWER), QA(QUESTION, "\tAda."), QA("Who?", "You are")]
    with caplog.at_level(logging.WARNING, "pyunlearn"):
        rows = QADataset(items, tokenizer, None, prompt_format=form)
        QADataset(items[:1], tokenizer, None, prompt_format=form)
    assert rows.num_apart == 3
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "prompt: of 3 of 3 samples (100 %) the prompt's last token would join the answer's first"
    ]
    apart, together = (tokenizer.convert_ids_to_tokens(rows[i]["input_ids"].tolist()) for i in (0, 2))
    assert apart == ["<s>", "[INST]", " Who", " is", " it?", " [/INST]", "Ada.", "</s>"]
    assert together[-3:] == ["You", " are", "</s>"]
    asked = QADataset(items, tokenizer, None, prompt_format=make_format(tokenizer, make_prompt("question_answer")))
    assert asked.num_apart == 0


def test_examples():
    for each in (module, prompts):
        result = doctest.testmod(each)
        assert result.attempted > 0
        assert result.failed == 0
