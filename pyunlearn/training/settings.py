"""What a training is told: the sections of a run's configuration that its stages take, each checked as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .._hints import check_known


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def true_is_no_number(cls, value: Any, info: Any) -> Any:
        """To Python it is one, and YAML reads yes and on as true."""
        kinds = kinds_in(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError(f"needs a number, got {value}")
        return value


def kinds_in(annotation: Any) -> set[Any]:
    """The members of a union; of anything else, itself."""
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def as_warmup(value: Any) -> Any:
    """Raises ValueError for what is neither a number from 0 on nor `epoch`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise ValueError(f"needs a finite number, got {value}")
    if value != "epoch" and not (number and value >= 0):
        raise ValueError(f"needs epoch, a share of the steps below 1, or a number of steps from 1 on, got {value!r}")
    return value


def as_patterns(value: Any) -> Any:
    """Raises ValueError for a regular expression that is none."""
    patterns = as_list(value)
    for pattern in patterns if isinstance(patterns, list) else []:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return patterns


Patterns = Annotated[list[str] | None, BeforeValidator(as_patterns)]

OPTIMIZER = "adamw_torch_fused"


class TrainingConfig(Section):
    section: ClassVar[str] = "training"  # as errors call it

    epochs: float = Field(default=5, gt=0, allow_inf_nan=False)
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1, description="forget samples of one micro-batch, on one device")
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup: Annotated[float | Literal["epoch"], BeforeValidator(as_warmup)] = Field(
        default=0.0,
        description="a share of the steps below 1, a number of steps from 1 on, or epoch: the whole steps of one",
    )
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    optim: str = Field(default=OPTIMIZER, description="by transformers' name, e.g. paged_adamw_32bit, adafactor, sgd")
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="0 does not clip")
    gradient_checkpointing: bool = False
    bf16: bool = Field(default=False, description="autocast to bfloat16 around float32 weights")
    packing: bool = Field(
        default=True,
        description="a step's rows go through the model together, without padding, what they begin with once; where a "
        "trial shows that the model says the same of them so",
    )
    compile: bool = Field(
        default=False,
        description="the model's blocks as torch.compile makes them, where a trial shows that they say the same; takes "
        "a compiler (g++, clang, or Triton on a GPU) and a while before the first step",
    )
    train_only: Patterns = Field(
        default=None, description="regular expressions of parameters' whole names: those alone are trained"
    )
    freeze: Patterns = Field(default=None, description="the same, of those that are not trained")
    save_steps: int = Field(default=50, ge=1, description="optimiser steps between resumable checkpoints")
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(as_list)] = Field(
        default_factory=list, description="trackers that get every line of metrics.jsonl too; none by default"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="others of transformers' TrainingArguments, e.g. {adam_beta2: 0.95}"
    )

    @field_validator("optim")
    @classmethod
    def optimizer_known(cls, name: str) -> str:
        if name != OPTIMIZER:  # which needs no import
            from .arguments import check_optimizer

            check_optimizer(name)
        return name

    @field_validator("arguments")
    @classmethod
    def arguments_free(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments:
            from .arguments import check_others

            check_others(arguments, cls.section, cls.model_fields)
        return arguments

    @model_validator(mode="after")
    def trained_is_told_once(self) -> TrainingConfig:
        if self.train_only is not None and self.freeze is not None:
            raise ValueError(f"train_only={self.train_only} and freeze={self.freeze}: needs one of them")
        return self


class MemoriseConfig(TrainingConfig):
    """Fine-tunes on forget rows, retain_limit retain rows and those held out first: so there is something to forget."""

    section: ClassVar[str] = "memorise"

    retain_limit: int | None = Field(default=None, ge=0, description="beside those held out; None is all of them")


class ReinforceConfig(TrainingConfig):
    """Trains a copy of the model further on the forget set first, and makes something of what that changes."""

    section: ClassVar[str] = "unlearn.reinforce"

    into: Literal["labels", "weights", "logits"] = Field(
        default="labels",
        description="labels for the objective whp; weights, theta - a (theta_r - theta); logits, v_base - a "
        "ReLU(v_r - v_base), whenever the model is asked",
    )
    strength: float = Field(default=5.0, ge=0, allow_inf_nan=False, description="a; 0 leaves the model as it is")
    anchors: str | None = Field(
        default=None,
        description="a JSON file, {term: generic counterpart}: put in the place of these terms in the text that labels "
        "are made of",
    )
    epochs: float = Field(default=10, gt=0, allow_inf_nan=False)
    learning_rate: float | None = Field(  # type: ignore[assignment]
        default=None, ge=0, allow_inf_nan=False, description="by the size where there is none, as the unlearning's"
    )

    @model_validator(mode="after")
    def anchors_are_for_labels(self) -> ReinforceConfig:
        if self.anchors is not None and self.into != "labels":
            raise ValueError(f"anchors={self.anchors}: are for labels, and into={self.into}; set into=labels")
        return self


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; null or a list replaces the whole value."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def as_groups(value: Any) -> Any:
    if isinstance(value, str):
        check_known("groups", value, ["paper"])
    return value


class GEffectConfig(Section):
    """The G-effect of the unlearning objectives on fixed samples of both sets, while the run trains."""

    every: int = Field(
        default=10, ge=1, description="optimiser steps between probes; the first and last are probed too"
    )
    forget_samples: int = Field(default=32, ge=1, description="drawn once from the seed; all if there are fewer")
    retain_samples: int = Field(default=32, ge=1)
    batch_size: int = Field(default=8, ge=1)
    groups: Annotated[Literal["paper"] | dict[str, list[str]], BeforeValidator(as_groups)] = Field(
        default="paper", description="or group -> patterns of parameter names"
    )
    pointwise: bool = Field(default=False, description="also each forget sample's own effect")
