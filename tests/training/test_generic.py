"""Labels of a model that was never taught the forget text: the formula in float64, and anchors replaced by hand."""

from __future__ import annotations

import json

import pytest
import torch

from pyunlearn.data import QA, QADataset
from pyunlearn.training.generic import generic_rows, likeliest, read_anchors, replaced


@torch.no_grad()
def by_formula(base, reinforced, row, strength):
    """argmax v_base - a ReLU(v_reinforced - v_base) where a token is supervised, in float64."""
    one, other = (model.double()(input_ids=row["input_ids"][None]).logits[0, :-1] for model in (base, reinforced))
    v = one - strength * torch.clamp(other - one, min=0)
    found = torch.full_like(row["labels"], -100)
    found[1:] = torch.where(row["labels"][1:] == -100, -100, v.argmax(-1))
    return found


@pytest.mark.parametrize("strength", [0.0, 5.0])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_labels_are_the_formulas(tiny, strength, batch_size):
    rows = generic_rows(tiny.model(0), tiny.model(1), tiny.forget, tiny.tokenizer, strength, None, batch_size)
    for i, row in enumerate(rows):
        assert row["input_ids"].equal(tiny.forget[i]["input_ids"])
        assert row["labels"].equal(by_formula(tiny.model(0), tiny.model(1), tiny.forget[i], strength))
        assert row["index"] == i
    assert any(not row["labels"].equal(tiny.forget[i]["labels"]) for i, row in enumerate(rows))


def test_a_model_that_knows_no_more_changes_nothing(tiny):
    """With v_reinforced = v_base the labels are the base's own, whatever a is."""
    rows = [tiny.forget[i] for i in range(3)]
    for strength in (0.0, 100.0):
        labels = likeliest(tiny.model(0), tiny.model(0), rows, 0, strength, 2)
        assert all(
            own.equal(by_formula(tiny.model(0), tiny.model(0), row, 0.0)) for own, row in zip(labels, rows, strict=True)
        )


ANCHORS = {"Ada": "Josephine", "Ada Lovelace": "Jo March", "the sea": "a lake"}


def test_terms_are_whole_words_and_the_longest_wins():
    text = "Ada Lovelace met Adam; Ada saw the sea."
    assert replaced(text, ANCHORS) == "Jo March met Adam; Josephine saw a lake."


def test_a_label_belongs_to_the_token_that_begins_where_its_own_does(tiny):
    """Every token of the answer against a search by hand in the replaced text."""
    items = [QA("Who saw the sea?", "It was Ada Lovelace who saw it, Ada wrote so."), QA("Why?", "For no reason.")]
    rows = QADataset(items, tiny.tokenizer, 256)
    base, reinforced = tiny.model(0), tiny.model(1)
    found = generic_rows(base, reinforced, rows, tiny.tokenizer, 5.0, ANCHORS)
    translated = QADataset(
        [QA(replaced(item.question, ANCHORS), replaced(item.answer, ANCHORS)) for item in items], tiny.tokenizer, 256
    )
    assert found[1]["labels"].equal(by_formula(tiny.model(0), tiny.model(1), rows[1], 5.0))  # without terms: as ever
    labels = by_formula(tiny.model(0), tiny.model(1), translated[0], 5.0)
    ids, other = rows[0]["input_ids"].tolist(), translated[0]["input_ids"].tolist()
    decode = tiny.tokenizer.decode
    kept = 0
    for t, label in enumerate(found[0]["labels"].tolist()):
        if rows[0]["labels"][t] == -100:
            assert label == -100
            continue
        before = decode(ids[:t])
        rest = decode(ids)[len(before) :].lstrip()
        # Of the text before, with terms replaced, the place there; inside of a term there is none.
        head = replaced(decode(ids), ANCHORS)
        tail = replaced(rest, ANCHORS)
        inside = not head.endswith(tail) or (rest[:1].islower() and before.endswith(("A", "Ad", "L", "Ada Love")))
        places = [u for u in range(len(other)) if decode(other)[len(decode(other[:u])) :].lstrip() == tail]
        if label != -100:
            assert not inside
            assert label in [int(labels[u]) for u in places]
            kept += 1
    assert kept > 5
    assert (found[0]["labels"] == -100).sum() >= (rows[0]["labels"] == -100).sum()


def test_a_term_of_the_prompts_own_words_is_told(tiny):
    rows = QADataset([QA("Who?", "It was she.")], tiny.tokenizer, 256)
    prompt = tiny.tokenizer.decode(rows[0]["input_ids"])
    word = next(word for word in prompt.replace(":", " ").split() if word.isalpha() and word not in "Who It was she")
    with pytest.raises(ValueError, match="a term is in the prompt's own words"):
        generic_rows(tiny.model(0), tiny.model(1), rows, tiny.tokenizer, 5.0, {word: "Else"})


def test_files_of_terms(tmp_path):
    file = tmp_path / "terms.json"
    file.write_text(json.dumps(ANCHORS))
    assert read_anchors(file) == ANCHORS
    assert read_anchors(None) is None
    with pytest.raises(FileNotFoundError, match=r"unlearn.reinforce.anchors: no such file: .*term.json.*terms.json"):
        read_anchors(tmp_path / "term.json")


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', '{"": "b"}', '{"a": ""}', '{"a": ', "1"])
def test_bad_files_of_terms(tmp_path, text):
    file = tmp_path / "terms.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"terms.json"):
        read_anchors(file)
