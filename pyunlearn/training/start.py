"""The weights that a training starts from: in files beside its checkpoints, and no second model in memory for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .._files import SEAL, check_seal, seal, write_folder
from ..distributed import whole
from ..model.tensors import Tensors, write_files
from ..ops.parameters import canonical
from .folder import named_failures
from .selection import trainable
from .stage import Stage


class Start:
    """The trained weights before the first step of the stage `name`, in training/NAME/start/.

    The first process writes and reads them; sharded ones are gathered one at a time, for which all processes have to
    call `keep` and `mean_absolute_change`.
    """

    def __init__(self, stage: Stage, name: str):
        self.folder, self.name, self.processes = stage.folder, name, stage.processes
        self.path = stage.folder.start(name)

    @property
    def resumed(self) -> bool:
        """Whether the stage goes on from a checkpoint."""
        return any((path / SEAL).is_file() for path in self.folder.checkpoints(self.name).values())

    @torch.no_grad()
    def keep(self, model: Any) -> None:
        """Writes the weights of `model`, with which the stage starts; where it goes on from a checkpoint, those that
        are there stay.

        Raises ValueError that names a file that is not what was written, or a parameter that is trained now and was not
        at the start, and OSError that names the stage's folder where they cannot be written.
        """
        with self.processes.first_first():
            there = self.processes.first and self.is_there(model)
        if self.processes.agree(there):
            return
        weights = ((canonical(name), whole(weight)) for name, weight in trainable(model))
        failure = None

        def fill(folder: Path) -> None:
            write_files(weights, folder)
            seal(folder)

        if self.processes.first:
            try:
                with named_failures(self.folder.training(self.name)):
                    write_folder(self.path, fill)
            except Exception as error:
                failure = error
        for _ in weights:  # the other processes gather all of them, whatever becomes of the first one's files
            pass
        with self.processes.first_first():
            if failure is not None:
                raise failure

    def is_there(self, model: Any) -> bool:
        """Whether the stage goes on, and the weights of its start are here. Raises ValueError as `keep`."""
        if not self.resumed or not (self.path / SEAL).is_file():  # without the seal, they were about to go
            return False
        check_seal(self.path, f"delete {self.path}: it is made again of the model that the stage is called with")
        files, names = Tensors(self.path).files, {canonical(name) for name, _ in trainable(model)}
        if other := sorted(names ^ files.keys()):
            raise ValueError(
                f"{other[0]}: is trained {'now' if other[0] in names else 'no more'}, which is not how {self.path} "
                f"began; needs the parameters that it began with, or another folder"
            )
        return True

    @torch.no_grad()
    def mean_absolute_change(self, model: Any) -> float:
        """The mean over all trained weights of |now - at the start| (Figure 3 of arXiv:2504.06658).

        One tensor at a time is in memory beside the model. Raises ValueError that names a damaged file.
        """
        with self.processes.first_first():
            before = Tensors(self.path) if self.processes.first else None
        total = count = 0.0
        for name, weight in trainable(model):
            now = whole(weight)  # by all processes
            if before is not None:
                then = before.read([canonical(name)]).float()
                total += float((now.detach().cpu().float() - then).abs().sum(dtype=torch.float64))
            count += now.numel()
        return self.processes.agree(total / count)

    def remove(self) -> None:
        """The seal goes first: what a kill leaves of the others is not taken for all."""
        if self.processes.first:
            (self.path / SEAL).unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def started(stage: Stage, name: str, model: Any) -> Iterator[Start]:
    """For the training `name` of `model`: its weights as they are at the start, kept on disk for the block.

    After it they go, and where it fails too, unless there is a checkpoint to go on from. Raises as `Start.keep`.
    """
    start = Start(stage, name)
    start.keep(model)
    try:
        yield start
    except BaseException:
        if not start.resumed:
            start.remove()
        raise
    start.remove()
