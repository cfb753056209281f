"""What watches a training stage: the metrics file, its checkpoints, the progress bar, and Ctrl-C.

All are ordinary `transformers.TrainerCallback`s and can be given to any Trainer.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._files import json_line, seal, write_json_lines
from ..model.lora import merge
from .as_found import left_as_found, random_as_found
from .folder import TrainingFolder, write_model


class MetricsWriter(TrainerCallback):
    """Appends each log line of one stage to a JSON lines file: stage, step, epoch, loss, terms, rate, gradient norm.

    A line is on disk as soon as it is written. When a stage resumes at step s, its lines after s are dropped first, so
    that no step appears twice.
    """

    def __init__(self, path: str | Path, stage: str):
        self.path, self.stage = Path(path), stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.path.exists():
            write_json_lines(
                self.path, (r for r in read_metrics(self.path) if not self._is_later(r, state.global_step))
            )

    def _is_later(self, row: dict[str, Any], step: int) -> bool:
        return row.get("stage") == self.stage and row.get("step", 0) > step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        append_metrics(self.path, {"stage": self.stage, "step": state.global_step, **logs})


def append_metrics(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(row) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A last line cut short by a kill is left out.

    Raises ValueError that names any other line that is no row.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    for number, line in enumerate(lines[: last + 1]):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"holds {type(row).__name__}")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number < last:
                raise ValueError(
                    f"{path}:{number + 1}: is damaged, no row of metrics ({error}); repair or delete that line"
                ) from None
    return rows


class SealCheckpoints(TrainerCallback):
    """Seals each resumable checkpoint of a stage (`_files.seal`); then all others go, whatever their files' times."""

    def __init__(self, folder: TrainingFolder, stage: str):
        self.folder, self.stage = folder, stage

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank has written its part
        if not state.is_world_process_zero:
            return
        checkpoints = self.folder.checkpoints(self.stage)
        seal(checkpoints.pop(state.global_step))
        for path in checkpoints.values():
            shutil.rmtree(path, ignore_errors=True)


class KeepCheckpoints(TrainerCallback):
    """Every so many optimiser steps, model (safetensors) and tokenizer go into checkpoints/step-N to stay.

    merged: of a model under peft a plain model, for which there is a second one in memory meanwhile; else the adapter.
    """

    def __init__(self, folder: TrainingFolder, tokenizer: Any, every: int, merged: bool = False):
        self.folder, self.tokenizer, self.every, self.merged = folder, tokenizer, every, merged

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            kept = merge(copy.deepcopy(model)) if self.merged else model
            write_model(self.folder.kept / f"step-{state.global_step}", kept, self.tokenizer)


class Evaluations(TrainerCallback):
    """Calls `evaluate(step, model)` every so many optimiser steps, or after each epoch; not after the last step.

    The numbers that it returns, if any, by name, are in the step's log line for the callbacks after this one. It comes
    before the checkpoint of its step, so that a resumed training leaves none out. The training goes on in the same
    bits: the model but for its weights, its gradients and the random generators are as before.
    """

    def __init__(self, every: int | Literal["epoch"], evaluate: Callable[[int, Any], Mapping[str, float] | None]):
        self.every, self.evaluate = every, evaluate
        self.found: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step
        due = float(state.epoch or 0).is_integer() if self.every == "epoch" else step % self.every == 0
        if due and step < state.max_steps:
            with left_as_found(model), random_as_found():
                self.found = dict(self.evaluate(step, model) or {})
            model.zero_grad()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None:
            logs.update(self.found)
            self.found = {}


class ProgressBar(TrainerCallback):
    """A rich progress bar over optimiser steps, with the latest loss; only the first process draws."""

    def __init__(self, description: str, console: Console | None = None):
        self.description, self.console = description, console
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.progress = progress_bar(self.console, TextColumn("{task.fields[loss]}"))
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, loss=""
        )
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress is not None and logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.4g}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops drawing; also called when training ends by an exception."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def progress_bar(console: Console | None, *columns: Any) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), *columns,
        console=console,
    )  # fmt: skip


class Interrupt(TrainerCallback):
    """Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops training; a second one stops at once.

    Use as a context manager around `trainer.train()`; `signum` says which signal came, None if none did. Handlers are
    set in the main thread only, and the former ones are put back.
    """

    def __init__(self, console: Console | None = None):
        self.console = console
        self.signum: int | None = None
        self._former: dict[int, Any] = {}
        self._hook: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _unraisable(self, unraisable: Any) -> None:
        """A second Ctrl-C that came while an object was being cleared away is lost, and the first one stops all."""
        if not (self.signum is not None and unraisable.exc_type is KeyboardInterrupt):
            self._hook(unraisable)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        if self.console is not None:
            self.console.print("stopping after this step, with a checkpoint (once more: at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked(args):
            control.should_save = True
            control.should_training_stop = True

    def _asked(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.signum is not None
        asked = torch.tensor(float(self.signum is not None), device=args.device)  # one rank's signal stops all of them
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if bool(asked) and self.signum is None:
            self.signum = signal.SIGINT
        return bool(asked)
