"""Inputs of runs, and what a run leaves behind."""

import pytest
import torch

from benchmarks.kernels import cases
from benchmarks.kernels.cases.noise import SIGMA, Perturb
from benchmarks.kernels.plans import weights

PERTURBED = [case for case in weights("cpu", small=True) if isinstance(case, Perturb)]


def test_runs_rotate_and_reset():
    case = cases.Logits(cases.NLL, torch.float32, 2, 50)
    case.windows = 3
    one, two = case.fresh(0), case.fresh(1)
    assert not torch.equal(one["logits"], two["logits"])
    assert one["logits"].data_ptr() != two["logits"].data_ptr()
    kept = one["logits"].detach().clone()
    one["logits"].data.fill_(7.0)  # an implementation may overwrite its input
    assert torch.equal(case.fresh(3)["logits"], kept)


@pytest.mark.parametrize("case", PERTURBED, ids=lambda case: f"{case.name}, {str(case.dtype)[6:]}")
def test_perturbed_weights_leave_behind_what_the_docs_say(case):
    for name, impl in case.implementations().items():
        runs = [case.fresh(), *map(case.fresh, range(3))]
        assert len({t["draw"] for t in runs}) == len(runs)
        for t in runs:
            impl.run(case, t)
        case.done()
        left = (runs[0]["weights"][0].detach().flatten().double() - case.start).square().mean().sqrt() / SIGMA
        assert (left == 0) == name.startswith("cpu"), name
