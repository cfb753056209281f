"""What UnlearnTrainer takes of arguments and of a model's settings: all that has an effect, nothing that has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..model.causal_lm import CausalLM

ROUNDS = "it rounds the weights for good; evaluate under bf16=True, which computes in half precision, or a copy"
REFUSED = {
    "label_smoothing_factor": "an objective's targets are not smoothed",
    "average_tokens_across_devices": "what is counted is counted over all processes",
    "use_cache": "the forward of a training keeps no cache",
    "torch_compile": "hidden states are taken before the head; compile the decoder, model.get_decoder().compile()",
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


TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these modules will do


def check_trackers(names: Sequence[str], argument: str = "report_to") -> None:
    """Raises ImportError that names a tracker whose package is not installed, and the line that installs it."""
    for name in names:
        modules = TRACKERS.get(name, ())  # of others transformers tells itself
        if modules and not any(find_spec(module) for module in modules):
            raise ImportError(f"{argument}={name}: {name} is not installed: pip install {name}")


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
