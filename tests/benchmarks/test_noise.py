"""The cases of benchmarks/noise.py run, and what they leave behind is what the docs of `perturbed` say."""

import pytest

from benchmarks.kernels.noise import SIGMA, Perturb
from benchmarks.kernels.plans import weights

CASES = [case for case in weights("cpu", small=True) if isinstance(case, Perturb)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {str(case.dtype)[6:]}")
def test_what_is_left_behind(case):
    for name, impl in case.implementations().items():
        runs = [case.fresh(), *map(case.fresh, range(3))]
        assert len({t["draw"] for t in runs}) == len(runs)
        for t in runs:
            impl.run(case, t)
        case.done()
        left = (runs[0]["weights"][0].detach().flatten().double() - case.start).square().mean().sqrt() / SIGMA
        assert (left == 0) == name.startswith("cpu"), name
