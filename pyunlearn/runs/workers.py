"""Who does the tasks of a sweep: this process, several of their own, or Ray. One task at a time each.

All have `free`, whether a task can be given now; `submit`; `wait`, which gives what has ended since, one at least; and
`stop`, which interrupts what is under way and waits until it has stopped. As context managers they end with the block.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["finished", "failed", "stopped"]
FINISHED: State = "finished"
FAILED: State = "failed"
STOPPED: State = "stopped"
DIED = "its process died (out of memory, or killed)"


@dataclass(frozen=True)
class Task:
    """do: called without arguments, in a process that may be another; what it returns goes back. place: the working
    directory."""

    name: str
    do: Callable[[], Any]
    place: Path


@dataclass(frozen=True)
class Outcome:
    """text: of what went wrong, in a line; trace: all of it."""

    state: State
    value: Any = None
    text: str = ""
    trace: str = ""


def do(task: Task) -> Outcome:
    try:
        return Outcome(FINISHED, task.do())
    except KeyboardInterrupt as interrupt:
        return Outcome(STOPPED, text=str(interrupt))
    except Exception as error:  # whatever it is, the others go on
        return Outcome(FAILED, text=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


Ended = list[tuple[Task, Outcome]]


class Workers(Protocol):
    @property
    def free(self) -> bool: ...

    def submit(self, task: Task) -> None: ...

    def wait(self) -> Ended: ...

    def stop(self) -> Ended: ...

    def __enter__(self) -> Workers: ...

    def __exit__(self, *exception: object) -> None: ...


class Here:
    """This process, which Ctrl-C reaches itself."""

    def __init__(self) -> None:
        self.waiting: list[Task] = []

    @property
    def free(self) -> bool:
        return not self.waiting

    def submit(self, task: Task) -> None:
        self.waiting.append(task)

    def wait(self) -> Ended:
        task = self.waiting.pop()
        return [(task, do(task))]

    def stop(self) -> Ended:
        return []

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class Processes:
    """Processes of their own. Each has an equal share of the cores, and one GPU where there are several; what they
    write to their terminal goes to a file of `logs` each. A process that dies takes its task alone with it, and ends
    when this one does."""

    def __init__(self, count: int, logs: Path):
        self.count, self.logs = count, logs
        self.executors: dict[int, ProcessPoolExecutor] = {}
        self.under_way: dict[Future[Outcome], tuple[int, Task]] = {}

    @property
    def free(self) -> bool:
        return len(self.under_way) < self.count

    def submit(self, task: Task) -> None:
        taken = {place for place, _ in self.under_way.values()}
        place = next(each for each in range(self.count) if each not in taken)
        with environment(place, self.count):
            if place not in self.executors:
                begin = partial(begin_process, self.logs / f"worker-{place}.log")
                context = multiprocessing.get_context("spawn")
                self.executors[place] = ProcessPoolExecutor(1, mp_context=context, initializer=begin)
            self.under_way[self.executors[place].submit(do_there, task)] = place, task

    def wait(self) -> Ended:
        done, _ = wait(self.under_way, return_when=FIRST_COMPLETED)
        return [self.ended(future) for future in done]

    def ended(self, future: Future[Outcome]) -> tuple[Task, Outcome]:
        place, task = self.under_way.pop(future)
        error = future.exception()
        if error is None:
            return task, future.result()
        self.executors.pop(place).shutdown(wait=False)  # it is broken
        return task, Outcome(FAILED, text=f"{DIED}; see {self.logs / f'worker-{place}.log'}", trace=repr(error))

    def stop(self) -> Ended:
        while True:
            for place, _ in self.under_way.values():
                for process in processes_of(self.executors[place]):
                    os.kill(process, signal.SIGINT)
            try:
                done = wait(self.under_way).done
                break
            except KeyboardInterrupt:  # once more: at once
                continue
        return [self.ended(future) for future in done]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        for executor in self.executors.values():
            executor.shutdown(wait=True, cancel_futures=True)


def processes_of(executor: ProcessPoolExecutor) -> list[int]:
    return [number for number, process in list((executor._processes or {}).items()) if process.is_alive()]


@contextmanager
def environment(place: int, count: int) -> Iterator[None]:
    """Of the process that begins inside: read when its libraries are loaded."""
    import torch

    own = {"OMP_NUM_THREADS": str(threads_of(count))}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen = torch.cuda.device_count()
    if seen > 1:
        own["CUDA_VISIBLE_DEVICES"] = gpus[place % seen] if len(gpus) == seen else str(place % seen)
    former = {key: os.environ.get(key) for key in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for key, value in former.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def threads_of(count: int) -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return max(1, (len(affinity(0)) if affinity else os.cpu_count() or 1) // count)


def begin_process(log: Path) -> None:
    """Ctrl-C is the first process's to pass on; without that one there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=[parent.sentinel], daemon=True).start()


def end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # as if it was killed itself: what is finished is kept


def do_there(task: Task) -> Outcome:
    os.chdir(task.place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return do(task)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Ray:
    """Ray's workers, on this machine or the cluster that $RAY_ADDRESS names, which needs the same folders.

    count: tasks at once; None leaves that to Ray, one core each. Raises ImportError without ray.
    """

    def __init__(self, count: int | None):
        try:
            import ray
        except ImportError:
            raise ImportError("--ray: needs ray, which is not installed: pip install 'pyunlearn[ray]'") from None
        self.ray: Any = ray
        self.began = not ray.is_initialized()
        if self.began:
            ray.init(log_to_driver=False, include_dashboard=False)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        cores = int(ray.cluster_resources().get("CPU", 1))
        options = {"num_cpus": max(1, cores // (count or cores)), "num_gpus": gpus, "max_retries": 0}
        self.remote = ray.remote(do_in_place).options(**options)
        self.count = count or cores
        self.under_way: dict[Any, Task] = {}

    @property
    def free(self) -> bool:
        return len(self.under_way) < self.count

    def submit(self, task: Task) -> None:
        self.under_way[self.remote.remote(task)] = task

    def wait(self) -> Ended:
        done, _ = self.ray.wait(list(self.under_way), num_returns=1)
        return self.ended(done)

    def ended(self, done: Sequence[Any]) -> Ended:
        found = []
        for reference in done:
            task = self.under_way.pop(reference)
            try:
                found.append((task, self.ray.get(reference)))
            except self.ray.exceptions.TaskCancelledError:
                found.append((task, Outcome(STOPPED)))
            except self.ray.exceptions.RayError as error:
                found.append((task, Outcome(FAILED, text=f"{DIED}: {type(error).__name__}", trace=str(error))))
        return found

    def stop(self) -> Ended:
        for reference in self.under_way:
            self.ray.cancel(reference, force=False)
        done, _ = self.ray.wait(list(self.under_way), num_returns=max(1, len(self.under_way)))
        return self.ended(done)

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.began:
            self.ray.shutdown()


def do_in_place(task: Task) -> Outcome:
    os.chdir(task.place)
    return do(task)
