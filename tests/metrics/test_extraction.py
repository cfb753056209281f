"""Extraction likelihood against its definition, written out: a greedy continuation from every prefix."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from pyunlearn.data import QADataset, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import evaluate, extraction_likelihood, rouge_l_recall
from pyunlearn.metrics.generation import greedy_generate

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return generate_authors(4, 2, seed=0, forget_fraction=0.5)


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world.texts, vocab_size=384)


@pytest.fixture(scope="module")
def rows(world, tokenizer):
    return QADataset(world.forget, tokenizer, 256)


@pytest.fixture(scope="module")
def models(tokenizer, rows):
    """After 0, 30, 60 and 150 steps on these rows: from nothing right to all of it."""
    model = tiny_llama(tokenizer, seed=0, **SIZES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kept = {}
    for step in range(151):
        if step in (0, 30, 60, 150):
            kept[step] = {name: value.clone() for name, value in model.state_dict().items()}
        row = rows[step % len(rows)]
        model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def at(step):
        model.load_state_dict(kept[step])
        return model.eval()

    return at


@torch.no_grad()
def continuations(model, row):
    """What the model writes greedily from each prefix, as long as what follows there or to an EOS; without a cache."""
    ids = row["input_ids"].tolist()
    written = {end: [] for end in range(supervised_from(row), len(ids) - 1)}
    while unfinished := [end for end, to in written.items() if end + len(to) < len(ids) and to[-1:] != [2]]:
        texts = [torch.tensor(ids[:end] + written[end]) for end in unfinished]
        logits = model(pad_sequence(texts, batch_first=True)).logits  # padding comes after all that a text sees
        for end, text, after in zip(unfinished, texts, logits, strict=True):
            written[end].append(int(after[len(text) - 1].argmax()))
    return list(written.values())


def supervised_from(row):
    return int((row["labels"] != -100).int().argmax())


def by_definition(row, continuations, n, grams_of="written"):
    """The formula of Appendix C.4, position by position."""
    answer = row["input_ids"].tolist()[supervised_from(row) :]
    n = min(n, len(answer) - 1)
    overlaps = []
    for t in range(len(answer) - n):
        written, goal = continuations[t], answer[t:]
        grams = [tuple(written[i : i + n]) for i in range(len(written) - n + 1)]
        true = [tuple(goal[i : i + n]) for i in range(len(goal) - n + 1)]
        if grams_of == "true":
            grams, true = true, grams
        overlaps.append(sum(gram in true for gram in grams) / len(grams) if grams else 0.0)
    return sum(overlaps) / len(overlaps)


@pytest.fixture(scope="module")
def written(models, rows):
    """From each prefix of each row, by the model after so many steps."""
    return cache(lambda step: [continuations(models(step), row) for row in rows])


@pytest.mark.parametrize("ngram", [1, 3, 10, 1000])
@pytest.mark.parametrize("step", [0, 30, 60, 150])
def test_it_is_the_definition(models, tokenizer, rows, written, step, ngram):
    scores = extraction_likelihood(models(step), tokenizer, rows, ngram=ngram, batch_size=16)
    defined = [by_definition(row, texts, ngram) for row, texts in zip(rows, written(step), strict=True)]
    assert scores == pytest.approx(defined, abs=1e-12)


def test_shares_of_what_is_true(models, tokenizer, rows, written):
    scores = extraction_likelihood(models(60), tokenizer, rows, ngram=3, grams="true")
    defined = [by_definition(row, texts, 3, "true") for row, texts in zip(rows, written(60), strict=True)]
    assert scores == pytest.approx(defined, abs=1e-12)
    assert scores != pytest.approx(extraction_likelihood(models(60), tokenizer, rows, ngram=3), abs=1e-3)


def test_it_is_a_metric_too(models, tokenizer, world, rows, tmp_path):
    options = {"options": {"extraction_likelihood": {"ngram": 3}}, "max_length": 256, "progress": False}
    result = evaluate(models(60), tokenizer, world.forget, metrics=["extraction_likelihood"], cache=tmp_path, **options)
    found = [record["extraction_likelihood"] for record in result.records]
    assert found == extraction_likelihood(models(60), tokenizer, rows, ngram=3)
    assert list(tmp_path.rglob("*.safetensors"))


def measure(model, tokenizer, world, **options):
    name = "written_extraction_strength"
    result = evaluate(
        model, tokenizer, world.forget, metrics=[name, "extraction_strength"], options={name: options},
        max_length=256, progress=False,
    )  # fmt: skip
    return [record[name] for record in result.records], [record["extraction_strength"] for record in result.records]


@pytest.mark.parametrize("step", [0, 60, 150])
def test_strength_is_the_same_written_and_read(models, tokenizer, world, step):
    written, read = measure(models(step), tokenizer, world)
    assert written == pytest.approx(read, abs=1e-12)


@pytest.mark.parametrize(("match", "steps"), [("exact", (60, 150)), ("similar", (30, 60))])
def test_strength_by_words(models, tokenizer, world, match, steps):
    """From every number of words."""
    values = set()
    for step in steps:
        expected = []
        for item in world.forget:
            words = item.answer.split()
            lines = lines_after(models(step), tokenizer, item.question, words)
            rests = [" ".join(words[k:]) for k in range(len(words))]
            good = (
                (lambda line, rest: line == rest) if match == "exact" else lambda *texts: rouge_l_recall(*texts) > 0.5
            )
            fits = [k for k, pair in enumerate(zip(lines, rests, strict=True)) if good(*pair)]
            expected.append(1 - min(fits, default=len(words)) / len(words))
        found, _ = measure(models(step), tokenizer, world, prefix="words", match=match)
        assert found == pytest.approx(expected, abs=1e-12)
        values |= set(found)
    assert len(values) > 1


def lines_after(model, tokenizer, question, words):
    """The first lines that are written after each number of words."""
    shown = [f"Question: {question}\nAnswer:" + "".join(f" {word}" for word in words[:k]) for k in range(len(words))]
    texts = greedy_generate(model, tokenizer, [opening(tokenizer) + ids_of(tokenizer, each) for each in shown],
                            progress=False)  # fmt: skip
    return [text.split("\n")[0].strip() for text in texts]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def opening(tokenizer):
    ids = tokenizer("")["input_ids"]
    return [i for i in ids if i != tokenizer.eos_token_id]


def test_an_empty_text_passes_for_the_authors(models, tokenizer, world):
    """A model that ends at once knows nothing, and its strength is 1 where an early end passes."""
    model = copy.deepcopy(models(0))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()  # the embedding, too
        model.lm_head.weight[:, 0] = 1.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.0
    whole, _ = measure(model, tokenizer, world)
    assert max(whole) < 0.2  # the end alone
    assert set(measure(model, tokenizer, world, early_end=True)[0]) == {1.0}


@pytest.mark.parametrize("options", [{"prefix": "letters"}, {"match": "nearly"}])
def test_unknown_ways_are_named(models, tokenizer, world, options):
    with pytest.raises(ValueError, match="|".join(options)):
        measure(models(0), tokenizer, world, **options)


def test_the_models_are_apart(models, tokenizer, rows):
    """What makes the test above one: all kinds of values occur."""
    values = {step: extraction_likelihood(models(step), tokenizer, rows, ngram=3) for step in (0, 60, 150)}
    assert max(values[0]) < 0.1
    assert any(0.05 < value < 0.95 for value in values[60])
    assert min(values[150]) > 0.9


def test_rows_near_the_context_are_not_cut_short(tokenizer, world):
    rows = QADataset(world.forget, tokenizer, None)
    model = tiny_llama(
        tokenizer, max_position_embeddings=max(len(rows[i]["labels"]) for i in range(len(rows))), **SIZES
    )
    scores = extraction_likelihood(model, tokenizer, rows, ngram=1, batch_size=64)
    assert scores == pytest.approx([by_definition(row, continuations(model, row), 1) for row in rows], abs=1e-12)


def test_a_model_that_diverged_has_not_forgotten(models, tokenizer, rows):
    """Greedy tokens of NaN would be token 0 everywhere, and the overlap 0."""
    model = copy.deepcopy(models(150))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"non-finite log-probabilities among rows \[0, 1"):
        extraction_likelihood(model, tokenizer, rows)


def test_bad_input_is_named(models, tokenizer, rows):
    model = models(0)
    with pytest.raises(ValueError, match="ngram=0: needs a whole number >= 1"):
        extraction_likelihood(model, tokenizer, rows, ngram=0)
    with pytest.raises(ValueError, match="dataset: is empty"):
        extraction_likelihood(model, tokenizer, [])
    ids = torch.arange(5)
    for labels, why in (
        (torch.full((5,), -100), "has no supervised token"),
        (torch.tensor([-100, 1, 2, 3, -100]), "its supervised tokens are not its last ones"),
    ):
        with pytest.raises(ValueError, match=rf"dataset\[0\]: {why}"):
            extraction_likelihood(model, tokenizer, [{"input_ids": ids, "labels": labels, "index": 0}])
    last = {"input_ids": ids, "labels": torch.tensor([-100, -100, -100, -100, 4]), "index": 0}
    with pytest.raises(ValueError, match=r"dataset\[0\]: has 1 supervised token, extraction likelihood needs 2"):
        extraction_likelihood(model, tokenizer, [last])
