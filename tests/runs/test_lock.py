"""One job at a time on a folder; a lock that nobody holds any more blocks nobody."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time

import pytest

from pyunlearn.distributed import Processes
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.geffect import measure_run
from pyunlearn.runs.job import Job
from pyunlearn.runs.lock import InUse, held, started, this_process
from pyunlearn.runs.run import run
from pyunlearn.runs.score import score

FORK = multiprocessing.get_context("fork")


def test_it_names_who_holds_it_and_goes_with_the_block(tmp_path):
    lock = tmp_path / "new" / ".lock"
    with held(lock, tmp_path):
        told = (
            rf"is in use by process {os.getpid()} on {socket.gethostname()}, since 20\d\d-.*; wait for it, or stop it"
        )
        with pytest.raises(InUse, match=told), held(lock, tmp_path):
            pass
        assert lock.is_file()
    assert not lock.exists()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), held(lock, tmp_path):
            raise error
        assert not lock.exists()


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, False),
        ({"started": "another boot 17"}, True),  # the number went to a later process
        ({"pid": 2**22 + 1}, True),
        ({"host": "elsewhere"}, False),
        ({"pid": "x"}, True),
        (None, True),
    ],
)
def test_stale_ones_are_taken_over(tmp_path, change, taken):
    lock = tmp_path / ".lock"
    lock.write_text("{" if change is None else json.dumps({**this_process(), **change}))
    if taken:
        with held(lock, tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert not lock.exists()
        return
    before = lock.read_text()
    with pytest.raises(InUse, match=r"if it no longer runs there, delete .*\.lock" if change else "wait for it"):
        held(lock, tmp_path).__enter__()
    assert lock.read_text() == before


def test_one_of_many_takes_what_a_killed_process_has_left(tmp_path):
    lock = tmp_path / ".lock"

    def killed():
        with held(lock, tmp_path):
            os._exit(9)

    def try_it(results):
        try:
            with held(lock, tmp_path):
                results.put("taken")
                time.sleep(1)
        except InUse:
            results.put("refused")

    first = FORK.Process(target=killed)
    first.start()
    first.join()
    assert lock.is_file()
    assert started(first.pid) is None
    results = FORK.Queue()
    others = [FORK.Process(target=try_it, args=(results,)) for _ in range(6)]
    for process in others:
        process.start()
    told = sorted(results.get(timeout=30) for _ in others)
    for process in others:
        process.join()
    assert told == ["refused"] * 5 + ["taken"]
    assert not lock.exists()


def test_every_job_takes_it_and_only_its_first_process(tiny_config):
    config = tiny_config()
    folder = RunFolder(config.folder)
    folder.open(config)
    (folder.path / "checkpoint").mkdir()
    before = sorted(path.name for path in folder.path.iterdir())
    with held(folder.lock, folder.path):
        for job in (lambda: run(config, resume=True), lambda: run(config, overwrite=True), lambda: score(config),
                    lambda: measure_run(config.folder)):  # fmt: skip
            with pytest.raises(InUse, match="run is in use by process"):
                job()
    assert sorted(path.name for path in folder.path.iterdir()) == before
    job = Job.start(config, None, "")
    other = Processes(job.processes.device)
    other.first = False
    other.agree = lambda value: value
    object.__setattr__(job, "processes", other)
    with job.locked(folder.lock, folder.path):
        assert not folder.lock.exists()
