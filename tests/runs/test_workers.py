"""Who does the tasks of a sweep: in this process, in others, on Ray."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pyunlearn.runs import workers
from pyunlearn.runs.workers import FAILED, FINISHED, STOPPED, Here, Processes, Ray, Task


def environment_there():
    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES"), os.getcwd()


def fail():
    raise ValueError("it does not fit")


def die():
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def work_on(mark):
    Path(mark).touch()
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("kept") from None


def all_of(hired, tasks):
    """By name, the outcomes."""
    tasks, found, under_way = list(tasks), {}, 0
    while tasks or under_way:
        while tasks and hired.free:
            hired.submit(tasks.pop(0))
            under_way += 1
        for task, outcome in hired.wait():
            found[task.name] = outcome
            under_way -= 1
    return found


def task(name, do):
    return Task(name, do, Path.cwd())


def until(mark):
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_this_process_does_one_after_the_other():
    with Here() as hired:
        found = all_of(hired, [task("fails", fail), task("there", environment_there)])
    assert (found["fails"].state, found["fails"].text) == (FAILED, "ValueError: it does not fit")
    assert "raise ValueError" in found["fails"].trace
    assert found["there"].value[0] == os.getpid()


def test_processes_share_the_cores_and_a_death_takes_its_task_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers, "threads_of", lambda count: 6 // count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    former = os.environ.get("OMP_NUM_THREADS")
    tasks = [task("dies", die), task("a", environment_there), task("b", environment_there), task("fails", fail)]
    with Processes(2, tmp_path) as hired:
        found = all_of(hired, tasks)
    assert found["dies"].state == FAILED
    assert f"its process died (out of memory, or killed); see {tmp_path / 'worker-0.log'}" in found["dies"].text
    assert "the last words" in (tmp_path / "worker-0.log").read_text()
    assert found["fails"].text == "ValueError: it does not fit"
    for name in "ab":
        process, threads, gpu, place = found[name].value
        assert (process != os.getpid(), threads, place) == (True, "3", os.getcwd())
        assert gpu in ("0", "1")
    assert os.environ.get("OMP_NUM_THREADS") == former
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.parametrize(("listed", "gpus"), [("5,7", ["5", "7", "5"]), ("", ["0", "1", "0"])])
def test_each_process_has_a_gpu_of_those_that_are_seen(listed, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed) if listed else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    seen = []
    for place in range(3):
        with workers.environment(place, 3):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == gpus
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == (listed or None)


def test_processes_stop_when_they_are_told(tmp_path):
    mark = tmp_path / "begun"
    with Processes(2, tmp_path) as hired:
        hired.submit(task("long", partial(work_on, str(mark))))
        until(mark)
        (ended,) = hired.stop()
    assert (ended[0].name, ended[1].state, ended[1].text) == ("long", STOPPED, "kept")


def test_ray_does_them_too(tmp_path):
    pytest.importorskip("ray")
    mark = tmp_path / "begun"
    with Ray(2) as hired:
        found = all_of(hired, [task("fails", fail), task("there", environment_there)])
        assert found["fails"].text == "ValueError: it does not fit"
        assert found["there"].state == FINISHED
        assert found["there"].value[0] != os.getpid()
        assert found["there"].value[3] == os.getcwd()
        hired.submit(task("long", partial(work_on, str(mark))))
        until(mark)
        (ended,) = hired.stop()
    assert ended[1].state == STOPPED


def test_without_ray_it_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"--ray: needs ray, which is not installed: pip install 'pyunlearn\[ray\]'"):
        Ray(None)
