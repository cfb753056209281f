"""Run configuration: YAML plus `--set key.sub=value`, checked as a whole before anything is loaded.

Anything left out takes the embedded demo's value while `model.name_or_path` is `embedded`, and a cautious value for a
pretrained model otherwise (no memorise stage, learning rate 1e-5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .. import objectives
from .._hints import hint
from ..mrd import check_arguments
from ..recipes import recipe

EMBEDDED: Final = "embedded"
Metric = Literal["probability", "memorization_accuracy", "extraction_strength", "rouge_l"]
ALL_METRICS = get_args(Metric)
DEFAULT_TERMS = {"forget": "wga", "retain": "kl"}


class ConfigError(ValueError):
    """A configuration that cannot run. The message has one line per problem: the key, what came, what is needed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """Which model starts the run."""

    name_or_path: str = Field(
        default=EMBEDDED, description="Hub id, folder, or `embedded` for the tiny Llama built here"
    )
    gguf_file: str | None = Field(default=None, description="a .gguf file: a path, or a name inside name_or_path")
    tokenizer: str | None = Field(
        default=None, description="Hub id or folder of the tokenizer, where it is not the model's"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    options: dict[str, Any] = Field(default_factory=dict, description="sizes of the embedded model, e.g. hidden_size")

    @property
    def embedded(self) -> bool:
        return self.name_or_path == EMBEDDED and self.gguf_file is None

    @model_validator(mode="after")
    def options_fit(self) -> ModelConfig:
        if self.options and not self.embedded:
            raise ValueError(
                f"options={sorted(self.options)} are sizes of the embedded model; a pretrained one has its own"
            )
        return self


class SourceConfig(Section):
    """One data set: a JSON lines file, or a Hub id with its configuration name."""

    path: str
    name: str | None = None
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)


def as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(as_source)]


class DataConfig(Section):
    source: Literal["embedded", "files"] = Field(
        default=EMBEDDED, description="`files` also reads Hub ids (with a name)"
    )
    forget: Source | None = None
    retain: Source | None = None
    refusals: str | None = Field(default=None, description="a text file, one refusal a line; needed by idk, dpo and ap")
    max_length: int | None = Field(default=None, ge=8, description="tokens; None is the model's context")
    num_authors: int = Field(default=40, ge=2, description="embedded source only, as the next two")
    questions_per_author: int = Field(default=10, ge=1)
    forget_fraction: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def sources_fit(self) -> DataConfig:
        given = [key for key in ("forget", "retain") if getattr(self, key) is not None]
        if self.source == EMBEDDED and given:
            raise ValueError(f"source=embedded generates its own authors, got {given}; set data.source=files")
        if self.source != EMBEDDED and len(given) < 2:
            missing = sorted({"forget", "retain"} - set(given))
            raise ValueError(f"source={self.source} needs data.forget and data.retain, missing: {missing}")
        return self


class TermConfig(Section):
    """One objective and its weight in the loss."""

    name: str
    coefficient: float = Field(default=1.0, allow_inf_nan=False)
    preset: str | None = None
    reduction: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def objective(self) -> objectives.Objective:
        """The registered objective with these options. Raises ValueError naming the nearest names."""
        given = {"preset": self.preset, "reduction": self.reduction}
        return objectives.get(self.name, **{key: v for key, v in given.items() if v is not None}, **self.options)

    @model_validator(mode="after")
    def exists(self) -> TermConfig:
        self.objective()
        return self


def as_terms(value: Any) -> Any:
    """`wga`, `{name: wga}` and `[wga, {name: npo}]` are all lists of terms."""
    terms = value if isinstance(value, list) else [value]
    return [{"name": term} if isinstance(term, str) else term for term in terms]


Terms = Annotated[list[TermConfig], BeforeValidator(as_terms)]


def as_sampling(value: Any) -> Any:
    return {"by": value} if isinstance(value, str) else value


class TrainingConfig(Section):
    epochs: float = Field(default=5, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps; overrides epochs")
    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1, description="forget samples of one micro-batch, on one device")
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.0, ge=0, description="a share of the steps below 1, a number of steps from 1 on")
    weight_decay: float = Field(default=0.0, ge=0)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    max_grad_norm: float = Field(default=1.0, ge=0, description="0 does not clip")
    gradient_checkpointing: bool = False
    bf16: bool = Field(default=False, description="autocast to bfloat16 around float32 weights")
    save_steps: int = Field(default=50, ge=1, description="optimiser steps between resumable checkpoints")


class MemoriseConfig(TrainingConfig):
    """Fine-tunes on the forget set and retain_limit retain rows first, so that there is something to forget."""

    retain_limit: int | None = Field(default=None, ge=0, description="None is all of them")


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

    @model_validator(mode="after")
    def scores_fit(self) -> SamplingConfig:
        check_arguments(self.estimator, self.num_draws, self.sigma)
        return self


class EarlyStopConfig(Section):
    """A sample is forgotten, and drawn no more, when its extraction likelihood and memorization accuracy are low."""

    ngram: int = Field(default=10, ge=1)
    share: float = Field(default=1.0, gt=0, le=1, description="low is below this share of the means before unlearning")
    every_steps: int = Field(default=5, ge=1)


class UnlearnConfig(TrainingConfig):
    recipe: str | None = Field(default=None, description="a method by name, e.g. cga or npo+mrd; keys given here win")
    keep_steps: int | None = Field(
        default=None, ge=1, description="optimiser steps between models that are kept, for `pyunlearn geffect`"
    )
    forget: Terms = Field(default_factory=lambda: [TermConfig(name=DEFAULT_TERMS["forget"])], min_length=1)
    retain: Terms = Field(default_factory=lambda: [TermConfig(name=DEFAULT_TERMS["retain"])])
    sampling: Annotated[SamplingConfig, BeforeValidator(as_sampling)] = Field(default_factory=SamplingConfig)
    early_stop: EarlyStopConfig | None = None

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


class GoalConfig(Section):
    """What the run must reach; it is checked and told at the end."""

    forget_probability_below: float = Field(default=0.1, gt=0, le=1)
    retain_probability_kept: float = Field(default=0.9, ge=0, le=1, description="share of the value before unlearning")


class EvaluateConfig(Section):
    metrics: list[Metric] = Field(default_factory=lambda: list(ALL_METRICS), min_length=1)
    rouge_samples: int | None = Field(
        default=20, ge=1, description="generations per set, None is all; other metrics use all"
    )
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=16, ge=1)
    retain_limit: int | None = Field(default=None, ge=1, description="retain samples evaluated; None is all")
    goal: GoalConfig | None = Field(default_factory=GoalConfig)

    @field_validator("metrics")
    @classmethod
    def has_probability(cls, metrics: list[str]) -> list[str]:
        if "probability" not in metrics:
            raise ValueError("needs probability: the goal and the figures are made of it")
        return list(dict.fromkeys(metrics))


class GEffectConfig(Section):
    """The G-effect of the unlearning objectives on fixed samples of both sets, while the run trains."""

    every: int = Field(
        default=10, ge=1, description="optimiser steps between probes; the first and last are probed too"
    )
    forget_samples: int = Field(default=32, ge=1, description="drawn once from the seed; all if there are fewer")
    retain_samples: int = Field(default=32, ge=1)
    batch_size: int = Field(default=8, ge=1)
    groups: Literal["paper"] | dict[str, list[str]] = Field(
        default="paper", description="or group -> patterns of parameter names"
    )
    pointwise: bool = Field(default=False, description="also each forget sample's own effect")


# What the embedded demo sets apart from the defaults; examples/demo.yaml writes all of it out.
DEMO: dict[str, Any] = {
    "name": "demo",
    "num_threads": 1,  # matrices this small only lose by more
    "memorise": {"epochs": 20, "learning_rate": 2e-3, "batch_size": 16, "scheduler": "cosine", "warmup": 0.1},
    "unlearn": {"epochs": 10, "learning_rate": 5e-4, "batch_size": 4, "warmup": 0.1},
}


class RunConfig(Section):
    name: str = Field(default="unlearn", pattern=r"^[\w.-]+$")
    output: str | None = Field(default=None, description="the run's folder; None is runs/<name>")
    seed: int = Field(default=0, ge=0, lt=2**31)
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads; None leaves torch's choice")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    memorise: MemoriseConfig | None = None
    unlearn: UnlearnConfig = Field(default_factory=UnlearnConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    g_effect: GEffectConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def demo_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        model = given.get("model") or {}
        pretrained = isinstance(model, Mapping) and (
            model.get("name_or_path", EMBEDDED) != EMBEDDED or model.get("gguf_file") is not None
        )
        unlearn = given.get("unlearn")
        named = unlearn.get("recipe") if isinstance(unlearn, Mapping) else None
        defaults = {} if pretrained else DEMO
        return merge(merge(defaults, {"unlearn": recipe(named)} if isinstance(named, str) else {}), given)

    @model_validator(mode="after")
    def scores_are_possible(self) -> RunConfig:
        if self.unlearn.sampling.by == "mrd" and self.model.dtype != "float32":
            raise ValueError(
                f"unlearn.sampling=mrd scores by small changes of the weights: set model.dtype=float32, got "
                f"{self.model.dtype} (unlearn.bf16=true still computes the updates in bfloat16)"
            )
        return self

    @model_validator(mode="after")
    def refusals_given(self) -> RunConfig:
        terms = [*self.unlearn.forget, *self.unlearn.retain]
        needy = [term.name for term in terms if "refusal" in term.objective().batches]
        if needy and self.data.source != EMBEDDED and self.data.refusals is None:
            raise ValueError(f"{needy} answer with refusals: set data.refusals to a text file, one refusal a line")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out: loading it gives this configuration again."""
        return self.model_dump(mode="json")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; null or a list replaces the whole value."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return result


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file (None: the embedded demo), applies `key.sub=value` overrides, checks everything.

    Raises FileNotFoundError when `path` is missing and ConfigError with one line per problem.
    """
    given: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"configuration {str(path)!r}: no such file; needs a YAML file (see examples/)")
        try:
            given = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"configuration {str(path)!r}: not valid YAML: {error}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"configuration {str(path)!r}: needs sections (key: value), got {type(given).__name__}")
        given.pop("versions", None)  # a run folder's config.yaml records them
    for override in sorted(overrides, key=lambda override: not override.startswith("unlearn.recipe=")):
        for role, name in DEFAULT_TERMS.items():  # so that one key of a term that was left out can be set
            if override.startswith(f"unlearn.{role}.") and isinstance(given.setdefault("unlearn", {}), dict):
                named = given["unlearn"].get("recipe")
                terms = recipe(named)[role] if isinstance(named, str) else [{"name": name}]
                given["unlearn"].setdefault(role, terms)
        set_value(given, override)
    try:
        return RunConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(problem) for problem in error.errors())) from None


def set_value(config: dict[str, Any], override: str) -> None:
    """Applies one `key.sub=value` in place; the value is YAML. A list of one term needs no index."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: needs key.sub=value, e.g. unlearn.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    if isinstance(value, str):
        value = as_number(value)
    at: Any = config
    for depth, part in enumerate(parts[:-1]):
        if isinstance(at, list):
            at = at[list_index(at, part, override)]
            if part.isdigit():
                continue
        if not isinstance(at, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parts[:depth])} is {at!r}, not a section")
        if at.get(part) is None:
            at[part] = {}
        elif isinstance(at[part], str) and part in ("forget", "retain", "sampling"):
            at[part] = {"by" if part == "sampling" else "path" if parts[0] == "data" else "name": at[part]}
        at = at[part]
    if isinstance(at, list) and not parts[-1].isdigit():
        at = at[list_index(at, parts[-1], override)]
    if isinstance(at, list):
        at[list_index(at, parts[-1], override)] = value
    elif isinstance(at, dict):
        at[parts[-1]] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parts[:-1])} is {at!r}, not a section")


def list_index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if not part.isdigit() and len(items) == 1:
        return 0
    raise ConfigError(f"--set {override!r}: a list of {len(items)} needs an index below {len(items)}, got {part!r}")


def as_number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def explain(problem: Any) -> str:
    """One pydantic problem as `key: what is wrong, what came; what is needed`."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = list(fields_at(location[:-1]))
        return f"{key}: unknown key; {hint(location[-1], known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "missing"):
        return f"{key}: {message}"
    return f"{key}: {message}, got {problem['input']!r}"


def fields_at(location: Sequence[str]) -> Iterable[str]:
    """The keys of the section at `location`."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if part.isdigit():
            continue
        section = next(iter(sections_in(section.model_fields[part].annotation)))
    return section.model_fields


def sections_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """The Section classes inside an annotation such as `list[TermConfig]` or `GoalConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)
