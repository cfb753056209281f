"""Mixtures against fp64, both ends to the bit, and the search on curves that go up and down."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyunlearn.calibration import blend, mix, scale_adapter, search, stored, write_tensors
from pyunlearn.data.tiny import tiny_llama
from pyunlearn.model.lora import add_adapter, merge, read_adapter

from ..resident import Peak
from ..tiny import SIZES


@pytest.fixture
def two(tiny, tmp_path):
    """A model, and files of it and of another."""
    before, after = tiny.model(seed=0), tiny.model(seed=1)
    return tiny.model(seed=2), write_tensors(before, tmp_path / "before"), write_tensors(after, tmp_path / "after")


def test_ends_are_the_models_to_the_bit(two):
    model, before, after = two
    for a, source in ((1.0, after), (0.0, before), (0.3, None), (0.0, before), (1.0, after)):
        mix(model, before, after, a)
        for tensor, names in stored(model).values() if source else ():
            assert torch.equal(tensor, source.read(names))


@pytest.mark.parametrize("a", [0.1, 0.5, 0.93])
def test_mixtures_are_those_of_fp64(two, a):
    model, before, after = two
    mix(model, before, after, a)
    for tensor, names in stored(model).values():
        first, second = before.read(names).double(), after.read(names).double()
        exact = (1 - a) * first + a * second
        # four roundings of half an eps: of a, the difference, the product, the sum
        bound = 2 * torch.finfo(torch.float32).eps * (first.abs() + second.abs())
        assert bool(((tensor.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(500, generator=generator).to(dtype) for _ in range(2))
    exact = 0.7 * before.double() + 0.3 * after.double()
    found = blend(before, after, 0.3)
    assert found.dtype == dtype
    assert bool(
        ((found.double() - exact).abs() <= torch.finfo(dtype).eps * (before.abs() + after.abs()).double()).all()
    )
    assert torch.equal(blend(before, before.clone(), 0.3), before)  # what unlearning has left alone stays so


def test_integers_are_not_mixed():
    one, two = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert torch.equal(blend(one, one.clone(), 0.5), one)
    assert torch.equal(blend(one, two, 1), two)
    with pytest.raises(ValueError, match="int64 differ, which cannot be mixed"):
        blend(one, two, 0.5)


def test_models_are_read_a_tensor_at_a_time(tmp_path):
    model = tiny_llama(64, **{**SIZES, "num_hidden_layers": 16})
    whole = sum(tensor.nbytes for tensor, _ in stored(model).values())
    largest = max(tensor.nbytes for tensor, _ in stored(model).values())
    assert whole > 64 * largest
    before, after = write_tensors(model, tmp_path / "before"), write_tensors(model, tmp_path / "after")
    with Peak() as streamed:
        mix(model, before, after, 0.3)
    assert 2 * largest <= streamed.bytes <= 8 * largest  # of one name: both, the difference, what comes of it
    with Peak() as loaded:  # what it must not be is seen, though files are mapped and not copied
        both = [load_file(path) for place in (before, after) for path in set(place.files.values())]
        model.model.embed_tokens.weight.detach().copy_(both[0]["model.embed_tokens.weight"])
    assert loaded.bytes >= 2 * whole


def test_a_outside_of_its_range(two):
    for a in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"a=.*: needs a number from 0, the original, to 1"):
            mix(*two, a)


def test_an_adapter_is_scaled(tiny, tmp_path):
    base = tiny.model()
    adapted = add_adapter(tiny.model(), r=2, seed=1, base="base")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    for a in (0.0, 0.25, 1.0):
        scale_adapter(tmp_path / "adapter", tmp_path / f"at-{a}", a)
        scaled = merge(read_adapter(tiny.model(), tmp_path / f"at-{a}"))
        whole = merge(read_adapter(tiny.model(), tmp_path / "adapter"))
        for (name, weight), other, start in zip(
            scaled.named_parameters(), whole.parameters(), base.parameters(), strict=True
        ):
            exact = (1 - a) * start.double() + a * other.double()
            assert torch.allclose(weight.double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item()), name
    one, same = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "at-1.0"))
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_an_adapter_of_more_than_two_factors_is_refused(tiny, tmp_path):
    adapted = add_adapter(tiny.model(), r=2, base="base", use_dora=True)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match="more than two factors"):
        scale_adapter(tmp_path / "adapter", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_the_largest_that_passes_is_found_within_the_tolerance():
    asked = []

    def score(a):
        asked.append(a)
        return 1 - a

    result = search(score, 0.63, tolerance=1e-3)
    assert 0.37 - 1e-3 <= result.a <= 0.37
    assert asked[:11] == [i / 10 for i in range(11)]
    assert len(asked) == len(set(asked)) == 11 + 7
    assert list(result.scores) == sorted(asked)
    assert result.monotone
    assert result.limit == pytest.approx(0.63)


def test_a_curve_that_comes_back_keeps_its_largest():
    curve = [1.0, 0.5, 0.96, 0.4, 0.3, 0.3, 0.97, 0.2, 0.1, 0.1, 0.1]
    result = search(lambda a: curve[math.floor(a * 10 + 1e-9)], 0.95, tolerance=0.02)
    assert 0.68 <= result.a < 0.7
    assert not result.monotone


@given(st.lists(st.floats(0, 1), min_size=11, max_size=11), st.floats(0.05, 1))
def test_of_any_curve_what_is_kept_passes_and_no_larger_grid_point_does(curve, share):
    def score(a):  # straight lines between the grid's points
        at = min(int(a * 10), 9)
        return curve[at] + (a * 10 - at) * (curve[at + 1] - curve[at])

    result = search(score, share)
    assert result.scores[result.a] >= result.limit == share * score(0.0)
    assert {0.0, 1.0} <= result.scores.keys()
    assert all(result.scores[i / 10] < result.limit for i in range(11) if i / 10 > result.a)
    assert result.a == 1 or any(a > result.a and a - result.a <= 0.01 + 1e-12 for a in result.scores)


def test_ends_of_the_search():
    assert search(lambda a: 1.0, 0.95).a == 1
    assert search(lambda a: float(a == 0), 0.95, tolerance=0.04).a == 0
    assert search(lambda a: 0.0, 0.95).a == 1  # nothing was known, so nothing is lost


def test_bad_arguments_of_the_search():
    for share in (0, 1.2, math.nan):
        with pytest.raises(ValueError, match="target="):
            search(lambda a: 1, share)
    for points in (0, 1001):
        with pytest.raises(ValueError, match=f"points={points}: needs 1 to 1000"):
            search(lambda a: 1, 0.9, points=points)
    with pytest.raises(ValueError, match="tolerance=0"):
        search(lambda a: 1, 0.9, tolerance=0)
    with pytest.raises(ValueError, match=r"score\(0\.1\)=nan: needs a number"):
        search(lambda a: math.nan if a else 1.0, 0.9)
