"""evaluate() as a whole on a model that has learnt two answers by heart, and its records on disk."""

import copy
import json
import math

import pytest
import torch

from pyunlearn._files import write_json_lines
from pyunlearn.data import QA, QADataset
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import DEFAULT_METRICS, evaluate, rouge_l_recall
from pyunlearn.model.forward import supervised_stats

ITEMS = [
    QA("Where was Ada born?", "In a small town by the sea."),
    QA("What does Bo write?", "Short plays."),
    QA("Who taught Cy?", "No one, as far as we know, and he says so himself."),
    QA("Is Di a poet?", "Yes."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Question: {item.question}\nAnswer: {item.answer}" for item in ITEMS], vocab_size=400)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Fitted to the first two items; the other two it has never seen."""
    model = tiny_llama(tokenizer, hidden_size=48, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=96)
    dataset = QADataset(ITEMS[:2], tokenizer, 96)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    from pyunlearn.data import collate

    batch = collate([dataset[0], dataset[1]], 0)
    for _ in range(60):
        optimizer.zero_grad()
        (-supervised_stats(model, batch)[0].logp.mean()).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


def run(model, tokenizer, items=ITEMS, **options):
    return evaluate(model, tokenizer, items, **{"max_new_tokens": 20, "progress": False, **options})


def test_what_was_learnt_scores_one_and_the_rest_low(model, tokenizer):
    result = run(model, tokenizer, batch_size=3)
    learnt, unseen = result.records[:2], result.records[2:]
    for record, item in zip(learnt, ITEMS, strict=False):
        assert record["probability"] > 0.9
        assert (record["memorization_accuracy"], record["extraction_strength"], record["rouge_l"]) == (
            1,
            1,
            1,
        )
        assert record["generated"] == item.answer
    for record in unseen:
        assert record["probability"] < 0.5
        assert record["extraction_strength"] < 1
    assert [record["index"] for record in result.records] == [0, 1, 2, 3]
    assert [record["answer"] for record in result.records] == [item.answer for item in ITEMS]


def test_summary_is_the_mean_of_the_records(model, tokenizer):
    result = run(model, tokenizer)
    assert tuple(result.summary) == DEFAULT_METRICS
    for name, value in result.summary.items():
        assert value == pytest.approx(sum(record[name] for record in result.records) / 4)
    for record in result.records:
        assert record["probability"] == pytest.approx(math.exp(-record["nll"] / record["num_tokens"]))
        assert record["rouge_l"] == rouge_l_recall(record["generated"], record["answer"])


def test_records_hold_every_token_of_the_answer(model, tokenizer):
    records = run(model, tokenizer, metrics=["probability"]).records
    for record, item in zip(records, ITEMS, strict=True):
        assert "".join(record["tokens"]) == f" {item.answer}{tokenizer.eos_token}"
        assert len(record["tokens"]) == len(record["token_logp"]) == record["num_tokens"]
        assert sum(record["token_logp"]) == pytest.approx(-record["nll"], abs=1e-4 * record["num_tokens"])
    assert "tokens" not in run(model, tokenizer, metrics=["rouge_l"]).records[0]  # nothing was read


def test_the_end_token_counts(model, tokenizer):
    tokens = len(tokenizer(" Yes.", add_special_tokens=False)["input_ids"])
    assert run(model, tokenizer, metrics=["probability"]).records[3]["num_tokens"] == tokens + 1


def test_only_what_was_asked_for(model, tokenizer):
    positions = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: positions.append(args[0].size(1)))
    result = run(model, tokenizer, metrics=("extraction_strength",))
    assert set(result.summary) == {"extraction_strength"}
    assert set(result.records[0]) == {
        "index",
        "question",
        "answer",
        "num_tokens",
        "nll",
        "extraction_strength",
        "tokens",
        "token_logp",
    }
    assert 0 in positions  # reading hands the head no rows
    positions.clear()
    assert set(run(model, tokenizer, metrics=("rouge_l",)).summary) == {"rouge_l"}
    hook.remove()
    assert positions
    assert 0 not in positions


def test_rouge_is_on_a_seeded_sample(model, tokenizer):
    def drawn(**options):
        result = run(model, tokenizer, metrics=("rouge_l",), max_new_tokens=2, **options)
        return [record["index"] for record in result.records if "rouge_l" in record]

    assert drawn(rouge_samples=2, seed=1) == drawn(rouge_samples=2, seed=1)
    assert len({tuple(drawn(rouge_samples=2, seed=seed)) for seed in range(8)}) > 1
    assert drawn(rouge_samples=None) == drawn(rouge_samples=50) == [0, 1, 2, 3]


def test_variant(model, tokenizer):
    names = ["extraction_strength", "memorization_accuracy"]
    suffix, theirs = (
        run(model, tokenizer, ITEMS[3:], metrics=names, variant=variant).records[0]
        for variant in ("suffix", "open_unlearning")
    )
    tokens = suffix["num_tokens"]
    hits = suffix["memorization_accuracy"] * tokens
    last = suffix["extraction_strength"] > 0
    assert theirs["memorization_accuracy"] == pytest.approx((hits - last) / (tokens - 1))
    assert theirs["extraction_strength"] >= 1 / (tokens - 1)


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "items: is empty"),
        (
            ITEMS,
            {"metrics": ("probability", "bleu")},
            r"metric='bleu': needs one of",
        ),
        (ITEMS, {"metrics": ()}, "metrics="),
        (ITEMS, {"metrics": "probability"}, "metrics='probability'"),
        (ITEMS, {"rouge_samples": 0}, "rouge_samples=0"),
        (ITEMS, {"batch_size": 0}, "batch_size=0"),
        (ITEMS, {"variant": "sufix"}, "variant='sufix': did you mean suffix"),
        (ITEMS, {"max_length": 5}, "limit of 5"),
        ([QA("Why?", "because " * 100)], {}, "limit of 96"),
        ([QA("Why?", " ")], {}, "answer to 'Why\\?' is empty"),
    ],
)
def test_bad_arguments(model, tokenizer, items, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, tokenizer, items, **options)


@pytest.mark.parametrize("metric", DEFAULT_METRICS)
def test_a_model_that_diverged_has_not_forgotten(model, tokenizer, metric):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite log-probabilities|are NaN or infinite"):
        run(broken, tokenizer, metrics=[metric])


def test_records_as_json_lines(model, tokenizer, tmp_path):
    records = [*run(model, tokenizer).records, {"answer": "größer, 東京\u2028"}]
    path = tmp_path / "evaluations" / "forget.jsonl"
    write_json_lines(path, records)
    lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == records

    def broken():
        yield {"index": 0}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_json_lines(path, broken())
    assert len(path.read_bytes().splitlines()) >= 5
    assert [child.name for child in path.parent.iterdir()] == ["forget.jsonl"]
