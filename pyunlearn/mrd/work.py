"""What every estimator works with: the job, its units of work shared out over processes and kept on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .._progress import track
from ..ops.parameters import Weight
from .samples import Samples

FORMAT = "pyunlearn-mrd-2"
T = TypeVar("T")
Factor = Callable[[Tensor], Tensor]  # log L_t -> f_t, what a token's relative change is multiplied with


class Estimate(NamedTuple):
    """value, error: (n,) float64, not normalised; slope: (n,), the norm of the statistic's gradient; draws: (K, n)."""

    value: Tensor
    error: Tensor
    slope: Tensor
    draws: Tensor | None = None
    diagnostics: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Job:
    model: nn.Module
    weights: list[Weight]
    samples: Samples
    seed: int
    factor: Factor
    store: Store
    processes: Processes
    progress: bool

    def finish(self, units: Mapping[T, str], compute: Callable[[T], Tensor], description: str) -> dict[T, Tensor]:
        """The values of `units` (item: name), computed where the store does not have them yet."""
        done = {item: values for item, name in units.items() if (values := self.store.get(name)) is not None}
        todo = [item for item in units if item not in done]
        show = self.progress and self.processes.first
        for item in track(todo, description, show, size=lambda _: 1, done=len(done)):
            done[item] = compute(item)
            if self.processes.writes:
                self.store.put(units[item], done[item])
        return done


@dataclass
class Store:
    """Finished units by name: in memory, or as one safetensors file each in a folder that belongs to one job."""

    folder: Path | None
    identity: Mapping[str, Any]
    memory: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted, manifest = {"format": FORMAT, **self.identity}, self.folder / "job.json"
        if manifest.is_file():
            there = json.loads(manifest.read_text(encoding="utf-8"))
            differing = [key for key in {**wanted, **there} if there.get(key) != wanted.get(key)]
            if differing:
                key = differing[0]
                raise ValueError(
                    f"state: {self.folder} belongs to another job, its {', '.join(differing)} differ "
                    f"({key}: {there.get(key)!r}, here {wanted.get(key)!r}); delete it or choose another folder"
                )
        elif any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"state: {self.folder} holds other files; choose a new or an empty folder")
        else:
            appear(manifest, lambda path: path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8"))

    def get(self, unit: str) -> Tensor | None:
        if self.folder is None:
            return self.memory.get(unit)
        path = self.folder / f"{unit}.safetensors"
        return load_file(path)["values"] if path.is_file() else None

    def put(self, unit: str, values: Tensor) -> None:
        if self.folder is None:
            self.memory[unit] = values
        else:
            appear(self.folder / f"{unit}.safetensors", lambda path: save_file({"values": values}, path))


def appear(path: Path, write: Callable[[Path], Any]) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Processes:
    """The processes of torch.distributed (one, where it is not initialised), and which of the work is this one's."""

    def __init__(self, device: torch.device, together: bool = False):
        """together: the model is sharded, so that every process has to take part in every forward."""
        self.started = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.device = device
        self.first = not self.started or torch.distributed.get_rank() == 0
        self.count = torch.distributed.get_world_size() if self.started and not together else 1
        self.rank = torch.distributed.get_rank() if self.count > 1 else 0
        self.writes = self.first or self.count > 1

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` gives; the first process's before the others begin."""
        if self.first:
            made = make()
        if self.started:
            torch.distributed.barrier()
        return made if self.first else make()

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.count])

    def combine(self, values: Tensor) -> Tensor:
        """The sum over processes of which all but one have 0 at any place: the same bits for any number of them."""
        if self.count == 1:
            return values
        shared = values.to(self.device)
        torch.distributed.all_reduce(shared)
        return shared.cpu()


def first_order(statistic: Tensor) -> tuple[Tensor, Tensor]:
    """(K, n) -> the mean of |S| and its standard error, (n,) each; NaN for one draw."""
    return mean_and_error(statistic.abs())


def second_order(statistic: Tensor) -> tuple[Tensor, Tensor]:
    """(K, n) -> |the mean| and its standard error, (n,) each."""
    mean, error = mean_and_error(statistic)
    return mean.abs(), error


def mean_and_error(draws: Tensor) -> tuple[Tensor, Tensor]:
    count = len(draws)
    error = draws.std(0) / count**0.5 if count > 1 else torch.full_like(draws[0], torch.nan)
    return draws.mean(0), error


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError naming the first sample whose value (n,) is not finite."""
    bad = ~values.isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"sample {int(bad.int().argmax())}: its score is not finite {what}; are the weights, is sigma small enough?"
        )
