"""Which forget samples an unlearning step takes: all in turn, uniformly at random, or by Memory Removal Difficulty.

arXiv:2504.06658, Section 3.4 and Algorithm 2 (MRD-weighted sampling), Appendix C.4 (when a sample is forgotten).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..data import QADataset, collate
from ..metrics import extraction_likelihood, teacher_forced
from ..mrd import Labels, check_arguments, mrd, scored_rows
from .as_found import left_as_found
from .remembering import Remembering

logger = logging.getLogger(__name__)
WEIGHTINGS = ("algorithm2", "inverse")


class Forgotten:
    """When a sample counts as forgotten: its EL and MA are both below `share` of their means before unlearning.

    EL: extraction likelihood of `ngram`-grams, MA: memorization accuracy (Appendix C.4, where share is 1: one wrong
    token may then be enough for a model that knows all samples by heart). A mean that is 0 before unlearning is met
    by 0, which is told in the log. Looked at every `every_steps` steps.
    """

    def __init__(self, ngram: int = 10, share: float = 1.0, every_steps: int = 5):
        if ngram < 1 or every_steps < 1:
            raise ValueError(f"ngram={ngram}, every_steps={every_steps}: needs whole numbers >= 1")
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: needs a number above 0, up to 1")
        self.ngram, self.share, self.every_steps = ngram, share, every_steps

    def limits(self, model: Any, rows: QADataset) -> dict[str, float]:
        """{"el", "ma"}: what both have to fall below."""
        accuracy = [row["memorization_accuracy"] for row in teacher_forced(model, rows, progress=False)]
        likelihood = extraction_likelihood(model, rows.prompt_format.tokenizer, rows, ngram=self.ngram)
        means = {"el": sum(likelihood) / len(rows), "ma": sum(accuracy) / len(rows)}
        for name in [name.upper() for name, mean in means.items() if mean == 0]:
            logger.warning("early_stop: the mean %s is 0 before unlearning; nothing is below, so 0 is low", name)
        return {name: self.share * mean for name, mean in means.items()}

    def among(self, indices: Sequence[int], model: Any, rows: QADataset, limits: Mapping[str, float]) -> list[int]:
        """Those of `indices` that are forgotten. EL, which generates text, is measured where MA is low enough."""
        chosen = [rows[i] for i in indices]
        read = teacher_forced(model, chosen, progress=False)
        low = [at for at, row in enumerate(read) if is_low(row["memorization_accuracy"], limits["ma"])]
        if not low:
            return []
        some = [chosen[at] for at in low]
        likelihood = extraction_likelihood(model, rows.prompt_format.tokenizer, some, ngram=self.ngram)
        return [indices[at] for at, value in zip(low, likelihood, strict=True) if is_low(value, limits["el"])]


def is_low(value: float, limit: float) -> bool:
    """Below the limit; at it where nothing is below."""
    return value < limit or value == limit == 0


@dataclass
class SamplerState:
    """All that a resumed run needs: a draw is a function of the seed, the step and this. One entry a sample in lists.

    scores: MRD at the last refresh, first_scores before unlearning; None without weights. updates: times drawn.
    forgotten_at: the step after which the sample was found forgotten, None where it is drawn still.
    limits: see `Forgotten`; None without early stopping. draws: samples drawn so far.
    """

    updates: list[int]
    forgotten_at: list[int | None]
    scores: list[float] | None = None
    first_scores: list[float] | None = None
    limits: dict[str, float] | None = None
    draws: int = 0
    refreshed_at: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, count: int) -> SamplerState:
        """Of `count` samples before the first draw."""
        return cls([0] * count, [None] * count)


class ForgetSampler(Remembering):
    """Draws the forget samples of every step, with replacement; `UnlearnTrainer(..., sampler=)` asks it.

    rows: the forget set of the trainer's ForgetRetainDataset. weighting: None draws uniformly; "algorithm2" with
    p_i = MRD_i / sum MRD (Algorithm 2: easily forgotten samples first); "inverse" with p_i in proportion to 1 / MRD_i
    (as Section 3.4 writes it). refresh_steps: optimiser steps between computations of MRD. forgotten: early stopping,
    sample by sample: a forgotten one is not drawn any more, and training ends with the last. scores: options of `mrd`.
    labels: which tokens it scores, see `pyunlearn.mrd.scored_rows`.

    Draws depend on (seed, step, state) alone, so that all ranks draw the same and a resumed run goes on bit for bit;
    the state is in the checkpoint's trainer_state.json. What is measured is in the precision of the weights, whatever
    the training's. Under torchrun `mrd` shares the samples out and gives the same scores to all ranks; what is
    forgotten, the first rank decides.

    Raises ValueError for an unknown weighting or labels, refresh_steps < 1, options that `mrd` refuses, and during
    training for weights that are all 0 or (1 / MRD) not finite.
    """

    absent = "the checkpoint has no state of the sampler: it is from a run with another sampling"

    def __init__(
        self,
        rows: QADataset,
        weighting: str | None = "algorithm2",
        *,
        refresh_steps: int = 10,
        seed: int = 0,
        forgotten: Forgotten | None = None,
        scores: Mapping[str, Any] | None = None,
        labels: Labels = "answers",
    ):
        if weighting is not None and weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={weighting!r}: needs one of {WEIGHTINGS}, or None")
        if refresh_steps < 1:
            raise ValueError(f"refresh_steps={refresh_steps}: needs a whole number >= 1")
        self.options = {"estimator": "gradient", **(scores or {})}
        check_arguments(**self.options)
        self.rows, self.weighting, self.refresh_steps, self.seed = rows, weighting, refresh_steps, seed
        self.forgotten = forgotten
        self.scored = scored_rows(rows, labels)
        self.memory = SamplerState.of(len(rows))

    @property
    def active(self) -> list[int]:
        """The samples that are drawn still."""
        return [i for i, step in enumerate(self.memory.forgotten_at) if step is None]

    def probabilities(self) -> list[float]:
        """Of every active sample; their sum is 1 up to rounding."""
        active, scores = self.active, self.memory.scores
        if scores is None:
            return [1 / len(active)] * len(active)
        weights = [scores[i] for i in active]
        if self.weighting == "inverse":
            if 0.0 in weights:
                raise ValueError(f"sample {active[weights.index(0.0)]} has MRD 0: weighting='inverse' needs MRD > 0")
            weights = [1 / weight for weight in weights]
        total = sum(weights)
        if not 0 < total < float("inf"):
            raise ValueError(f"the sampling weights of {len(active)} samples add up to {total}: nothing can be drawn")
        return [weight / total for weight in weights]

    def draw(self, step: int, count: int) -> list[tuple[int, int]]:
        """`count` draws for one optimiser step: (sample, place of the draw among all draws of the run)."""
        choose = random.Random(f"{self.seed}/{step}/forget")  # the step is all there is of random state
        drawn = choose.choices(self.active, self.probabilities(), k=count)
        places = range(self.memory.draws, self.memory.draws + count)
        self.memory.draws += count
        for index in drawn:
            self.memory.updates[index] += 1
        return list(zip(drawn, places, strict=True))

    def refresh(self, model: Any, step: int) -> None:
        """Computes MRD of the active samples; forgotten ones keep their last."""
        active = self.active
        batches = [collate([self.scored[i]], self.rows.pad_token_id) for i in active]
        with left_as_found(model):
            values = mrd(model, batches, progress=False, **self.options).value.tolist()
        scores = list(self.memory.scores or [0.0] * len(self.rows))
        for i, value in zip(active, values, strict=True):
            scores[i] = value
        self.memory.scores = scores
        self.memory.refreshed_at.append(step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.remembers(state):
            return
        self.memory = SamplerState.of(len(self.rows))
        if self.forgotten is not None:
            with left_as_found(model):
                limits = self.forgotten.limits(model, self.rows)
            self.memory.limits = broadcast_object_list([limits])[0]
        if self.weighting is not None:
            self.refresh(model, 0)
            self.memory.first_scores = self.memory.scores

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step
        if self.forgotten is not None and self.memory.limits is not None and step % self.forgotten.every_steps == 0:
            with left_as_found(model):
                gone = self.forgotten.among(self.active, model, self.rows, self.memory.limits)
            for index in broadcast_object_list([gone])[0]:  # greedy text may differ in a rounding between devices
                self.memory.forgotten_at[index] = step
        if not self.active:
            control.should_training_stop, control.should_save = True, False  # there is nothing to resume
        elif self.weighting is not None and step % self.refresh_steps == 0 and step < state.max_steps:
            self.refresh(model, step)

    def summary(self) -> dict[str, float]:
        """For the log of a step."""
        summary: dict[str, float] = {"sampling/draws": self.memory.draws}
        if self.memory.limits is not None:
            summary["sampling/forgotten"] = len(self.rows) - len(self.active)
        return summary

    def records(self) -> list[dict[str, Any]]:
        """One a sample: index, updates, forgotten_at, and with weights mrd_before and mrd_last."""
        memory = self.memory
        records: list[dict[str, Any]] = [
            {"index": i, "updates": updates, "forgotten_at": step}
            for i, (updates, step) in enumerate(zip(memory.updates, memory.forgotten_at, strict=True))
        ]
        if memory.scores is not None and memory.first_scores is not None:
            for record, first, last in zip(records, memory.first_scores, memory.scores, strict=True):
                record |= {"mrd_before": first, "mrd_last": last}
        return records
