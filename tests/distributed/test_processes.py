"""Processes that share work, and the launcher of these tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from .launch import run_case


def test_torchrun_is_joined(tmp_path):
    ranks = run_case("processes.joined", tmp_path)
    for rank, result in enumerate(ranks):
        assert result["before"] == (False, 1, 0, True, True)
        assert result["after"] == (True, 2, rank, rank == 0, True)
        assert result["device"].startswith("cpu")


def test_work_is_shared_and_put_together(tmp_path):
    ranks = run_case("processes.shared", tmp_path, processes=3)
    assert [result["items"] for result in ranks] == [[0, 3, 6], [1, 4], [2, 5]]
    for rank, result in enumerate(ranks):
        assert torch.equal(result["total"], torch.arange(7, dtype=torch.float64).square() / 3)
        assert result["unchanged"]
        assert result["agreed"] == {"rank": 0, "words": ["a", None]}
        assert result["together"] == (1, 0, rank == 0, rank == 0, ["a", "b", "c"])
        assert result["combined together"].count_nonzero() == len([i for i in result["items"] if i])
        assert result["in turn"] == "of the first"
        assert result["time"] >= ranks[0]["time"]


def test_a_mistake_of_the_first_is_one_of_all(tmp_path):
    first, second = run_case("processes.raised", tmp_path)
    assert first["ran"] == ["user", "damaged", "interrupt", "special"]
    assert second["ran"] == []
    assert first["user"] == second["user"] == ("ValueError", "sigma=0: needs more")
    assert first["damaged"] == second["damaged"]
    assert first["damaged"][0] == "Damaged"
    assert first["interrupt"] == second["interrupt"] == ("KeyboardInterrupt", "")
    assert first["special"] == ("Special", "cannot be pickled")
    assert second["special"] == ("RuntimeError", "on the first process: Special: cannot be pickled")
    assert first["agreed"] == second["agreed"] == 0
    assert first["in turn"] == second["in turn"] == "made"


def test_two_processes_keep_units_in_one_store(tmp_path):
    ranks = run_case("processes.stored", tmp_path)
    for rank, result in enumerate(ranks):
        assert result["made"] == result["mine"] == [rank, rank + 2, rank + 4]  # all others were there
        assert torch.equal(result["values"], torch.arange(6.0)[:, None].expand(6, 3))
        assert result["names"] == ["contended", *(f"draw-{i}" for i in range(6)), "table", "together"]
        assert result["together"] == {"rank": 0}
    assert not list((tmp_path / "store").glob(".*"))


def test_a_case_that_fails_says_why(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)case processes\.fails: exit code 1.*ValueError: the reason"):
        run_case("processes.fails", tmp_path)


def test_a_case_that_hangs_is_ended_with_its_processes(tmp_path):
    with pytest.raises(AssertionError, match=r"case processes\.hangs: exit code none after 10 s"):
        run_case("processes.hangs", tmp_path, seconds=10)
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
