"""MRD by two processes: the bits of one, however the work is shared out."""

import pytest
import torch

import pyunlearn as pu

from ..mrd.test_work import float32_model, six
from .cases.mrd import CASES
from .launch import run_case


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_processes_give_the_bits_of_one(tmp_path, one_thread):
    first, second = run_case("mrd.shared_out", tmp_path)
    for estimator, split in CASES:
        alone = pu.mrd(float32_model(), six(), estimator, 5, batch_size=2, progress=False)
        for result in (first[f"{estimator} {split}"], second[f"{estimator} {split}"]):
            assert torch.equal(result["value"], alone.value), (estimator, split)
            assert torch.equal(result["standard_error"], alone.standard_error), (estimator, split)
            assert result["sigma_ratio"] == alone.diagnostics["sigma_ratio"], (estimator, split)
    alone = pu.mrd(float32_model(), six(), num_draws=5, batch_size=2, mode="copy", progress=False)
    assert alone.diagnostics["shared_prefix"] == 3
    for result in (first["sharded"], second["sharded"]):
        assert torch.equal(result["value"], alone.value)
        assert result["sigma_ratio"] == alone.diagnostics["sigma_ratio"]
    # Draws are taken up by any number of processes, a share of the data by as many.
    state = tmp_path / "state-algorithm1-draws"
    before = files(state)
    pu.mrd(float32_model(), six(), "algorithm1", 5, batch_size=2, state=state, progress=False)
    assert files(state) == before
    assert {name.split("-")[-1] for name in files(tmp_path / "state-algorithm1-data") if "of" in name} == {
        "0of2.safetensors",
        "1of2.safetensors",
    }
