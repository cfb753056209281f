"""One training from its last checkpoint to its end: what all stages share, whatever they train on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._files import check_seal, named_failures
from ..data import QA, PromptFormat, QADataset
from ..distributed import Processes
from .arguments import check_arguments, check_library
from .callbacks import Interrupt, MetricsWriter, ProgressBar, SealCheckpoints
from .dual import Dual
from .folder import TrainingFolder
from .sampling import ForgetSampler
from .settings import TrainingConfig
from .trackers import trackers
from .trainer import NonFiniteLossError, UnlearnTrainer


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with everything finished so far on disk. `exit_code` is 128 + the signal."""

    def __init__(self, message: str, signum: int = 2):
        super().__init__(message)
        self.exit_code = 128 + signum


@dataclass(frozen=True)
class Stage:
    """What a training gets besides model, data and settings.

    folder: where it keeps what is finished; the same call goes on from there. max_length: tokens of a sample; None: the
    model's context. console: of the progress bars; quiet by default. reference_batch_size: of the forwards that fill
    reference caches. prompt_format: how questions are put; None is `PromptFormat`. references: a folder of reference
    caches that trainings share (`ReferenceCache.shared`); None keeps them in `folder`.
    """

    folder: TrainingFolder
    seed: int = 0
    max_length: int | None = None
    console: Console = field(default_factory=lambda: Console(quiet=True))
    processes: Processes = field(default_factory=Processes.start)
    reference_batch_size: int = 16
    prompt_format: PromptFormat | None = None
    references: Path | None = None

    @property
    def progress(self) -> bool:
        return not self.console.quiet

    def rows(self, items: Sequence[QA], tokenizer: Any, text_mask: bool = False) -> QADataset:
        """Tokenised as this job does. Raises as `QADataset`."""
        return QADataset(items, tokenizer, self.max_length, prompt_format=self.prompt_format, text_mask=text_mask)


class Trained(NamedTuple):
    """steps: of the optimiser. packing: `Packing.as_dict`, compiling: `Compiling.as_dict`; None: switched off."""

    steps: int
    packing: dict[str, Any] | None
    compiling: dict[str, Any] | None


class SkipLastSave(TrainerCallback):
    """No resumable checkpoint of the last step: the stage's own model is written next, without the optimiser."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False


def train(
    stage: Stage,
    name: str,
    settings: TrainingConfig,
    model: Any,
    dataset: Any,
    objectives: Sequence[Any],
    reference: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    sampler: ForgetSampler | None = None,
    dual: Dual | None = None,
) -> Trained:
    """The stage `name` to its end, from its last checkpoint if there is one.

    Raises Interrupted after Ctrl-C, with a checkpoint saved, NonFiniteLossError naming the last good checkpoint,
    ValueError naming a file of the last checkpoint that is missing or damaged, OSError naming the folder where no
    checkpoint can be written, and ImportError naming a tracker that is not installed.
    """
    folder, last = stage.folder, stage.folder.last_checkpoint(name)
    with stage.processes.first_first():
        if last is not None and stage.processes.first:
            check_seal(last, f"delete {last}: the checkpoint before it, or the start of the stage, is taken then")
    bar = ProgressBar(name, stage.console)
    told = trackers(settings.report_to, folder.trackers, folder.path.name, name, stage.processes.first)
    with told as tracking, Interrupt(stage.console) as interrupt:
        trainer = UnlearnTrainer(
            model=model,
            args=training_arguments(stage, name, settings, len(dataset)),
            train_dataset=dataset,
            objectives=objectives,
            reference=reference,
            sampler=sampler,
            dual=dual,
            packing=settings.packing,
            compile=settings.compile,
            callbacks=[
                MetricsWriter(folder.metrics, name),
                *callbacks,
                bar,
                interrupt,
                SkipLastSave(),
                SealCheckpoints(folder, name),
                *tracking,  # last: they get what the others add to a log line
            ],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with named_failures(folder.training(name)):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except NonFiniteLossError as error:
            last = folder.last_checkpoint(name)
            raise NonFiniteLossError(f"{name}: {error}. Last good checkpoint: {last or 'none yet'}") from None
        finally:
            bar.close()
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if interrupt.signum is not None and step < steps:
        raise Interrupted(f"stopped in {name} at step {step} of {steps}, checkpoint saved", interrupt.signum)
    packing, compiling = (None if each is None else each.as_dict() for each in (trainer.packing, trainer.compiling))
    return Trained(step, packing, compiling)


def training_arguments(stage: Stage, name: str, settings: TrainingConfig, rows: int) -> TrainingArguments:
    """rows: that it trains on.

    Raises ValueError for a warm-up that takes all of its steps, and for arguments that would have no effect or a false
    one; ImportError that names the package of an optimizer.
    """
    check_library(settings.optim, f"{name}.optim")
    # transformers 5.x renamed the switch; the old name warns in newer ones.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    switches: dict[str, Any] = {checkpointing: settings.gradient_checkpointing}
    given: dict[str, Any] = dict(
        output_dir=str(stage.folder.training(name)),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        warmup_steps=warmup_steps(stage, name, settings, rows),
        optim=settings.optim,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.scheduler,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=None,  # SealCheckpoints removes them: transformers goes by the files' times
        seed=stage.seed,
        data_seed=stage.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_broadcast_buffers=False,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=[],  # `trackers`
        **switches,
    )
    args = TrainingArguments(**given | settings.arguments)
    check_arguments(args, {})
    return args


def planned_steps(stage: Stage, settings: TrainingConfig, rows: int) -> int:
    """Optimiser steps of a training on so many rows."""
    batches = math.ceil(rows / (settings.batch_size * stage.processes.count))
    of_an_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    return settings.max_steps or math.ceil(settings.epochs * of_an_epoch)


def warmup_steps(stage: Stage, name: str, settings: TrainingConfig, rows: int) -> int:
    """Optimiser steps below the learning rate. Raises ValueError if that is all of them."""
    total = planned_steps(stage, settings, rows)
    if settings.warmup == "epoch":
        steps = rows // (settings.batch_size * settings.gradient_accumulation_steps * stage.processes.count)
    else:
        steps = int(settings.warmup) if settings.warmup >= 1 else math.ceil(settings.warmup * total)
    if steps >= total and settings.scheduler != "constant":  # which has none
        raise ValueError(
            f"{name}.warmup={settings.warmup}: takes {steps} optimiser steps and the training has {total}: it "
            f"would end {'with a learning rate of 0' if total == 1 else 'below its learning rate'}; set "
            f"{name}.warmup=0, or train for more steps (epochs, a smaller batch_size)"
        )
    return steps
