"""Sampled texts against a loop without cache or batch, and against the distribution that they are drawn from."""

import random
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from pyunlearn.metrics import greedy_tokens, sample_tokens
from pyunlearn.metrics import sampled as module
from pyunlearn.store import Store, digest_json

from .test_generation import gpt2, llama, tokenizer  # noqa: F401 (fixture)

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [5, 6]]


def peaked(model, factor=2.0):
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    return model


@torch.no_grad()
def one_by_one(model, prompt, j, temperature, seed, most, end):
    """A sample token by token: the first whose summed probability is above the random number."""
    numbers, ids = random.Random(f"{seed}/{digest_json(list(prompt))}/{j}"), list(prompt)
    model.eval()
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != end):
        p = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
        at, total, token = numbers.random(), float(p[0]), 0
        while total <= at:
            token += 1
            total += float(p[token])
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("build", [llama, gpt2])
def test_in_batches_as_one_by_one(tokenizer, build):  # noqa: F811
    model = peaked(build(tokenizer))
    state = torch.get_rng_state()
    texts = sample_tokens(
        model, tokenizer, PROMPTS, count=3, temperature=0.7, max_new_tokens=9, seed=4, batch_size=7, progress=False
    )
    assert torch.equal(torch.get_rng_state(), state)
    end = tokenizer.eos_token_id
    assert texts == [[one_by_one(model, prompt, j, 0.7, 4, 9, end) for j in range(3)] for prompt in PROMPTS]
    assert len({tuple(text) for own in texts for text in own}) > 6
    again = sample_tokens(
        model, tokenizer, PROMPTS[2:3], count=3, temperature=0.7, max_new_tokens=9, seed=4, progress=False
    )
    assert again == texts[2:3]
    other = sample_tokens(
        model, tokenizer, PROMPTS[2:3], count=3, temperature=0.7, max_new_tokens=9, seed=5, progress=False
    )
    assert other != again


def test_tokens_come_as_often_as_they_are_likely(tokenizer):  # noqa: F811
    model, prompt, count = peaked(llama(tokenizer), 3.0).eval(), [5, 6, 7], 4000
    found = sample_tokens(
        model, tokenizer, [prompt], count=count, temperature=1.5, max_new_tokens=1, batch_size=4000, progress=False
    )
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 1.5).softmax(-1)
    counts = Counter(tokens[0] for tokens in found[0])
    likely = [token for token in range(len(p)) if p[token] * count > 5]
    seen = [counts[token] for token in likely] + [count - sum(counts[token] for token in likely)]
    expected = [float(p[token]) * count for token in likely]
    assert chisquare(seen, [*expected, count - sum(expected)]).pvalue > 1e-3
    assert len(likely) > 5


def test_cold_is_greedy(tokenizer):  # noqa: F811
    model = peaked(llama(tokenizer), 20.0)
    options = {"max_new_tokens": 6, "progress": False}
    cold = sample_tokens(model, tokenizer, PROMPTS, temperature=1e-6, **options)
    assert [own[0] for own in cold] == greedy_tokens(model, tokenizer, PROMPTS, **options)


def test_what_is_kept_is_not_drawn_again_and_a_kill_changes_no_bit(tokenizer, tmp_path, monkeypatch):  # noqa: F811
    model = peaked(llama(tokenizer))
    options = {"count": 2, "max_new_tokens": 5, "seed": 1, "batch_size": 4, "progress": False}
    whole = sample_tokens(model, tokenizer, PROMPTS, store=Store(tmp_path / "whole"), **options)
    store, puts = Store(tmp_path / "killed"), []

    def put(name, value, identity=None):
        if len(puts) == 3:  # in the middle of a batch
            raise KeyboardInterrupt
        puts.append(name)
        return Store.put(store, name, value, identity)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", put)
        with pytest.raises(KeyboardInterrupt):
            sample_tokens(model, tokenizer, PROMPTS, store=store, **options)
    assert len(store.names()) == 3
    resumed = sample_tokens(model, tokenizer, PROMPTS, store=Store(tmp_path / "killed"), **options)
    assert resumed == whole
    monkeypatch.setattr(module, "write", None)
    assert sample_tokens(model, tokenizer, PROMPTS + PROMPTS[:1], store=store, **options) == whole + whole[:1]


def test_a_text_ends_with_the_context(tokenizer):  # noqa: F811
    model = llama(tokenizer)
    prompts = [list(range(5, 45)), [5, 6]]
    texts = sample_tokens(model, tokenizer, prompts, max_new_tokens=30, progress=False)
    assert len(texts[0][0]) <= 8
    assert texts[0] == sample_tokens(model, tokenizer, prompts[:1], max_new_tokens=30, progress=False)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0: needs a whole number >= 1"),
        ({"temperature": 0.0}, "temperature=0.0: needs a finite number > 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"prompts": [[]]}, r"prompts\[0\]: has 0 tokens"),
        ({"prompts": [list(range(48))]}, r"prompts\[0\]: has 48 tokens, needs 1 or more, fewer than the context, 48"),
    ],
)
def test_bad_input(tokenizer, options, message):  # noqa: F811
    prompts = options.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=message):
        sample_tokens(llama(tokenizer), tokenizer, prompts, progress=False, **options)


def test_nan_logits_are_told(tokenizer):  # noqa: F811
    model = llama(tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[11] = float("nan")
    with pytest.raises(ValueError, match=r"its logits after prompts \[0, 1\] are NaN or infinite"):
        sample_tokens(model, tokenizer, [[5, 6], [10, 11]], max_new_tokens=2, progress=False)
