"""What UnlearnTrainer takes of arguments and of a model's settings: all that has an effect, nothing that has none."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from .._hints import check_known, near
from ..model.causal_lm import CausalLM

ROUNDS = "it rounds the weights for good; evaluate under bf16=True, which computes in half precision, or a copy"
REFUSED = {
    "label_smoothing_factor": "an objective's targets are not smoothed",
    "average_tokens_across_devices": "what is counted is counted over all processes",
    "use_cache": "the forward of a training keeps no cache",
    "torch_compile": "hidden states are taken before the head; set unlearn.compile, or UnlearnTrainer(compile=True)",
    "use_liger_kernel": "it puts another forward into the model for good; pyunlearn has a fused loss of its own",
    "bf16_full_eval": ROUNDS,
    "fp16_full_eval": ROUNDS,
    "label_names": "the objectives name the batches",
}
OPTIONS_REFUSED = {
    "compute_loss_func": "the objectives are the loss; register one of your own (pyunlearn.objectives)",
    "compute_metrics": "an evaluation gives losses and no predictions; use pyunlearn.metrics",
    "preprocess_logits_for_metrics": "an evaluation gives losses and no predictions; use pyunlearn.metrics",
}
# What a section of a run's configuration has, where it is called otherwise there.
RENAMED = {
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "scheduler",
    "activation_checkpointing": "gradient_checkpointing",
}
RELIED_ON = {  # patterns of arguments -> why a run sets them itself
    r"seed|data_seed": "it is the run's seed, for all of it",
    r"output_dir|push_to_hub|hub_.*": "a run writes into its own folder alone",
    r"log_.*|logging_.*|disable_tqdm|run_name|project|trackio_.*": "every step is logged, by the run itself",
    r"save_.*|load_best_.*|metric_for_.*|greater_is_better|resume_.*|restore_.*|ignore_data_skip|enable_jit_.*": (
        "a run goes on from its own checkpoints"
    ),
    r"(batch_)?eval_.*|per_device_eval_.*|do_.*|prediction_loss_only|include_for_metrics": (
        "what is evaluated is told by the evaluate section"
    ),
    r"remove_unused_columns|length_column_name|train_sampling_.*|dataloader_drop_last|auto_find_batch_size": (
        "a step's rows are those of the objectives"
    ),
    r"use_cpu|local_rank": "the device is that of the process",
}
# Patterns of optimizers -> the module that has them, the package to install for it.
LIBRARIES = {
    r"galore_.*": ("galore_torch", "galore-torch"),
    r"apollo_.*": ("apollo_torch", "apollo-torch"),
    r"lomo|adalomo": ("lomo_optim", "lomo-optim"),
    r"grokadamw": ("grokadamw", "grokadamw"),
    r"schedule_free_.*": ("schedulefree", "schedulefree"),
    r"stable_adamw": ("optimi", "torch-optimi"),
    r"adamw_torch_[48]bit": ("torchao", "torchao"),
    r"adamw_anyprecision": ("torchdistx", "torchdistx"),
    r"adamw_torch_xla": ("torch_xla", "torch_xla"),
    r"adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    r".*(8bit|paged|bnb|lion|ademamix).*": ("bitsandbytes", "bitsandbytes"),
}
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these modules will do


def check_trackers(names: Sequence[str], argument: str = "report_to") -> None:
    """Raises ImportError that names a tracker whose package is not installed, and the line that installs it."""
    for name in names:
        modules = TRACKERS.get(name, ())  # of others transformers tells itself
        if modules and not any(find_spec(module) for module in modules):
            raise ImportError(f"{argument}={name}: {name} is not installed: pip install {name}")


def check_optimizer(name: str) -> None:
    """Raises ValueError that names the nearest for one that transformers does not know."""
    check_known("optim", name, [each.value for each in OptimizerNames])


def check_library(name: str, argument: str = "optim") -> None:
    """Raises ImportError that names an optimizer's package where it is not installed, and the line that installs it."""
    for pattern, (module, package) in LIBRARIES.items():
        if re.fullmatch(pattern, name):
            if find_spec(module) is None:
                raise ImportError(f"{argument}={name}: needs {package}, which is not installed: pip install {package}")
            return


def check_others(arguments: Mapping[str, Any], section: str, fields: Collection[str]) -> None:
    """Raises ValueError for an argument that is one of `fields` of this section, that a run sets itself, that has
    no effect, or that transformers does not know."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in arguments:
        own = RENAMED.get(name, name)
        if own in fields:
            raise ValueError(f"{name} is {section}.{own}")
        if name in REFUSED:
            raise ValueError(f"{name}: is not taken: {REFUSED[name]}")
        for pattern, reason in RELIED_ON.items():
            if re.fullmatch(pattern, name):
                raise ValueError(f"{name}: is not taken: {reason}")
        if name not in known:
            meant = near(name, known)
            raise ValueError(
                f"{name!r}: is none of transformers' TrainingArguments"
                + (f"; did you mean {' or '.join(meant)}?" if meant else "")
            )


def check_values(settings: Any, argument: str) -> None:
    """Raises ValueError for values of a training's further arguments that transformers, its optimizer or its scheduler
    do not take."""
    if not settings.arguments:
        return
    told = f"{argument}={settings.arguments}"
    known = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for name, value in settings.arguments.items():
        if isinstance(known[name], float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{told}: {name} needs a number, got {value!r}")
    weight = nn.Linear(1, 1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            args = TrainingArguments(
                folder, optim=settings.optim, lr_scheduler_type=settings.scheduler, report_to=[], max_steps=2,
                use_cpu=not torch.accelerator.is_available(), **settings.arguments,
            )  # fmt: skip
            Trainer(weight, args).create_optimizer_and_scheduler(2)
        except Exception as error:  # of transformers, of an optimizer, of a library that one of them loads
            raise ValueError(f"{told}: {type(error).__name__}: {' '.join(str(error).split())}") from None


def check_arguments(args: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Raises ValueError that names an argument, or an option of Trainer, that would have no effect or a false one, and
    ImportError as `check_trackers`."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, reason in REFUSED.items():
        if name in defaults and getattr(args, name) != defaults[name]:
            raise ValueError(f"args.{name}={getattr(args, name)!r}: needs {defaults[name]!r}: {reason}")
    check_trackers([args.report_to] if isinstance(args.report_to, str) else args.report_to or [], "args.report_to")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("args.fp16=True: needs a GPU, a CPU would compute in float32; use bf16=True")
    if "underflow_overflow" in args.debug:
        raise ValueError(
            "args.debug='underflow_overflow': needs '': its hooks take no empty logits and stay on the model; a loss "
            "that is not finite stops the training in any case"
        )
    for name, reason in OPTIONS_REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}: needs None: {reason}")


def check_router(model: nn.Module) -> None:
    """Raises ValueError for a mixture of experts that asks for its router's auxiliary loss, which is no objective."""
    lm = CausalLM.of(model)
    if getattr(lm.config, "output_router_logits", False):
        coefficient = getattr(lm.config, "router_aux_loss_coef", None)
        raise ValueError(
            f"{lm.name}: config.output_router_logits=True asks for an auxiliary loss of its router (coefficient "
            f"{coefficient}), which no objective holds; set it to False in the model's configuration"
        )
