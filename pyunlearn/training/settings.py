"""What a training is told: the sections of a run's configuration that its stages take, each checked as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .. import objectives
from .._hints import check_known
from ..mrd import Labels, check_arguments
from ..recipes import recipe

DEFAULT_TERMS = {"forget": "wga", "retain": "kl"}


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


class TermConfig(Section):
    """One objective and its weight in the loss."""

    name: str
    coefficient: float = Field(default=1.0, allow_inf_nan=False)
    preset: str | None = None
    reduction: str | None = None
    temperature: float | None = Field(default=None, description="divides the logits, as 2 does in UWC's scaling")
    keep: float | None = Field(
        default=None, description="share of a sequence's tokens that count, by their likelihood; 0.8 in UWC's selection"
    )
    kept: str | None = Field(default=None, description="those with the smallest loss, or the largest")
    options: dict[str, Any] = Field(default_factory=dict)

    def weighted(self) -> list[tuple[objectives.Objective, float]]:
        """The registered objective with these options, or the parts of a mixture, and their coefficients.

        Raises ValueError naming the nearest names.
        """
        chosen = {key: getattr(self, key) for key in ("preset", "reduction", "temperature", "keep", "kept")}
        given = {key: value for key, value in chosen.items() if value is not None}
        if twice := given.keys() & self.options.keys():
            raise ValueError(f"{self.name}: {min(twice)} is given beside options and in them; needs one of them")
        try:
            parts = objectives.weighted(self.name, **given, **self.options)
        except TypeError as error:
            raise ValueError(f"{self.name}: options={self.options}: {error}") from None
        return [(part, self.coefficient * share) for part, share in parts]

    def objective(self) -> objectives.Objective:
        """The objective; of a mixture its first part."""
        return self.weighted()[0][0]

    @model_validator(mode="after")
    def exists(self) -> TermConfig:
        self.weighted()
        return self


def as_terms(value: Any) -> Any:
    """`wga`, `{name: wga}` and `[wga, {name: npo}]` are all lists of terms, and null is one of none."""
    terms = value if isinstance(value, list) else [] if value is None else [value]
    return [{"name": term} if isinstance(term, str) else term for term in terms]


Terms = Annotated[list[TermConfig], BeforeValidator(as_terms)]


def as_sampling(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


def as_dual(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


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


class SamplingConfig(Section):
    """Which forget samples a step takes."""

    by: Literal["shuffle", "uniform", "mrd"] = Field(
        default="shuffle", description="all in turn; at random, with replacement; the same by MRD"
    )
    weighting: Literal["algorithm2", "inverse"] = Field(
        default="algorithm2", description="in proportion to MRD, or to 1 / MRD (as Section 3.4 of the paper writes)"
    )
    refresh_steps: int = Field(default=10, ge=1, description="optimiser steps between computations of MRD")
    estimator: str = "gradient"
    num_draws: int = Field(default=200, description="of the other estimators")
    sigma: float = Field(default=1e-5, allow_inf_nan=False)
    labels: Labels = Field(default="answers", description="what MRD scores; all: the question's tokens too")

    @model_validator(mode="after")
    def scores_fit(self) -> SamplingConfig:
        check_arguments(self.estimator, self.num_draws, self.sigma)
        fields = type(self).model_fields
        idle = [key for key in fields if key != "by" and getattr(self, key) != fields[key].default]
        if idle and self.by != "mrd":
            raise ValueError(f"{', '.join(idle)}: only MRD has that, and by={self.by!r}; set unlearn.sampling.by=mrd")
        return self


class EarlyStopConfig(Section):
    """A sample is forgotten, and drawn no more, when its extraction likelihood and memorization accuracy are low."""

    ngram: int = Field(default=10, ge=1)
    share: float = Field(default=1.0, gt=0, le=1, description="low is below this share of the means before unlearning")
    every_steps: int = Field(default=5, ge=1)


DUALS = {  # OpenUnlearning's; of 13B models on MUSE its eps is .8 (News) and .6 (Books)
    "open_unlearning_tofu": {"start": 100.0, "eps": 0.3, "step": 5.0, "warmup_epochs": 5.0},
    "open_unlearning_muse_news": {"start": 50.0, "eps": 1.5, "warmup_epochs": 3.0},
    "open_unlearning_muse_books": {"start": 50.0, "eps": 0.1, "warmup_epochs": 3.0},
}


class DualConfig(Section):
    """The retain objective's coefficient as a dual variable: lam <- max(0, lam + step (retain loss - eps))."""

    preset: str | None = Field(default=None, description="below what is given beside it")
    eps: float | None = Field(default=None, allow_inf_nan=False, description="the retain loss that is aimed at")
    above_reference: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="in place of eps: (1 + this) times that before unlearning"
    )
    start: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="None: the retain objective's coefficient"
    )
    step: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    every: Literal["step", "epoch"] = "step"
    warmup_epochs: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="it stays as it is meanwhile")

    @model_validator(mode="before")
    @classmethod
    def preset_below(cls, settings: Any) -> Any:
        if not isinstance(settings, Mapping) or settings.get("preset") is None:
            return settings
        check_known("dual.preset", settings["preset"], DUALS)
        below = DUALS[settings["preset"]]
        given = {key: value for key, value in settings.items() if value is not None}
        return {
            **{key: value for key, value in below.items() if key != "eps" or "above_reference" not in given},
            **given,
        }

    @model_validator(mode="after")
    def has_one_bound(self) -> DualConfig:
        if (self.eps is None) == (self.above_reference is None):
            raise ValueError(f"eps={self.eps}, above_reference={self.above_reference}: needs one of them")
        return self

    def arguments(self) -> dict[str, Any]:
        """Of `pyunlearn.training.dual.Dual`."""
        return self.model_dump(exclude={"preset"})


class UnlearnConfig(TrainingConfig):
    section: ClassVar[str] = "unlearn"

    learning_rate: float | None = Field(  # type: ignore[assignment]
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="by the size where there is none: 5e-5 below a billion parameters, 1e-5 from there on, ten times "
        "that of an adapter",
    )
    recipe: str | None = Field(
        default=None, description="a method by name, e.g. cga or npo+mrd; keys given beside it win"
    )
    keep_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps between models that are kept, for `pyunlearn geffect`"
    )
    pad_to: int | None = Field(
        default=None, ge=1, description="tokens of every row, for presets that count padding; None: the batch's longest"
    )
    forget: Terms = Field(default_factory=lambda: [TermConfig(name=DEFAULT_TERMS["forget"])])
    retain: Terms = Field(default_factory=lambda: [TermConfig(name=DEFAULT_TERMS["retain"])])
    sampling: Annotated[SamplingConfig, BeforeValidator(as_sampling)] = Field(default_factory=SamplingConfig)
    early_stop: EarlyStopConfig | None = None
    dual: Annotated[DualConfig | None, BeforeValidator(as_dual)] = None
    reinforce: ReinforceConfig | None = Field(
        default=None,
        description="a first training, of a copy on the forget set: for whp, or in the place of objectives",
    )

    @model_validator(mode="before")
    @classmethod
    def recipe_below(cls, settings: Any) -> Any:
        return with_recipe(settings)

    @model_validator(mode="before")
    @classmethod
    def whp_reinforces(cls, settings: Any) -> Any:
        """By the one word: its labels are made of a reinforced model."""
        if isinstance(settings, Mapping) and settings.get("reinforce") is None:
            named = [term.get("name") for term in as_terms(settings.get("forget")) if isinstance(term, Mapping)]
            return {**settings, "reinforce": {"into": "labels"}} if "whp" in named else settings
        return settings

    @field_validator("forget", "retain", mode="before")
    @classmethod
    def names_known(cls, terms: Any, info: Any) -> Any:
        """Unknown names here, where the role is known, so that the error names objectives of that role alone."""
        for term in as_terms(terms):
            name = term.get("name") if isinstance(term, Mapping) else None
            if isinstance(name, str) and name not in (*objectives.names(), *objectives.MIXTURES):
                mixtures = objectives.MIXTURES if info.field_name == "forget" else ()
                check_known("objective", name, (*objectives.names(info.field_name), *mixtures))
        return terms

    @field_validator("forget", "retain")
    @classmethod
    def roles_fit(cls, terms: list[TermConfig], info: Any) -> list[TermConfig]:
        for term in terms:
            if (role := term.objective().role) != info.field_name:
                raise ValueError(f"{term.name} is a {role} objective; put it under unlearn.{role}")
        return terms

    @model_validator(mode="after")
    def stops_what_it_draws(self) -> UnlearnConfig:
        if self.early_stop is not None and self.sampling.by == "shuffle":
            raise ValueError("early_stop leaves samples out of the draw: set unlearn.sampling to uniform or mrd")
        return self

    @model_validator(mode="after")
    def moves_one(self) -> UnlearnConfig:
        if self.dual is None:
            return self
        if len(self.retain) != 1:
            raise ValueError(
                f"dual moves the coefficient of one retain objective, got {[term.name for term in self.retain]}; needs "
                "rows to retain (data.retain) and one term, or dual=null"
            )
        (term,) = self.retain
        if self.dual.start is not None and term.coefficient != 1:
            raise ValueError(
                f"dual.start={self.dual.start:g} takes the place of retain.0.coefficient={term.coefficient:g}: leave "
                "the coefficient out, or set dual.start"
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether objectives change the model, and not arithmetic on a reinforced one."""
        return self.reinforce is None or self.reinforce.into == "labels"

    @model_validator(mode="after")
    def objectives_or_arithmetic(self) -> UnlearnConfig:
        forget, retain = ([term.name for term in terms] for terms in (self.forget, self.retain))
        if self.reinforce is None or self.trains:
            if not forget:
                raise ValueError("forget=[]: needs an objective, or reinforce.into=weights or logits")
            if (self.reinforce is not None) != ("whp" in forget):
                raise ValueError(
                    f"forget={forget}: reinforce.into=labels makes the labels of whp; needs both or neither"
                )
        elif forget or retain:
            raise ValueError(
                f"reinforce.into={self.reinforce.into} takes the place of objectives: set forget=[] and retain=[], got "
                f"{forget} and {retain}"
            )
        elif self.sampling.by != "shuffle" or self.keep_steps is not None:
            raise ValueError(f"reinforce.into={self.reinforce.into} takes no steps that sampling or keep_steps are of")
        return self

    def check_probed(self) -> None:
        """Raises ValueError for objectives that the G-effect has no samples of, or none at all."""
        if not self.trains:
            raise ValueError("geffect: is measured of objectives, and unlearn.reinforce takes their place")
        made = [term.name for term in self.forget if any(part.is_of_made_text for part, _ in term.weighted())]
        if made:
            raise ValueError(
                f"geffect: is measured on the rows of the data, and {', '.join(made)} is of text made here; "
                "set geffect=null"
            )

    def weighted_objectives(self) -> list[tuple[objectives.Objective, float]]:
        """What the loss is made of: every objective and its coefficient."""
        return [part for term in (*self.forget, *self.retain) for part in term.weighted()]


def with_recipe(unlearn: Any) -> Any:
    """Settings laid on those of the recipe they name, if they name one."""
    named = unlearn.get("recipe") if isinstance(unlearn, Mapping) else None
    return merge(recipe(named), unlearn) if isinstance(named, str) else unlearn


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
