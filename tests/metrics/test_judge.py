"""Judges: what they are asked, what of their answers counts, and that nothing is guessed."""

from __future__ import annotations

import json
import logging

import pytest

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import evaluate, hallucination, naturalness, similarity
from pyunlearn.metrics.judge import PROMPTS, score_of, verdict_of

from .test_endpoint import at, reply, said_in, server  # noqa: F401 (a fixture)

ITEMS = [QA("Where was Ada born?", "By the sea."), QA("Is Di a poet?", "Yes."), QA("Who taught Cy?", "No one.")]
WRITTEN = ["At the sea.", "I do not know.", "Bo did."]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"reason": "fine", "score": 4}', 4),
        ('```json\n{"reason": "fine", "score": "2"}\n```', 2),
        ('Thinking {of it}: {"score": 1}, no: {"score": 3}', 3),
        ("5", 5),
        (" 0\n", 0),
        ('{"score": 3.5}', 3.5),
        ('{"score": 6}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": null}', None),
        ('{"score": 1%s}' % ("0" * 400), None),
        ('{"score": NaN}', None),
        ('{"reason": "fine"}', None),
        ('{"score": 4', None),
        ("four", None),
        ("between 3 and 4", None),
        ("", None),
        ("{" * 200_000, None),  # at once
        ("{" * 5000 + '{"score": 3}', 3),
    ],
)
def test_scores(said, score):
    assert score_of(said) == score


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ('{"reason": "it contradicts", "verdict": "YES"}', 1),
        ('{"verdict": "no"}', 0),
        ("YES.", 1),
        ("No", 0),
        ('{"verdict": "MAYBE"}', None),
        ("YES, because NO", None),
        ('{"verdict": 1}', None),
        ("", None),
    ],
)
def test_verdicts(said, verdict):
    assert verdict_of(said) == verdict


def test_each_judge_sees_its_texts_and_the_record_says_what_was_asked(server):  # noqa: F811
    judge = at(server)
    server.answer = lambda path, body: (200, reply('{"score": 4, "verdict": "NO"}', path), {})
    for metric, sees_reference in ((naturalness, False), (similarity, True), (hallucination, True)):
        told = metric(ITEMS, WRITTEN, judge)
        name = metric.__name__
        assert [each.value for each in told] == [0.0 if metric is hallucination else 4.0] * 3
        for each, item, text in zip(told, ITEMS, WRITTEN, strict=True):
            judged = each.more[f"{name}_judged"]
            system, user = judged["messages"]
            assert system == {"role": "system", "content": PROMPTS[name].criteria}
            assert item.question in user["content"]
            assert text in user["content"]
            assert (item.answer in user["content"]) == sees_reference
            assert (judged["url"], judged["model"], judged["version"]) == (judge.url, "judge-1", PROMPTS[name].version)
            assert judged["said"] == '{"score": 4, "verdict": "NO"}'
    assert {body["temperature"] for _, body in server.asked} == {0}
    assert len(server.asked) == 9


def test_what_is_no_judgement_is_no_value_and_is_counted(server, caplog):  # noqa: F811
    tokenizer = train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=300)
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)
    said = {"Ada": '{"score": 5}', "Di": "I cannot judge this.", "Cy": '{"score": 2}'}
    server.answer = lambda path, body: (
        200, reply(next(text for name, text in said.items() if name in said_in(body)), path), {}
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "pyunlearn"):
        result = evaluate(
            model, tokenizer, ITEMS, metrics=["naturalness"], tools={"judge": at(server)}, max_new_tokens=3,
            progress=False,
        )  # fmt: skip
    assert result.summary["naturalness"] == 3.5
    assert ["naturalness" in record for record in result.records] == [True, False, True]
    assert result.records[1]["naturalness_judged"]["said"] == "I cannot judge this."
    json.dumps(result.records)
    assert f"naturalness: 1 of 3 answers of {server.url} hold no judgement" in caplog.text
    assert "I cannot judge this." in caplog.text
    with pytest.raises(ValueError, match="metric 'naturalness': needs judge, which was not given"):
        evaluate(model, tokenizer, ITEMS, metrics=["naturalness"], progress=False)
