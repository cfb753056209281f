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

from ..distributed.launch import REPOSITORY
from ..float64 import make_model
from .conftest import LENGTHS, make_rows, pad


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
        values = put(store, unit, values, identity)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return values

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
