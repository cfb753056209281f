"""The two training stages of a run, memorise and unlearn, and what both share."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import QA, ForgetRetainDataset, QADataset, collate
from ..model.cache import ReferenceCache
from ..model.load import process_state
from ..model.reference import Source
from ..runs.config import GEffectConfig, RunConfig, TrainingConfig
from ..runs.folder import RunFolder
from .callbacks import Interrupt, KeepCheckpoints, MetricsWriter, ProgressBar
from .probe import GEffectCallback, Probe
from .sampling import ForgetSampler, Forgotten
from .terms import Need, TermLosses, collect_needs, make_terms
from .trainer import NonFiniteLossError, UnlearnTrainer


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with everything finished so far on disk. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, signum: int = 2):
        super().__init__(message)
        self.exit_code = 128 + signum


@contextmanager
def interruptible(command: str) -> Iterator[None]:
    """Ctrl-C inside is told with the command that goes on from there."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "stopped; everything finished so far is kept"
        code = getattr(interrupt, "exit_code", 130)
        raise Interrupted(f"{told}\nresume with: {command}", code - 128) from None


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage gets besides its data."""

    config: RunConfig
    folder: RunFolder
    console: Console
    max_length: int | None
    world_size: int = 1

    @property
    def progress(self) -> bool:
        return not self.console.quiet


class SkipLastSave(TrainerCallback):
    """No resumable checkpoint of the last step: the stage's own model is written next, without the optimiser."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


class AnswerRows(Dataset):
    """Question-answer rows alone, as the retain rows that `gd` trains on."""

    def __init__(self, rows: QADataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"retain": self.rows[index]}

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
        return {"retain": collate([item["retain"] for item in items], self.rows.pad_token_id)}


def memorise(context: Context, model: Any, tokenizer: Any, forget: list[QA], retain: list[QA]) -> None:
    """Fine-tunes `model` in place on the forget set and `retain_limit` retain rows, by `gd` alone."""
    settings = context.config.memorise
    if settings is None:
        raise ValueError("memorise: the configuration has no such stage")
    items = forget + retain[: settings.retain_limit]
    dataset = AnswerRows(QADataset(items, tokenizer, context.max_length))
    train(context, "memorise", settings, model, dataset, ["gd"], None)


def unlearn(
    context: Context, model: Any, tokenizer: Any, forget: list[QA], retain: list[QA], refusals: list[str]
) -> None:
    """Unlearns `model` in place; what it says before is the frozen reference, cached in the run folder."""
    settings = context.config.unlearn
    terms = [(term.objective(), term.coefficient) for term in (*settings.forget, *settings.retain)]
    needs = collect_needs(make_terms(terms))
    forget_rows = QADataset(forget, tokenizer, context.max_length)
    if any(kind.startswith("retain") for kind in needs):
        retain_rows = QADataset(retain_used(context, len(forget), retain), tokenizer, context.max_length)
    else:
        retain_rows = None
    dataset = make_pairs(context, forget_rows, retain_rows, refusals, needs)
    references = make_references(context, model, tokenizer, dataset, needs)
    callbacks: list[TrainerCallback] = []
    if (probing := context.config.g_effect) is not None:
        probe = make_probe(context, probing, model, tokenizer, forget, retain, refusals)
        callbacks.append(GEffectCallback(probe, context.folder.metrics, "unlearn", probing.every))
    if settings.keep_steps is not None:
        callbacks.append(KeepCheckpoints(context.folder, tokenizer, settings.keep_steps))
    sampler = make_sampler(context.config, forget_rows)
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(model)}
    train(context, "unlearn", settings, model, dataset, terms, references, callbacks, sampler)
    change = mean_absolute_change(before, model)  # by all ranks: sharded weights are gathered
    if process_state().is_main_process:
        context.folder.write_json(context.folder.unlearning, {
            "mean_absolute_change": change,
            "limits": None if sampler is None else sampler.memory.limits,
            "refreshed_at": [] if sampler is None else sampler.memory.refreshed_at,
            "samples": [] if sampler is None else sampler.records(),
        })  # fmt: skip


def make_sampler(config: RunConfig, rows: QADataset) -> ForgetSampler | None:
    """None where the trainer's own shuffles serve."""
    sampling, stop = config.unlearn.sampling, config.unlearn.early_stop
    if sampling.by == "shuffle":
        return None
    return ForgetSampler(
        rows,
        sampling.weighting if sampling.by == "mrd" else None,
        refresh_steps=sampling.refresh_steps,
        seed=config.seed,
        forgotten=None if stop is None else Forgotten(stop.ngram, stop.share, stop.every_steps),
        scores={name: getattr(sampling, name) for name in ("estimator", "num_draws", "sigma")},
    )


def trainable(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def mean_absolute_change(before: Mapping[str, torch.Tensor], model: Any) -> float:
    """The mean over all trained weights of |now - before| (Figure 3 of arXiv:2504.06658)."""
    total = count = 0.0
    for name, weight in trainable(model):
        now = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        total += float((now.detach().cpu().float() - before[name].float()).abs().sum(dtype=torch.float64))
        count += now.numel()
    return total / count


def make_probe(
    context: Context,
    settings: GEffectConfig,
    model: Any,
    tokenizer: Any,
    forget: list[QA],
    retain: list[QA],
    refusals: list[str],
) -> Probe:
    """The run's objectives on samples drawn from its seed; `model`, not yet unlearned, is their reference."""
    unlearning, seed = context.config.unlearn, context.config.seed
    objectives = [(term.objective(), term.coefficient) for term in (*unlearning.forget, *unlearning.retain)]
    needs = collect_needs(make_terms(objectives))
    drawn = {}
    for role, items in (("forget", forget), ("retain", retain)):
        count = min(len(items), getattr(settings, f"{role}_samples"))
        chosen = sorted(random.Random(f"{seed}/probe/{role}").sample(range(len(items)), count))
        drawn[role] = QADataset([items[i] for i in chosen], tokenizer, context.max_length)
    dataset = make_pairs(context, drawn["forget"], drawn["retain"], refusals, needs, fixed=True)
    rows = {kind: rows_of(dataset, kind, tokenizer, context.max_length) for kind in {**drawn, **needs}}
    own = dataclasses.replace(context, folder=RunFolder(context.folder.geffect))
    losses = TermLosses(objectives, make_references(own, model, tokenizer, dataset, needs))
    return Probe(losses, rows, settings, bf16=unlearning.bf16)


def make_pairs(
    context: Context,
    forget: QADataset,
    retain: QADataset | None,
    refusals: list[str],
    needs: Mapping[str, Need],
    fixed: bool = False,
) -> ForgetRetainDataset:
    """Forget and retain rows with the refusals that the objectives need; `fixed` ones do not change over epochs."""
    return ForgetRetainDataset(
        forget,
        retain,
        refusals=refusals,
        refuse=[role for role in ("forget", "retain") if f"{role}_refusal" in needs],
        fixed_refusals=fixed or any(need.reference for kind, need in needs.items() if "refusal" in kind),
        seed=context.config.seed,
    )


def make_references(
    context: Context, model: Any, tokenizer: Any, dataset: ForgetRetainDataset, needs: Mapping[str, Need]
) -> dict[str, Source]:
    return {
        kind: make_reference(context, model, rows_of(dataset, kind, tokenizer, context.max_length), kind, need)
        for kind, need in needs.items()
        if need.reference
    }


def retain_used(context: Context, num_forget: int, retain: list[QA]) -> list[QA]:
    """The retain rows this run will meet: all, or a seeded draw where fewer are used (no reference is wasted)."""
    settings = context.config.unlearn
    used = math.ceil(settings.epochs * num_forget)
    a_step = settings.batch_size * settings.gradient_accumulation_steps * context.world_size
    if settings.max_steps is not None:
        used = settings.max_steps * a_step
    elif settings.sampling.by != "shuffle":  # full batches
        used = math.ceil(settings.epochs * math.ceil(num_forget / a_step)) * a_step
    if used >= len(retain):
        return retain
    return [retain[i] for i in sorted(random.Random(context.config.seed).sample(range(len(retain)), used))]


def rows_of(dataset: ForgetRetainDataset, kind: str, tokenizer: Any, max_length: int | None) -> QADataset:
    """The rows of one kind of sequence, refusals as the data set draws them."""
    role = kind.removesuffix("_refusal")
    rows = dataset.forget if role == "forget" else dataset.retain
    if rows is None:
        raise ValueError(f"{kind}: there are no {role} rows")
    if kind == role:
        return rows
    answers = [dataset.refusal(role, index) for index in range(len(rows))]
    return QADataset(rows.items, tokenizer, max_length, answers=answers)


def make_reference(context: Context, model: Any, rows: QADataset, kind: str, need: Any) -> Source:
    """A cache on disk; a frozen copy in memory where padding counts, which no cache can know."""
    if need.hidden_reference and need.widest == "all":
        return copy.deepcopy(model).requires_grad_(False).eval()
    path = context.folder.reference / f"{kind}.safetensors"
    with process_state().main_process_first():  # the others find a file that fits
        return ReferenceCache.build(
            model,
            rows,
            path,
            kl=need.kl_reference,
            layers=need.reference_layers,
            positions=need.widest if need.hidden_reference else "supervised",
            batch_size=context.config.evaluate.batch_size,
            progress=context.progress,
        )


def train(
    context: Context,
    stage: str,
    settings: TrainingConfig,
    model: Any,
    dataset: Any,
    objectives: Sequence[Any],
    reference: Mapping[str, Source] | None,
    callbacks: Sequence[TrainerCallback] = (),
    sampler: ForgetSampler | None = None,
) -> None:
    """One stage to its end, from its last checkpoint if there is one.

    Raises Interrupted after Ctrl-C, with a checkpoint saved, and NonFiniteLossError naming the last good checkpoint.
    """
    folder, last = context.folder, context.folder.last_checkpoint(stage)
    bar = ProgressBar(stage, context.console)
    with Interrupt(context.console) as interrupt:
        trainer = UnlearnTrainer(
            model=model,
            args=training_arguments(context, stage, settings),
            train_dataset=dataset,
            objectives=objectives,
            reference=reference,
            sampler=sampler,
            callbacks=[MetricsWriter(folder.metrics, stage), *callbacks, bar, interrupt, SkipLastSave()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except NonFiniteLossError as error:
            last = folder.last_checkpoint(stage)
            raise NonFiniteLossError(f"{stage}: {error}. Last good checkpoint: {last or 'none yet'}") from None
        finally:
            bar.close()
    if interrupt.signum is not None and trainer.state.global_step < trainer.state.max_steps:
        step, total = trainer.state.global_step, trainer.state.max_steps
        raise Interrupted(f"stopped in {stage} at step {step} of {total}, checkpoint saved", interrupt.signum)
    model.eval()


def training_arguments(context: Context, stage: str, settings: TrainingConfig) -> TrainingArguments:
    # transformers 5.x renamed the switch; the old name warns in newer ones.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    switches: dict[str, Any] = {checkpointing: settings.gradient_checkpointing}
    return TrainingArguments(
        output_dir=str(context.folder.training(stage)),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.scheduler,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        seed=context.config.seed,
        data_seed=context.config.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_broadcast_buffers=False,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=[],
        **switches,
    )


def remove_training(folder: RunFolder, stage: str) -> None:
    """The resumable checkpoints of a finished stage."""
    path: Path = folder.training(stage)
    shutil.rmtree(path, ignore_errors=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()
