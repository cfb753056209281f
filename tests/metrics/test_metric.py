"""A metric of one's own: registered by name, given what its parameters name, and told what is wrong with them."""

from __future__ import annotations

import re
from typing import Literal

import pytest

from pyunlearn.data import QA
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import METRICS, Measure, Suite, Told, evaluate, evaluate_suite, get_metric, metric
from pyunlearn.runs.evaluate_config import EvaluateConfig

ITEMS = [QA("Where was Ada born?", "By the sea.", "At sea.", ("In town.", "On a hill.")), QA("Is Di a poet?", "Yes.")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64)


@pytest.fixture
def own():
    """Metrics registered inside a test are gone after it."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def run(model, tokenizer, items, *names, **options):
    return evaluate(model, tokenizer, items, metrics=names, max_new_tokens=3, progress=False, **options)


def test_a_metric_gets_what_it_names(model, tokenizer, own):
    @metric(outputs=("entropy",))
    def surprise(item, answer, paraphrase, *, scale=1.0):
        """How unexpected the answer is."""
        same = item.paraphrased_answer is None
        assert (answer is paraphrase) is same or (answer.num_tokens == paraphrase.num_tokens) is same
        return scale * float(answer.more["entropy"].sum())

    @metric(batched=True)
    def length(written, ruler):
        return [ruler(text) for text in written]

    once = run(model, tokenizer, ITEMS, "surprise", "length", tools={"ruler": len})
    twice = run(model, tokenizer, ITEMS, "surprise", options={"surprise": {"scale": 2.0}})
    assert twice.summary["surprise"] == pytest.approx(2 * once.summary["surprise"])
    assert [record["length"] for record in once.records] == [len(record["generated"]) for record in once.records]
    assert get_metric("surprise").summary == "How unexpected the answer is."


def test_tools_with_a_default_may_be_left_out_and_a_metric_may_tell_more(model, tokenizer, own):
    @metric()
    def told_of(item, tokenizer, extra=5):
        return Told(
            None if "Di" in item.question else float(extra), {"words": len(tokenizer(item.answer)["input_ids"])}
        )

    assert get_metric("told_of").required_tools == ()
    for tools, value in (({}, 5), ({"extra": 7}, 7), ({"extra": None}, 5)):
        result = run(model, tokenizer, ITEMS, "told_of", tools=tools)
        assert result.summary["told_of"] == value
        assert ["told_of" in record for record in result.records] == [True, False]
        assert [record["words"] for record in result.records] == [
            len(tokenizer(item.answer)["input_ids"]) for item in ITEMS
        ]


def test_samples_without_a_value_are_left_out(model, tokenizer, own):
    @metric()
    def only_ada(item):
        return 1.0 if "Ada" in item.question else None

    result = run(model, tokenizer, ITEMS, "only_ada")
    assert result.summary["only_ada"] == 1.0
    assert ["only_ada" in record for record in result.records] == [True, False]


def test_what_is_wrong_is_told(model, tokenizer, own):
    @metric()
    def harder(wrong):
        return float(len(wrong))

    @metric()
    def judged(written, judge):
        return judge(written)

    assert run(model, tokenizer, ITEMS[:1], "harder").summary["harder"] == 2.0
    with pytest.raises(ValueError, match=r"metric 'harder': items: 1 of 2 have no perturbed_answer \(first: item 1"):
        run(model, tokenizer, ITEMS, "harder")
    with pytest.raises(ValueError, match="metric 'judged': needs judge, which was not given"):
        run(model, tokenizer, ITEMS, "judged")
    with pytest.raises(ValueError, match="option of harder='varient'"):
        run(model, tokenizer, ITEMS[:1], "harder", options={"harder": {"varient": 1}})
    with pytest.raises(ValueError, match="options='judgd': did you mean judged"):
        run(model, tokenizer, ITEMS[:1], "judged", options={"judgd": {}})
    with pytest.raises(ValueError, match="metric 'judged' is there already"):
        metric("judged")(judged)
    with pytest.raises(ValueError, match="tools='refrence': did you mean reference"):
        run(model, tokenizer, ITEMS, "probability", tools={"refrence": len})
    suite = Suite("own", "", (Measure("a", "probability"),))
    with pytest.raises(ValueError, match="tools='embeder': did you mean embedder"):
        evaluate_suite(model, tokenizer, {"forget": ITEMS}, suite, tools={"embeder": len}, progress=False)
    with pytest.raises(ValueError, match="sets='forgett': did you mean forget"):
        evaluate_suite(model, tokenizer, {"forget": ITEMS, "forgett": ITEMS}, suite, progress=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("min_k", {"k": 40}, "option of min_k: k=40: needs a share, above 0 and 1 at most"),
        ("min_k", {"k": "0.4"}, "option of min_k: k='0.4': needs a share"),
        ("min_k", {"k": True}, "option of min_k: k=True: needs a share"),
        ("min_k", {"variant": "sufix"}, "option of min_k: variant='sufix': did you mean suffix"),
        ("min_k_plus_plus", {"k": 0}, "option of min_k_plus_plus: k=0: needs"),
        ("text_min_k", {"k": float("nan")}, "option of text_min_k: k=nan: needs"),
        ("truth_ratio", {"epsilon": "1e-10"}, "option of truth_ratio: epsilon='1e-10': needs a finite number >= 0"),
        ("truth_ratio", {"epsilon": -1e-10}, "option of truth_ratio: epsilon=-1e-10: needs a finite number >= 0"),
        ("probability_w_options", {"epsilon": None}, "epsilon=None: needs a finite number >= 0"),
        ("extraction_likelihood", {"ngram": 0}, "ngram=0: needs a whole number >= 1"),
        ("text_perplexity", {"window": 1}, "window=1: needs a whole number >= 2"),
        ("rouge_l", {"longest": 2.5}, "longest=2.5: needs a whole number >= 1 or None"),
        ("rouge_l", {"stemmed": "no"}, "stemmed='no': needs true or false"),
        ("clean", {"label": 1}, "label=1: needs a text"),
        ("fluency", {"least_known": 2}, "least_known=2: needs a number from 0 to 1"),
        ("written_extraction_strength", {"prefix": "words", "early_end": True}, "early_end=True: is of tokens"),
    ],
)
def test_values_of_options_are_checked_before_anything_is_measured(model, tokenizer, own, name, options, message):
    @metric()
    def first(item):
        pytest.fail("it was measured")

    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(model, tokenizer, ITEMS, metrics=["first", name], options={name: options}, progress=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluateConfig(metrics=[name], options={name: options}, classifier="c")
    suite = Suite("own", "", (Measure("a", "first"), Measure("b", name, options=options)))
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate_suite(model, tokenizer, {"forget": ITEMS}, suite, progress=False)


def test_options_of_ones_own_are_held_to_what_they_say(own):
    @metric("mine")
    def mine(item, *, times: int | None = 2, kind: Literal["a", "b"] = "a", free=None, odd: list[int] = ()):
        return 1.0

    get_metric("mine").check_options({"times": None, "kind": "b", "free": object(), "odd": [1]})
    for options in ({"times": 1.5}, {"kind": "c"}, {"twice": 1}):
        with pytest.raises(ValueError, match="option of mine"):
            get_metric("mine").check_options(options)
    for each in METRICS.values():
        each.check_options(each.options)  # defaults are allowed
        assert each.name == "mine" or each.domains.keys() == each.options.keys()
