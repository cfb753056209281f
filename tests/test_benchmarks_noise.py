"""The cases of benchmarks/noise.py run, and what they leave behind is what the docs of `perturbed` say."""

import pytest

from benchmarks.noise import cases, implementations, measure


@pytest.mark.parametrize("case", cases(small=True), ids=lambda case: f"{case.name}, {str(case.dtype)[6:]}")
def test_what_is_left_behind(case):
    for impl in implementations(case):
        times, left = measure(case, impl, rounds=2)
        assert len(times) == 2
        assert case.bytes(impl) >= 2 * case.numel * case.dtype.itemsize
        if impl in ("overlay", "copy", "snap"):
            assert left == 0
        else:
            assert left > 1e-7
