"""How a run is evaluated: the section `evaluate` of its configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from .._hints import check_known, hint
from ..data.rows import brief
from ..metrics import DEFAULT_METRICS, METRICS, Endpoint, Variant, get_metric
from ..metrics.endpoint import KEY
from ..training.settings import Section
from .sections import Source, SourceConfig


class GoalConfig(Section):
    """What the run must reach; it is checked and told at the end, and decides the exit status."""

    forget_probability_below: float = Field(default=0.1, gt=0, le=1)
    retain_probability_kept: float = Field(default=0.9, ge=0, le=1, description="share of the value before unlearning")
    forget_rouge_below: float = Field(
        default=0.5, gt=0, le=1, description="words of forget answers that the model still writes (ROUGE-L recall)"
    )
    fluent_share: float = Field(
        default=0.8, ge=0, le=1, description="of what the model writes when it is asked what it should have forgotten"
    )


KNOWN_BY = ("extraction_strength", "probability", "memorization_accuracy", "rouge_l")  # the more, the more is known


class PickConfig(Section):
    """Early stopping: of the models measured on the way and the last one, the run ends with the one that forgets most
    of those that keep what is to stay."""

    by: str = Field(default=KNOWN_BY[0], description="the metric, of forget rows and of those to retain")
    kept: float = Field(default=0.9, gt=0, le=1, description="share of the value before unlearning, of rows to retain")

    @field_validator("by")
    @classmethod
    def tells_what_is_known(cls, by: str) -> str:
        check_known("pick.by", by, KNOWN_BY)
        return by


def as_pick(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


LONGEST_NAME = 100  # bytes of a set's, which is part of files' names
SETS = ("forget", "retain", "holdout")
ANCHORS = ("retrained", "random")


def as_every(value: Any) -> Any:
    """Raises ValueError for what is neither a number of steps nor `epoch`."""
    if value not in (None, "epoch") and (not isinstance(value, int) or value < 1):
        raise ValueError(f"needs epoch, or a number of optimiser steps, got {value!r}")
    return value


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible server, see `pyunlearn.metrics.Endpoint`."""

    url: str = Field(description="up to the version, e.g. http://localhost:8000/v1")
    model: str = Field(description="its name there")
    settings: dict[str, Any] = Field(default_factory=dict, description="of every request, beside temperature: 0")
    key: str = Field(default=KEY, description="the environment variable that holds the server's key, if it needs one")
    timeout: float = Field(default=120.0, description="seconds for one attempt")
    retries: int = 4
    concurrency: int = Field(default=8, description="requests at once")
    budget: int | None = Field(default=None, description="requests in all, retries too; None is no limit")

    @model_validator(mode="after")
    def can_be_asked(self) -> EndpointConfig:
        Endpoint(**self.model_dump())
        return self


def as_classifiers(value: Any) -> Any:
    """`METRIC=NAME`, several of them with commas between, as a mapping; any other text is one model's name.

    Raises ValueError for what is no metric of a classifier's.
    """
    if not isinstance(value, str) or "=" not in value or Path(value).exists():
        return value
    own = dict(part.partition("=")[::2] for part in value.split(","))
    for name, model in own.items():
        if not model:
            raise ValueError(f"classifier={value!r}: needs NAME, or METRIC=NAME,METRIC=NAME; {name!r} has no name")
    return own


class EvaluateConfig(Section):
    metrics: list[str] = Field(default_factory=lambda: list(DEFAULT_METRICS), min_length=1)
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="of a metric, by its name, e.g. {truth_ratio: {variant: arithmetic}}"
    )
    embedder: str | None = Field(
        default=None, description="a sentence embedding model, folder or Hub id, for cosine_similarity, nearest_answer"
    )
    entailer: str | None = Field(default=None, description="a model of language inference, for entailment_score")
    classifier: Annotated[str | dict[str, str] | None, BeforeValidator(as_classifiers)] = Field(
        default=None, description="a text classifier, for clean or toxicity; or each metric's own, {toxicity: NAME}"
    )
    judge: EndpointConfig | None = Field(default=None, description="for naturalness, similarity, hallucination")
    endpoint: EndpointConfig | None = Field(default=None, description="writes the answers in the model's place")
    rouge_samples: int | None = Field(
        default=20, ge=1, description="generations per set, None is all; other metrics use all"
    )
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=16, ge=1)
    retain_limit: int | None = Field(
        default=None, ge=1, description="samples evaluated of the retain rows, and of those held out; None is all"
    )
    every: Annotated[Literal["epoch"] | int | None, BeforeValidator(as_every)] = Field(
        default=None, description="optimiser steps of the unlearning between evaluations on the way, or epoch"
    )
    pick: Annotated[PickConfig | None, BeforeValidator(as_pick)] = Field(
        default=None, description="the model that the run ends with, by what is measured on the way; None: the last"
    )
    anchors: list[Literal["retrained", "random"]] = Field(
        default_factory=list,
        description="models to hold the unlearned one against: one trained without the forget set, one not trained",
    )
    sets: dict[str, Source] = Field(default_factory=dict, description="further sets to evaluate, by name")
    variant: Variant = Field(
        default="suffix", description="of memorization_accuracy and extraction_strength, see pyunlearn.metrics"
    )
    cache: str | None = Field(
        default=None,
        description="where what models have read and written is kept for all runs; None is $PYUNLEARN_CACHE, or "
        "~/.cache/pyunlearn",
    )
    goal: GoalConfig | None = Field(default_factory=GoalConfig)

    @field_validator("anchors")
    @classmethod
    def anchors_in_order(cls, anchors: list[str]) -> list[str]:
        return [name for name in ANCHORS if name in anchors]

    @field_validator("sets")
    @classmethod
    def sets_have_names(cls, sets: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in sets:
            if name in SETS or not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"{brief(name)}: needs a name of letters, digits, _, . and -, of {LONGEST_NAME} bytes at most, "
                    f"other than {', '.join(SETS)}"
                )
        return sets

    @field_validator("metrics")
    @classmethod
    def are_known(cls, metrics: list[str]) -> list[str]:
        if problems := [f"metric={name!r}: {hint(name, METRICS)}" for name in metrics if name not in METRICS]:
            raise ValueError("; ".join(problems))
        return list(dict.fromkeys(metrics))

    @model_validator(mode="after")
    def options_fit(self) -> EvaluateConfig:
        for name, options in self.options.items():
            check_known("options", name, self.metrics)
            get_metric(name).check_options(options)
        return self

    @field_validator("classifier")
    @classmethod
    def classifiers_are_of_metrics(cls, classifier: Any) -> Any:
        for name in classifier if isinstance(classifier, dict) else ():
            check_known("classifier", name, [each.name for each in METRICS.values() if "classifier" in each.tools])
        return classifier

    @model_validator(mode="after")
    def tools_there(self) -> EvaluateConfig:
        for name in self.metrics:
            own = [tool for tool in get_metric(name).required_tools if not self.has_tool(tool, name)]
            if of_suites := [tool for tool in own if tool not in type(self).model_fields]:
                options = ", --".join(of_suites)
                raise ValueError(f"metrics: {name} goes with a suite only (pyunlearn evaluate --suite: --{options})")
            if own:
                keys = " and ".join(f"evaluate.{tool}" for tool in own)
                raise ValueError(f"metrics: {name} needs {keys} (pyunlearn evaluate: --{', --'.join(own)})")
        return self

    def has_tool(self, tool: str, metric: str) -> bool:
        """Whether a model is named for this tool of the metric."""
        given = getattr(self, tool, None)
        return metric in given if isinstance(given, dict) else given is not None
