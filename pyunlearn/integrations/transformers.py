"""An objective as the loss of transformers' own Trainer: `Trainer(compute_loss_func=loss_func("wga", alpha=1.0), ...)`.

A mean is over the whole optimiser step, as in `UnlearnTrainer`, so that accumulation does not matter. What
`compute_loss_func` is told, logits, labels and the step's number of tokens, is all that an objective on tokens needs.
Others need more, and `attach(trainer)` gets it: the step's number of sequences, and what a reference has to read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import objectives
from ..model.fingerprint import dataset_fingerprint
from ..model.forward import IGNORE_INDEX, select_positions
from ..model.reference import Cached, Source, as_reference, check_apart
from ..objectives import Objective, TokenInputs
from ..objectives.reduction import Selection
from ..ops import token_stats

ELSE = "use pyunlearn.UnlearnTrainer"


def loss_func(objective: str | Objective, *, reference: Source | None = None, **options: Any) -> LossFunc:
    """The callable for `compute_loss_func`.

    objective: a name, with its options as in `objectives.get`, or an Objective, of one batch of supervised tokens.
    reference: where it needs one, a frozen model, or a ReferenceCache (rows then have their `index`, and
    TrainingArguments remove_unused_columns=False).

    Raises ValueError for an objective that needs pairs, hidden states, or tokens that are not supervised, all of which
    `UnlearnTrainer` has; for a reference that is missing, or not needed, or does not serve; TypeError for no objective.
    """
    if isinstance(objective, str):
        objective = objectives.get(objective, **options)
    elif options:
        raise ValueError(f"{', '.join(options)}: options go with an objective's name, got an Objective")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: needs a name or an Objective, got {type(objective).__name__}")
    if len(objective.batches) > 1:
        raise ValueError(f"{objective.name}: needs {objective.batches} side by side, a Trainer has one batch; {ELSE}")
    if objective.layer is not None:
        raise ValueError(f"{objective.name}: needs hidden states, compute_loss_func gets logits; {ELSE}")
    if objective.positions != "supervised":
        raise ValueError(
            f"{objective.name}: positions={objective.positions!r}, labels show the supervised ones alone; take a "
            f"preset or an option with 'supervised', or {ELSE}"
        )
    if objective.selection != Selection():
        raise ValueError(
            f"{objective.name}: needs keep=1 and skip=0, got keep={objective.keep:g} and "
            f"skip={objective.selection.skip}: Trainer counts all tokens; {ELSE}"
        )
    if (reference is None) != (objective.reference is None):
        needs = f"a frozen model or a ReferenceCache for {objective.name}" if reference is None else "None"
        raise ValueError(f"reference: needs {needs}, got {type(reference).__name__}")
    return LossFunc(objective, reference)


class LossFunc:
    """(outputs, labels, num_items_in_batch) -> loss; see `loss_func`."""

    def __init__(self, objective: Objective, reference: Source | None = None):
        self.objective = objective
        self.reference = None if reference is None else as_reference(reference)
        if self.reference is not None and objective.reference == "kl":
            self.reference.check("reference", "supervised", True, ())
        self.attached = False
        self.num_sequences: Any = None  # of the whole step
        self.inputs: dict[str, Tensor] | None = None  # of the forward that is going on

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The share of a micro-batch in the mean of its step.

        Raises ValueError without labels or num_items_in_batch, and for what only an attached one is told.
        """
        if labels is None or num_items_in_batch is None:
            missing = "labels" if labels is None else "num_items_in_batch"
            raise ValueError(f"{missing}: needs those of the batch, got None; of transformers' Trainer both come along")
        if self.reference is not None and self.inputs is None:
            raise ValueError(f"{self.objective.name}: its reference has to read the batch: call attach(trainer) first")
        if isinstance(outputs, tuple):
            raise ValueError("outputs: needs those of a model with return_dict=True, which name logits; got a tuple")
        stats = self.statistics(outputs["logits"], labels)
        return self.objective({self.objective.batches[0]: stats}, count=self.count(labels, num_items_in_batch))

    def count(self, labels: Tensor, num_tokens: Any) -> Any:
        """What the mean divides by: tokens or sequences of the whole step."""
        if self.objective.unit == "tokens":
            return num_tokens
        if self.attached:
            return self.num_sequences
        if int((labels[:, 1:] != IGNORE_INDEX).sum()) != int(num_tokens):
            raise ValueError(
                f"{self.objective.name}: divides by the sequences of the whole step, of which Trainer tells the tokens "
                f"alone; call attach(trainer) first, or take reduction='token_mean'"
            )
        return None  # the step's tokens are all in this batch, so its sequences are, too

    def statistics(self, logits: Tensor, labels: Tensor) -> TokenInputs:
        """Of the supervised tokens: (B, T - 1), or flat where a reference has flat ones."""
        outputs, vocab_size = self.objective.outputs, logits.size(-1)
        how: dict[str, Any] = {"temperature": self.objective.temperature}
        how |= {} if self.objective.k is None else {"k": self.objective.k}
        how |= {"lowered": self.objective.lowered} if self.objective.lowered else {}
        if self.reference is None:
            stats = token_stats(logits[:, :-1], labels[:, 1:], outputs, **how)
            return TokenInputs(stats.as_dict(), mask=stats.mask, vocab_size=vocab_size)
        batch = {**(self.inputs or {}), "labels": labels}
        rows, targets, sequence_ids = select_positions(batch, "supervised")
        own = logits.flatten(0, 1).index_select(0, rows)
        other, scalars = None, dict[str, Tensor]()
        if self.objective.reference == "kl":
            hidden = self.reference.hidden(batch, "supervised").to(logits.device)
            other = self.reference.head(hidden).logits(hidden)
        if names := self.objective.reference_outputs:
            scalars = self.reference.scalars(batch, names, temperature=self.objective.temperature)
        return TokenInputs(
            token_stats(own, targets, outputs, reference=other, **how).as_dict(),
            **{f"ref_{name}": value.to(logits.device) for name, value in scalars.items()},  # type: ignore[arg-type]
            sequence_ids=sequence_ids,
            num_sequences=len(labels),
            vocab_size=vocab_size,
        )

    def attach(self, trainer: Any) -> None:
        """Lets `trainer`, whose compute_loss_func this is, tell the sequences of every step and what its batches hold.

        Raises ValueError for another trainer's loss, for a reference that it trains along, for a cache of other rows or
        where the Trainer takes the index from them; in an evaluation for any cache.
        """
        if trainer.compute_loss_func is not self:
            raise ValueError("trainer: its compute_loss_func needs to be this one")
        if isinstance(self.reference, Cached):
            if trainer.args.remove_unused_columns:
                raise ValueError("args.remove_unused_columns: needs False: a cache goes by the rows' index; got True")
            if dataset_fingerprint(trainer.train_dataset) != self.reference.cache.metadata["dataset"]:
                raise ValueError(
                    f"reference: {self.reference.cache.path} is of other rows than train_dataset; build it on these"
                )
        if self.reference is not None:
            check_apart({self.objective.batches[0]: self.reference}, trainer.model)
            self.reference.to(trainer.args.device)
        collect, compute = trainer.get_batch_samples, trainer.compute_loss

        def get_batch_samples(*args: Any, **named: Any) -> Any:
            batches, num_tokens = collect(*args, **named)
            self.num_sequences = self.sequences(trainer, batches) if batches else None
            return batches, num_tokens

        def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **named: Any) -> Any:
            if not model.training:
                if isinstance(self.reference, Cached):
                    raise ValueError("reference: a cache is of the rows of train_dataset; evaluate with a frozen model")
                self.num_sequences = self.sequences(trainer, [inputs])
            self.inputs = {key: value for key, value in inputs.items() if key != "labels"}
            try:
                return compute(model, {key: value for key, value in inputs.items() if key != "index"}, *args, **named)
            finally:
                self.inputs = None

        trainer.get_batch_samples, trainer.compute_loss = get_batch_samples, compute_loss
        self.attached = True

    def sequences(self, trainer: Any, batches: list[dict[str, Any]]) -> Tensor:
        """How many sequences with a supervised token, over all processes where Trainer counts tokens so."""
        own = [(batch["labels"][:, 1:] != IGNORE_INDEX).any(1).sum() for batch in batches]
        total = torch.stack(own).sum().to(trainer.args.device)
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            total = trainer.accelerator.gather(total).sum()
        return total
