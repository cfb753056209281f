"""The retain term's coefficient as a dual variable: up while the retain loss is above a bound, down below it.

Entesari et al., Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models, 2025, and the PDU
of OpenUnlearning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerControl, TrainerState, TrainingArguments

from .._hints import check_known
from .remembering import Remembering

EVERY = ("micro_batch", "step", "epoch")


@dataclass
class DualState:
    """All that a resumed run needs. value: the dual variable; total, steps: of the retain loss in this epoch so far."""

    value: float
    eps: float | None = None
    total: float = 0.0
    steps: int = 0


class Dual(Remembering):
    """lam <- max(0, lam + step (retain loss - eps)); `UnlearnTrainer(..., dual=)` asks it for lam.

    start: lam until the first move; None: the coefficient of the retain term. eps: the bound, a number; None: (1 +
    above_reference) times the retain loss over all retain rows of the model as it is before the first step. every:
    moves after each "step", by the loss of that step; after each "micro_batch", by its mean over all ranks, so that a
    step of n micro-batches has n moves and each has the lam that those before it left (OpenUnlearning, where each rank
    has its own); or at the end of each "epoch", by the mean over its steps (OpenUnlearning: over a pass of its own).
    warmup_epochs: lam stays meanwhile. used: what the retain loss of the last step was multiplied by.

    The state is in the checkpoint's trainer_state.json; all ranks have the same.
    Raises ValueError for what does not fit, TypeError for eps or above_reference that are both given or both missing.
    """

    absent = "the checkpoint has no dual variable: it is from a run without unlearn.dual"

    def __init__(
        self,
        eps: float | None = None,
        *,
        above_reference: float | None = None,
        start: float | None = None,
        step: float = 1.0,
        every: str = "step",
        warmup_epochs: float = 0.0,
    ):
        if (eps is None) == (above_reference is None):
            raise TypeError(f"eps={eps}, above_reference={above_reference}: needs one of them")
        check_known("every", every, EVERY)
        least = {"start": start, "step": step, "warmup_epochs": warmup_epochs, "above_reference": above_reference}
        for name, value in {"eps": eps, **least}.items():
            if value is not None and not (math.isfinite(value) and (name == "eps" or value >= 0)):
                raise ValueError(f"{name}={value}: needs a finite number{'' if name == 'eps' else ' >= 0'}")
        self.eps, self.above_reference, self.start = eps, above_reference, start
        self.step, self.every, self.warmup_epochs = step, every, warmup_epochs
        self.memory = DualState(0.0 if start is None else start, eps)
        self.used = self.memory.value
        self._parts: list[tuple[float, float]] = []  # of the step that is going on: lam, and the loss it multiplied
        self.measure: Callable[[Any], float] | None = None  # the retain loss of a model: the trainer's
        self._loss: float | None = None

    def begin(self, coefficient: float, measure: Callable[[Any], float]) -> None:
        """What the trainer tells: the retain term's coefficient, and how its loss over all rows is measured."""
        self.start = coefficient if self.start is None else self.start
        self.measure = measure
        self.memory = DualState(self.start, self.eps)

    def observe_batch(self, share: float, loss: float | None, epoch: float) -> None:
        """What a micro-batch adds to the retain loss of the step that is going on, and its own (None: it has none),
        `epoch` epochs after the start."""
        self._parts.append((self.memory.value, share))
        if loss is not None and epoch >= self.warmup_epochs:
            self._move(loss)

    def observe(self, loss: float) -> None:
        """The retain loss of the step that is going on, of which all micro-batches have been told."""
        parts, self._parts = self._parts, []
        self._loss, total = loss, sum(share for _, share in parts)
        self.used = sum(value * share for value, share in parts) / total if total else self.memory.value

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._parts = []
        if self.remembers(state):
            return
        if self.start is None or self.measure is None:
            raise ValueError("dual: goes to UnlearnTrainer as dual=, which tells it the retain term")
        self.memory = DualState(self.start, self.eps)
        if self.above_reference is not None:
            eps = (1 + self.above_reference) * self.measure(model)
            self.memory.eps = broadcast_object_list([eps])[0]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        memory, loss, epoch = self.memory, self._loss, state.epoch or 0.0
        if loss is None or memory.eps is None:
            return
        self._loss = None
        memory.total, memory.steps = memory.total + loss, memory.steps + 1
        if self.every == "step" and epoch > self.warmup_epochs:
            self._move(loss)
        if epoch == int(epoch):  # here and not in on_epoch_end, which comes after the checkpoint of its last step
            if self.every == "epoch" and epoch >= self.warmup_epochs:
                self._move(memory.total / memory.steps)
            memory.total, memory.steps = 0.0, 0

    def _move(self, loss: float) -> None:
        assert self.memory.eps is not None
        self.memory.value = max(0.0, self.memory.value + self.step * (loss - self.memory.eps))

    def summary(self) -> dict[str, float]:
        """For the log of a step."""
        return {} if self.memory.eps is None else {"dual/eps": self.memory.eps}
