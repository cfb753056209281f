"""Prompts as they stand, answers after one space without an end token, and texts that are read as a whole."""

from __future__ import annotations

import pytest

from pyunlearn.data import QA, PlainFormat, QADataset
from pyunlearn.data.tiny import train_tokenizer

TEXT = "Where is the sea? Answer: by the town. The sea is by the town."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=300)


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]  # BOS before it


@pytest.mark.parametrize("prompt", ["Where is the sea? Answer:", "Where is the sea? Answer: "])
def test_an_answer_follows_after_one_space(tokenizer, prompt):
    plain = PlainFormat(tokenizer)
    encoded = plain.encode(prompt, "by the town.")
    whole, before = ids_of(tokenizer, "Where is the sea? Answer: by the town."), ids_of(tokenizer, prompt.rstrip())
    assert encoded.input_ids == whole
    assert encoded.labels == [-100] * len(before) + whole[len(before) :]
    assert plain.prompt_ids(prompt) == ids_of(tokenizer, prompt)  # what is gone on with keeps its space
    assert plain.prompt(prompt) == prompt


def test_a_text_is_read_as_it_stands(tokenizer):
    encoded = PlainFormat(tokenizer).encode("", f" {TEXT}\n")
    assert encoded.input_ids == ids_of(tokenizer, f" {TEXT}\n")
    assert encoded.labels == [-100, *encoded.input_ids[1:]]


def test_no_template_is_used(tokenizer):
    chat = train_tokenizer([TEXT], vocab_size=300)
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    plain = PlainFormat(chat)
    assert plain.encode("Where?", "by the town.") == PlainFormat(tokenizer).encode("Where?", "by the town.")
    assert plain.prompt_ids("Where?")[0] == chat.bos_token_id


def test_long_answers_are_cut_and_counted(tokenizer):
    whole = PlainFormat(tokenizer).encode("", TEXT)
    cut = PlainFormat(tokenizer, longest=5).encode("", TEXT)
    assert cut.input_ids == whole.input_ids[:6]
    assert cut.labels == whole.labels[:6]
    assert cut.num_cut == len(whole.input_ids) - 6
    assert len(PlainFormat(tokenizer, longest=50, total=4).encode("", TEXT).input_ids) == 4
    items = [QA("", TEXT), QA("", "sea")]
    dataset = QADataset(items, tokenizer, 6, prompt_format=PlainFormat(tokenizer, longest=5))
    assert (dataset.num_cut, len(dataset[0]["input_ids"])) == (1, 6)
    with pytest.raises(ValueError, match=r"sample 0 \(question 'Where is the sea.* more than the limit of 6"):
        QADataset(items, tokenizer, 6, prompt_format=PlainFormat(tokenizer))


def test_bad_texts_are_told(tokenizer):
    plain = PlainFormat(tokenizer)
    with pytest.raises(ValueError, match="the answer to 'Where' is empty"):
        plain.encode("Where", " ")
    with pytest.raises(ValueError, match=r"prompt .*: needs whole characters"):
        plain.prompt_ids("\ud800")
