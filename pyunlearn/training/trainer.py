"""UnlearnTrainer: transformers' Trainer with any number of forget and retain objectives in one loss.

Each step runs every kind of sequence (forget, retain, refusals) through the model once, hands only the positions that
count to the LM head (`linear_token_stats`, one call a kind), and leaves the rest to the objectives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import collate
from ..model.causal_lm import eval_mode
from ..model.compiled import Compiling
from ..model.forward import layer_number, length_batches
from ..model.packing import Packing
from ..model.reference import Live, Source, check_apart
from ..objectives.representation import check_layers
from .arguments import check_arguments, check_router
from .as_found import left_as_found
from .dual import Dual
from .sampling import ForgetSampler
from .terms import Count, TermLosses, check_kinds, check_rows, check_top, collect_needs, count_items, make_terms


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is not a finite number; nothing has been saved since the last checkpoint."""


class EpochSetter(TrainerCallback):
    """Tells the data set its epoch: accelerate does not where a batch sampler is wrapped (several ranks, resuming)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class UnlearnTrainer(TermLosses, Trainer):
    """Trains on coefficient-weighted objectives over paired batches.

    model: a transformers causal LM (peft included). args: TrainingArguments, each of which has its effect or is
    refused; remove_unused_columns is set as this trainer needs it. train_dataset: a ForgetRetainDataset, or any data
    set whose `collate` gives {kind: batch} with batches of input_ids, attention_mask, labels (B, T) and index (B,).
    objectives: see `make_terms`. reference: what stands for the frozen reference: a ReferenceCache, {kind:
    ReferenceCache} when several kinds of sequence need one, a live model, or, for a model under peft,
    `pyunlearn.model.reference.AdapterOff(model)`. sampler: draws the forget rows of every step (in full batches, with
    replacement) in place of one shuffled pass an epoch; the train_dataset must be a ForgetRetainDataset. dual: moves
    the coefficient of the retain objective, of which there is then one. packing: the batches of a step go through the
    model together, without padding, what their rows begin with once (`pyunlearn.model.packing`), where a trial in the
    first step shows that the model says the same of them; `trainer.packing.declined` says why it does not.
    compile: forwards that need gradients, and their backwards, run the blocks as torch.compile makes them
    (`pyunlearn.model.compiled`), where a trial before the first step shows that they say the same;
    `trainer.compiling.declined` says why they do not.

    Means are over the whole optimiser step: tokens and sequences are counted over all micro-batches and all ranks, so
    that batch size times accumulation times processes, not their split, decides the step. Every logged line holds each
    term's loss, count and coefficient. However a training or an evaluation ends, only the model's weights are then
    other than before (`left_as_found`), and another trainer of it sees no trace of this one. An evaluation gives the
    losses of its whole data set, counted in the same way.

    Raises ValueError at once for kinds of sequence or references that the objectives need and were not given, for a
    reference that would be trained along, for arguments and settings of the model that would have no effect; from
    `train()` NonFiniteLossError, and ValueError for a head whose logits are not its weight's (`CausalLM.check_head`).
    """

    loss_is_scaled_for_ga = True  # by the counts

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any,
        objectives: Sequence[Any],
        reference: Source | Mapping[str, Source] | None = None,
        data_collator: Any = None,
        sampler: ForgetSampler | None = None,
        dual: Dual | None = None,
        packing: bool = True,
        compile: bool = False,
        **options: Any,
    ):
        if sampler is not None and getattr(train_dataset, "forget", None) is not sampler.rows:
            raise ValueError("sampler: needs the forget rows of a ForgetRetainDataset that is the train_dataset")
        check_kinds(collect_needs(make_terms(objectives)), train_dataset)
        TermLosses.__init__(self, objectives, reference)
        retained = [term for term in self.terms if term.objective.role == "retain"]
        if dual is not None and len(retained) != 1:
            raise ValueError(f"dual: needs one retain objective, got {[term.label for term in retained]}")
        self.packing = Packing() if packing else None
        for live in {each for each in self.references.values() if isinstance(each, Live)}:
            live.packing = Packing() if packing else None
        self.compiling = Compiling() if compile else None
        args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
        check_arguments(args, options)
        args.remove_unused_columns = False
        if args.n_gpu > 1:  # torch's DataParallel would split a pair; several GPUs are torchrun's business
            args._n_gpu = 1
        collate = train_dataset.collate if data_collator is None else data_collator
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        Trainer.__init__(self, model=model, args=args, train_dataset=train_dataset, data_collator=collate, **options)
        if use_cache is not None:
            model.config.use_cache = use_cache  # which generation from the model, and its saved configuration, go by
        self.model_accepts_loss_kwargs = True
        self.label_names = list(self.needs)
        started: Any = self.model
        check_apart(self.references, started)
        check_rows(self.references, train_dataset, "train_dataset")
        check_router(started)
        for need in self.needs.values():
            for layer in need.layers:
                layer_number(started, layer)  # raises for one that the model does not have
            check_top(need, started)
        check_layers((term.objective for term in self.terms), partial(layer_number, started))
        for reference in self.references.values():
            reference.to(self.args.device)
        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(EpochSetter(train_dataset))
        self.sampler = sampler
        if sampler is not None:
            self.add_callback(sampler)
        self.dual, self.bound = dual, retained[0] if dual is not None else None  # the term whose coefficient it is
        if dual is not None:
            dual.begin(retained[0].coefficient, self._retain_loss)
            self.add_callback(dual)
        self._micro: list[tuple[Tensor, dict[str, Tensor]]] = []  # this step: term losses, sample indices
        self._logged: list[dict[str, float]] = []  # the steps since the last log line
        self._evaluated: list[Tensor] = []  # this evaluation: (terms, 2) a batch, sum and count

    def train(self, *args: Any, **options: Any) -> Any:
        self._logged = []
        with self._model_prepared():
            return super().train(*args, **options)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """The losses of the whole data set: counted over all its batches, which then do not matter."""
        check_kinds(self.needs, dataloader.dataset, "eval_dataset")
        check_rows(self.references, dataloader.dataset, "eval_dataset")
        self._evaluated = []
        with self._model_prepared():
            output: Any = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        total = torch.stack(self._evaluated).sum(0, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        loss = 0.0
        for term, weight, (value, count) in zip(self.terms, self.coefficients(), total.tolist(), strict=True):
            mean = value if term.objective.reduction == "sum" else value / max(count, 1)
            output.metrics[f"{metric_key_prefix}_{term.label}/loss"] = mean
            loss += weight * mean
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        """Keeps each term's sum and count, for `evaluation_loop`: the loss of one batch says nothing."""
        state, batch = self.accelerator.gradient_state, dict[str, Any](self._prepare_inputs(inputs))
        own = size = min(len(rows["index"]) for rows in batch.values())
        if state.end_of_dataloader and state.remainder > 0:  # the ranks have filled it up
            own = min(max(state.remainder - self.accelerator.process_index * size, 0), size)
        for kind, rows in batch.items():  # an item may have several rows of a kind
            batch[kind] = {name: value[: max(own, 1) * (len(value) // size)] for name, value in rows.items()}
        with torch.no_grad():
            sums = torch.stack(self.term_losses(model, batch, {term.count: 1 for term in self.terms}))
        counts = sums.new_tensor([count_items(batch, *term.count) for term in self.terms])
        self._evaluated.append(torch.stack([sums, counts], 1) * bool(own))
        return None, None, None

    def coefficients(self) -> list[float]:
        """Of every term as it is now: that of a dual variable moves."""
        moving = 0.0 if self.dual is None else self.dual.memory.value
        return [moving if term is self.bound else term.coefficient for term in self.terms]

    @torch.no_grad()
    def _retain_loss(self, model: torch.nn.Module) -> float:
        """The retain term's loss over all retain rows. Raises ValueError where term or data set has no such rows."""
        term, rows = self.bound, getattr(self.train_dataset, "retain", None)
        if term is None or rows is None or set(term.kinds.values()) != {"retain"}:
            raise ValueError(
                "dual: above_reference measures the retain loss on the retain rows of a ForgetRetainDataset, by an "
                "objective that needs no others; give eps, a number"
            )
        lengths, size = [len(rows[i]["input_ids"]) for i in range(len(rows))], self.args.per_device_eval_batch_size
        batches: list[dict[str, Any]] = [
            {"retain": collate([rows[i] for i in batch], rows.pad_token_id)} for batch in length_batches(lengths, size)
        ]
        counts = {term.count: sum(count_items(batch, *term.count) for batch in batches)}
        with left_as_found(model), eval_mode(model):
            parts = [
                self.term_losses(model, dict[str, Any](self._prepare_inputs(batch)), counts, [term])[0].double()
                for batch in batches
            ]
        return float(torch.stack(parts).sum())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return sum(super(UnlearnTrainer, self).floating_point_ops(inputs[kind]) for kind in self.needs)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for kind in self.needs:
            super()._track_num_input_tokens(inputs[kind])

    @contextmanager
    def _model_prepared(self) -> Iterator[None]:
        """Accelerate prepares the model inside, as this trainer is set; an evaluation in a training changes nothing."""
        if self.is_in_train:
            yield
            return
        model: Any = self.model
        try:
            with left_as_found(model), self.packing or nullcontext():
                yield
        finally:
            model = self.model  # another one where train() has called model_init
            if self.is_in_train:  # ended by an exception
                self.is_in_train = False
                model.zero_grad()
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # those keep the model
                self.model_wrapped = model
                self.accelerator._models.clear()  # an evaluation prepares the model anew where there is none

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimiser step: the data loader's, or as many that the sampler draws now.

        Draws are for all ranks together; each takes its own.
        """
        self._micro = []
        if self.sampler is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        for _ in range(num_batches):
            next(epoch_iterator)  # counts the epoch's steps
        size, ranks = self._train_batch_size, self.accelerator.num_processes
        dataset: Any = self.train_dataset
        drawn = self.sampler.draw(self.state.global_step, num_batches * ranks * size)
        starts = range(self.accelerator.process_index * size, len(drawn), ranks * size)
        batches = [
            self.data_collator([dataset.pair(index, place) for index, place in drawn[start : start + size]])
            for start in starts
        ]
        return batches, self._get_num_items_in_batch(batches, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        counts = (
            self._get_num_items_in_batch([inputs], self.args.device)
            if num_items_in_batch is None
            else num_items_in_batch
        )
        losses = torch.stack(self.term_losses(model, inputs, counts))
        if model.training:
            self._micro.append((losses.detach(), {kind: inputs[kind]["index"] for kind in self.needs}))
        coefficients = losses.new_tensor(self.coefficients())
        if model.training and self.dual is not None and self.dual.every == "micro_batch":
            self._observe_batch(self.dual, losses.detach(), inputs, counts)
        # Gradients are averaged over ranks, the counts are sums over ranks.
        loss = (coefficients * losses).sum() * self.accelerator.num_processes
        return (loss, {"term_losses": losses.detach()}) if return_outputs else loss

    def _observe_batch(self, dual: Dual, losses: Tensor, inputs: Any, counts: Mapping[Count, Tensor]) -> None:
        """Tells the dual variable the retain loss of one micro-batch, over all ranks."""
        at, term = next((i, term) for i, term in enumerate(self.terms) if term is self.bound)
        told = torch.stack([losses[at].double(), losses.new_tensor(count_items(inputs, *term.count)).double()])
        if self.accelerator.num_processes > 1:
            told = self.accelerator.gather(told[None]).sum(0)
        share, count = told.tolist()
        whole = int(counts[term.count])
        mean = share if term.objective.reduction == "sum" else share * (whole / count) if count else None
        dual.observe_batch(share, mean, self.state.epoch or 0.0)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """{(kinds, positions, unit): how many}, over all micro-batches of the step and all ranks; 0-d int64."""
        if not batch_samples:
            return None
        wanted = sorted({term.count for term in self.terms})
        local = [sum(count_items(batch, *key) for batch in batch_samples) for key in wanted]
        counts = torch.tensor(local, device=device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.gather(counts).view(-1, len(wanted)).sum(0)
        return dict(zip(wanted, counts.unbind(), strict=True))

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()  # as what is compiled is to be
        with nullcontext() if self.compiling is None else self.compiling(model, self.packing):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._finish_step(num_items_in_batch)
        return loss

    def _finish_step(self, counts: Mapping[Count, Tensor]) -> None:
        """Before the optimiser moves: sum the terms over micro-batches and ranks, and stop on what is not finite."""
        micro, self._micro = self._micro, []
        local = torch.stack([losses for losses, _ in micro])
        total = local.sum(0)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.gather(total).view(-1, len(self.terms)).sum(0)
        values = total.tolist()
        step: dict[str, float] = {}
        for term, value in zip(self.terms, values, strict=True):
            step[f"{term.label}/loss"] = value
            step[f"{term.label}/count"] = int(counts[term.count])
            if self.dual is not None and term is self.bound:
                self.dual.observe(value)
        if not all(map(math.isfinite, values)):
            where = [f"{kind} samples {index.tolist()}" for losses, indices in micro if not losses.isfinite().all()
                     for kind, index in indices.items()]  # fmt: skip
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: the loss is not finite: "
                + ", ".join(f"{term.label} = {value:g}" for term, value in zip(self.terms, values, strict=True))
                + f"; in {', '.join(where) or 'a batch of another process'}. The weights are those of the step "
                "before; try a lower learning rate, or max_grad_norm > 0"
            )
        self._logged.append(step)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if self._logged and "loss" in logs:
            steps, self._logged = self._logged, []
            for key in steps[0]:
                total = sum(step[key] for step in steps)
                logs[key] = total if key.endswith("/count") else total / len(steps)
            logs.update({f"{term.label}/coefficient": term.coefficient for term in self.terms})
            if self.dual is not None and self.bound is not None:
                logs.update({f"{self.bound.label}/coefficient": self.dual.used, **self.dual.summary()})
            if self.sampler is not None:
                logs.update(self.sampler.summary())
        super().log(logs, start_time)
        norm = logs.get("grad_norm")
        if norm is not None and not math.isfinite(norm) and getattr(self.accelerator, "scaler", None) is None:
            raise NonFiniteLossError(
                f"step {self.state.global_step}: the gradient norm is {norm}, so the weights are lost; the last "
                "checkpoint is from before. Try a lower learning rate"
            )
