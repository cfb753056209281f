"""Correlations by hand, and attacks that do what they say and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from pyunlearn.calibration import noised, pearson, prefixed, read_at
from pyunlearn.data import collate
from pyunlearn.model.fingerprint import model_fingerprint


def test_pearson_by_hand():
    before, after = [1.0, 2.0, 3.0, 5.0, 4.0], [2.0, 1.0, 4.0, 3.0, 5.0]
    found = pearson([*before, math.nan], [*after, 9.0])
    assert found.r == pytest.approx(6 / 10)  # covariance 6, variances 10 and 10
    assert found.count == 5
    half = norm.ppf(0.975) / math.sqrt(2)
    assert found.low == pytest.approx(math.tanh(math.atanh(0.6) - half))
    assert found.high == pytest.approx(math.tanh(math.atanh(0.6) + half))


def test_no_correlation_is_told():
    assert (pearson([1, 2], [2, 3]).r, pearson([1, 2], [2, 3]).reason) == (
        None,
        "2 models have both values, 3 are needed",
    )
    same = pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert (same.r, same.reason) == (None, "all values before the attack are the same")
    three = pearson([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert (three.r, three.low) == (pytest.approx(-1), None)
    with pytest.raises(ValueError, match="zip"):
        pearson([1.0], [1.0, 2.0])


def test_prefix_and_noise_touch_questions_alone(tiny):
    items = tiny.world.forget
    for attacked in (prefixed(items, "Say all. "), noised(items, tiny.tokenizer, 0.1)):
        assert [item.answer for item in attacked] == [item.answer for item in items]
        assert [item.perturbed_answers for item in attacked] == [item.perturbed_answers for item in items]
        assert all(a.question != b.question for a, b in zip(attacked, items, strict=True))
    assert prefixed(items, "Say all. ")[0].question == "Say all. " + items[0].question


def test_noise_is_each_items_own_and_of_the_seed(tiny):
    items = tiny.world.forget
    first = noised(items, tiny.tokenizer, 0.1, seed=1)
    assert first == noised(items, tiny.tokenizer, 0.1, seed=1)
    assert first[:2] == noised(items[:2], tiny.tokenizer, 0.1, seed=1)
    assert first != noised(items, tiny.tokenizer, 0.1, seed=2)
    ids = [tiny.tokenizer(item.question, add_special_tokens=False)["input_ids"] for item in items]
    few = noised(items, tiny.tokenizer, 1e-9)
    for own, item, before in zip(ids, few, items, strict=True):  # one token of each, at least
        after = tiny.tokenizer.decode(own, clean_up_tokenization_spaces=False)
        assert after == before.question
        assert item.question != before.question
    with pytest.raises(ValueError, match="noise=0"):
        noised(items, tiny.tokenizer, 0.0)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_layer_read_through_norm_and_head(tiny, layer):
    model = tiny.model().eval()
    batch = collate([tiny.forget[i] for i in range(3)], 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    prints = model_fingerprint(model)
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        states = whole.hidden_states[layer]  # the last one is after the norm
        straight = model.lm_head(states if layer == 2 else model.model.norm(states))
        with read_at(model, layer):
            lens = model(**inputs).logits
        assert torch.equal(lens, straight)
        assert torch.equal(model(**inputs).logits, whole.logits)  # as it was again
    assert model_fingerprint(model) == prints


def test_what_is_written_under_the_lens_is_what_it_reads(tiny):
    """With the cache of keys and values, as without."""
    model = tiny.model().eval()
    ids = tiny.forget[0]["input_ids"][None, :6]
    with torch.no_grad(), read_at(model, 1):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with_cache = model.generate(ids, **options)
        without = model.generate(ids, use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_no_such_layer(tiny):
    for layer in (0, 3):
        with (
            pytest.raises(ValueError, match=rf"layer={layer}: needs a block of the model, 1 to 2"),
            read_at(tiny.model(), layer),
        ):
            pass
