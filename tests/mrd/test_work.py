"""Resuming and sharing out: the same bits whatever was interrupted, and however many processes worked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pyunlearn as pu
from pyunlearn.store import Damaged, Store, get_tensors

from ..float64 import make_model
from ..two_processes import REPOSITORY, run_on_two
from .conftest import LENGTHS, make_rows, pad

CASES = [("algorithm1", "draws"), ("algorithm1", "data"), ("definition", "data"), ("gradient", "draws"),
         ("hutchinson", "draws")]  # fmt: skip


def float32_model():
    return make_model("llama").float()


def six():
    """Two batches of three samples that begin with the same three tokens; with batch_size=2 they make three."""
    rows = [[([5, 9, 3, *ids], [-100] * 3 + labels) for ids, labels in make_rows(seed)] for seed in (1, 2)]
    return [pad(some, max(LENGTHS) + 3) for some in rows]


def same(first, second):
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.standard_error, second.standard_error)
    assert first.diagnostics == second.diagnostics


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.mark.parametrize("estimator", ["algorithm1", "definition", "gradient", "hutchinson"])
def test_what_is_finished_is_not_done_again(estimator, tmp_path, monkeypatch):
    def score(state):
        return pu.mrd(float32_model(), six(), estimator, 6, batch_size=2, state=state, progress=False)

    whole = score(None)
    put, left = Store.put, 3

    def stop_after_three(store, unit, values, identity=None):
        nonlocal left
        put(store, unit, values, identity)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path)
    kept = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    assert len(kept) == 4  # job.json
    monkeypatch.setattr(Store, "put", put)
    same(score(tmp_path), whole)
    assert kept.items() <= {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}.items()
    monkeypatch.setattr(Store, "put", None)  # nothing is left to do
    same(score(tmp_path), whole)


SCRIPT = """
import sys, torch, pyunlearn as pu
from tests.mrd.test_work import float32_model, six
torch.set_num_threads(1)
pu.mrd(float32_model(), six(), num_draws=100000, batch_size=2, state=sys.argv[1], progress=False)
"""


def test_killed_and_run_again_gives_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
    try:
        while len(list(tmp_path.glob("*.safetensors"))) < 8 and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = list(tmp_path.glob("[!.]*.safetensors"))
    assert len(finished) >= 8
    assert all(get_tensors(path, {}).shape == (4, 6) for path in finished)
    options = {"num_draws": 20, "batch_size": 2, "progress": False}
    same(pu.mrd(float32_model(), six(), state=tmp_path, **options), pu.mrd(float32_model(), six(), **options))


def test_more_draws_later(tmp_path):
    few = pu.mrd(float32_model(), six(), num_draws=4, state=tmp_path, check_draws=0, progress=False)
    more = pu.mrd(float32_model(), six(), num_draws=9, state=tmp_path, check_draws=0, progress=False)
    assert torch.equal(more.draws[:4], few.draws)
    same(more, pu.mrd(float32_model(), six(), num_draws=9, check_draws=0, progress=False))


def test_a_folder_of_another_job_is_refused(tmp_path):
    def score(**changes):
        arguments = {"model": float32_model(), "batches": six(), "num_draws": 2, "check_draws": 0, "state": tmp_path}
        return pu.mrd(**{**arguments, "progress": False, **changes})

    score()
    other = make_model("llama", seed=1).float()
    for changes, named in (
        ({"model": other}, r"belongs to another job \(model: '\w+' -> '\w+'\)"),
        ({"batches": six()[:1]}, r"data: '\w+' -> '\w+'"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"estimator": "definition"}, "estimator: 'algorithm1' -> 'definition'"),
        ({"batch_size": 1}, "batch_size: 8 -> 1"),
        ({"paper_eps": 1e-8}, "paper_eps: None -> 1e-08"),
    ):
        with pytest.raises(ValueError, match=named):
            score(**changes)
    score(sigma=2e-5)  # its draws have names of their own
    (tmp_path / "job.json").unlink()
    with pytest.raises(ValueError, match="holds other files"):
        score()


def test_a_changed_byte_is_an_error(tmp_path):
    def score():
        return pu.mrd(float32_model(), six(), num_draws=2, check_draws=0, state=tmp_path, progress=False)

    score()
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        with pytest.raises(Damaged, match=path.name):
            score()
        path.write_bytes(data)
    score()


def test_two_processes_give_the_bits_of_one(tmp_path):
    first, second = run_on_two(Path(__file__).with_name("worker.py"), tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
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
    finally:
        torch.set_num_threads(threads)
    # Draws are taken up by any number of processes, a share of the data by as many.
    state = tmp_path / "state-algorithm1-draws"
    before = files(state)
    pu.mrd(float32_model(), six(), "algorithm1", 5, batch_size=2, state=state, progress=False)
    assert files(state) == before
    assert {name.split("-")[-1] for name in files(tmp_path / "state-algorithm1-data") if "of" in name} == {
        "0of2.safetensors",
        "1of2.safetensors",
    }
