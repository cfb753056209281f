"""What an unlearning is told: its objectives, the samples a step takes, when it stops, checked as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .. import objectives
from .._hints import check_known
from ..mrd import Labels, check_arguments
from ..objectives.representation import check_scale
from ..recipes import recipe
from .settings import ReinforceConfig, Section, TrainingConfig, merge

DEFAULT_TERMS = {"forget": "wga", "retain": "kl"}


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
        if self.kept is not None and self.keep is None:
            raise ValueError(f"{self.name}: kept={self.kept}: says which tokens keep leaves; set keep, e.g. to 0.8")
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
    "open_unlearning_tofu": {"start": 100.0, "eps": 0.3, "step": 5.0, "warmup_epochs": 5.0, "every": "micro_batch"},
    "open_unlearning_muse_news": {"start": 50.0, "eps": 1.5, "warmup_epochs": 3.0, "every": "micro_batch"},
    "open_unlearning_muse_books": {"start": 50.0, "eps": 0.1, "warmup_epochs": 3.0, "every": "micro_batch"},
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
    every: Literal["micro_batch", "step", "epoch"] = Field(
        default="step", description="when it moves; micro_batch: n times in a step of n, as OpenUnlearning's"
    )
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


KEEPS_REFUSALS = {"closer_look_code": True, "open_unlearning": False}  # one a question, or another every epoch


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
    fixed_refusals: bool | None = Field(
        default=None,
        description="each question keeps one refusal, or gets one anew every epoch; None: closer_look_code keeps and "
        "open_unlearning draws, of other presets those keep that need a reference of refusals, which is then cached",
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
    def states_on_one_scale(self) -> UnlearnConfig:
        check_scale(objective for objective, _ in self.weighted_objectives())
        return self

    @model_validator(mode="after")
    def fixes_what_it_draws(self) -> UnlearnConfig:
        if self.fixed_refusals is not None and not self.refusing:
            raise ValueError(
                f"fixed_refusals={str(self.fixed_refusals).lower()}: needs an objective that answers with refusals, "
                f"got {[term.name for term in (*self.forget, *self.retain)]}"
            )
        return self

    @property
    def refusing(self) -> list[objectives.Objective]:
        return [part for part, _ in self.weighted_objectives() if "refusal" in part.batches]

    @property
    def keeps_refusals(self) -> bool:
        """Whether every question has one refusal in all epochs."""
        if self.fixed_refusals is not None:
            return self.fixed_refusals
        presets = {part.preset for part in self.refusing}
        if known := presets & KEEPS_REFUSALS.keys():
            return any(KEEPS_REFUSALS[preset] for preset in known)
        return any(part.reference is not None for part in self.refusing)

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
