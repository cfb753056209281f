"""What a run is told, checked as a whole before anything is loaded (`overrides` reads it from YAML and `--set`).

Anything left out takes the embedded demo's value while `model.name_or_path` is `embedded`, and a cautious value for a
pretrained model otherwise (no memorise stage, learning rate 1e-5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from .._hints import check_known
from ..metrics import DEFAULT_METRICS, Endpoint, Variant, get_metric, get_suite
from ..metrics.endpoint import KEY
from ..model.load import EMBEDDED
from ..training.settings import GEffectConfig, MemoriseConfig, Section, UnlearnConfig, merge, with_recipe


class ConfigError(ValueError):
    """A configuration that cannot run. The message has one line per problem: the key, what came, what is needed."""


def as_threads(value: Any) -> Any:
    """Raises ValueError for a number of threads that the system would not start."""
    most = max(1024, os.cpu_count() or 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"needs an integer from 1 to {most}, got {value!r}; this machine has {os.cpu_count()} cores")
    return value


Threads = Annotated[int, BeforeValidator(as_threads)]


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

    def named_paths(self) -> dict[str, str | None]:
        """What may be a file or a folder, by key."""
        inside = None if self.gguf_file is None else str(Path(self.name_or_path) / self.gguf_file)
        return {
            "model.name_or_path": None if self.name_or_path == EMBEDDED else self.name_or_path,
            "model.gguf_file": self.gguf_file if self.name_or_path == EMBEDDED else inside,
            "model.tokenizer": self.tokenizer,
        }

    @model_validator(mode="after")
    def options_fit(self) -> ModelConfig:
        if self.options and not self.embedded:
            raise ValueError(
                f"options={sorted(self.options)} are sizes of the embedded model; a pretrained one has its own"
            )
        if self.options:
            check_options(self.options)
        return self


# What the embedded model takes beside the sizes of `data.tiny`.
OPTIONS = ("vocab_size", "head_dim", "hidden_act", "initializer_range", "rms_norm_eps", "rope_parameters",
           "attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings")  # fmt: skip


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of the embedded model that are unknown or do not fit together."""
    from ..data.tiny import SIZES

    for key, value in options.items():
        check_known("options", key, [*SIZES, *OPTIONS])
        is_size = key in SIZES or key in ("vocab_size", "head_dim")
        if is_size and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"options.{key}={value!r}: needs an integer of 1 at least")
    sizes = {**SIZES, **options}
    hidden, heads, shared = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % heads or heads % shared:
        raise ValueError(
            f"options: hidden_size={hidden} needs to be a multiple of num_attention_heads={heads}, and that one of "
            f"num_key_value_heads={shared}"
        )
    if sizes.get("head_dim", hidden // heads) % 2:
        raise ValueError(
            f"options: a head has hidden_size / num_attention_heads={hidden // heads}, needs an even number"
        )


# What keys that came later were as good as, in the configurations that runs have written before (`as_meant`).
EARLIER: dict[str, Any] = {"data": {"holdout": 0, "num_unknown": 0}}


def as_meant(written: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run folder's config.yaml, without its versions: what the run did, whatever is the default now."""
    return merge(EARLIER, {key: value for key, value in written.items() if key != "versions"})


def existing(named: Mapping[str, str | None]) -> Iterator[tuple[str, Path]]:
    """(key, path) of those that are files or folders here, and not names on the Hub."""
    return ((key, Path(name)) for key, name in named.items() if name is not None and Path(name).exists())


class SourceConfig(Section):
    """One data set: a JSON lines file, or a Hub id with its configuration name."""

    path: str
    name: str | None = None
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)


def as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(as_source)]


def as_holdout(value: Any) -> Any:
    """Raises ValueError for what is neither a share nor a number of rows."""
    rows, share = isinstance(value, int) and value >= 0, isinstance(value, float) and 0 <= value < 1
    if not rows and not share:
        raise ValueError(f"needs a share below 1, or a whole number of rows, got {value!r}")
    return value


class DataConfig(Section):
    source: Literal["embedded", "files"] = Field(
        default=EMBEDDED, description="`files` also reads Hub ids (with a name)"
    )
    forget: Source | None = None
    retain: Source | None = None
    holdout: Annotated[int | float, BeforeValidator(as_holdout)] = Field(
        default=0.1,
        description="retain rows, a share below 1 or a number, that are memorised and evaluated but kept out of the "
        "unlearning; drawn with the seed",
    )
    refusals: str | None = Field(default=None, description="a text file, one refusal a line; needed by idk, dpo and ap")
    max_length: int | None = Field(default=None, ge=8, description="tokens; None is the model's context")
    num_authors: int = Field(default=40, ge=2, description="embedded source only, as the next three")
    questions_per_author: int = Field(default=10, ge=1)
    forget_fraction: float = Field(default=0.1, gt=0, lt=1)
    num_unknown: int = Field(default=240, ge=0, description="questions about unknown authors, to learn refusals from")

    @model_validator(mode="after")
    def sources_fit(self) -> DataConfig:
        named = [key for key in ("forget", "retain") if getattr(self, key) is not None]
        if self.source == EMBEDDED and named:
            raise ValueError(f"source=embedded generates its own authors, got {named}; set data.source=files")
        if self.source != EMBEDDED and len(named) < 2:
            missing = sorted({"forget", "retain"} - set(named))
            raise ValueError(f"source={self.source} needs data.forget and data.retain, missing: {missing}")
        return self


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


class EvaluateConfig(Section):
    metrics: list[str] = Field(default_factory=lambda: list(DEFAULT_METRICS), min_length=1)
    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="of a metric, by its name, e.g. {truth_ratio: {variant: arithmetic}}"
    )
    embedder: str | None = Field(
        default=None, description="a sentence embedding model, folder or Hub id, for cosine_similarity, nearest_answer"
    )
    entailer: str | None = Field(default=None, description="a model of language inference, for entailment_score")
    classifier: str | None = Field(default=None, description="a text classifier, for clean or toxicity")
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
            if name in SETS or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"{name!r}: needs a name of letters, digits, _, . and - other than {', '.join(SETS)}")
        return sets

    @field_validator("metrics")
    @classmethod
    def are_known(cls, metrics: list[str]) -> list[str]:
        for name in metrics:
            get_metric(name)
        return list(dict.fromkeys(metrics))

    @model_validator(mode="after")
    def options_fit(self) -> EvaluateConfig:
        for name, options in self.options.items():
            check_known("options", name, self.metrics)
            get_metric(name).check_options(options)
        return self

    @model_validator(mode="after")
    def tools_there(self) -> EvaluateConfig:
        for name in self.metrics:
            own = [tool for tool in get_metric(name).required_tools if getattr(self, tool, None) is None]
            if own:
                raise ValueError(f"metrics: {name} needs {' and '.join(f'evaluate.{tool}' for tool in own)}")
        return self


# What the embedded demo sets apart from the defaults; examples/demo.yaml writes all of it out.
DEMO: dict[str, Any] = {
    "name": "demo",
    "num_threads": 1,  # matrices this small only lose by more
    "memorise": {"epochs": 16, "learning_rate": 2e-3, "batch_size": 16, "scheduler": "cosine", "warmup": 0.1},
    "unlearn": {
        "forget": [{"name": "idk"}, {"name": "dpo"}],  # refuse, and lower the answer that refusing leaves known
        "retain": [{"name": "gd"}],
        "epochs": 10,
        "learning_rate": 5e-4,
        "batch_size": 4,
        "warmup": 0.1,
    },
}


def defaults_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """DEMO, or nothing where `values` name a pretrained model."""
    model = values.get("model") or {}
    pretrained = isinstance(model, Mapping) and (
        model.get("name_or_path", EMBEDDED) != EMBEDDED or model.get("gguf_file") is not None
    )
    return {} if pretrained else DEMO


class RunConfig(Section):
    name: str = Field(default="unlearn", pattern=r"^[\w.-]+$")
    output: str | None = Field(default=None, description="the run's folder; None is runs/<name>")
    seed: int = Field(default=0, ge=0, lt=2**31)
    num_threads: Threads | None = Field(default=None, description="CPU threads; None leaves torch's choice")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    memorise: MemoriseConfig | None = None
    unlearn: UnlearnConfig = Field(default_factory=UnlearnConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    geffect: GEffectConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def demo_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not (defaults := defaults_of(values)):
            return values
        unlearn = values.get("unlearn")
        return merge(defaults, {**values, "unlearn": with_recipe(unlearn)} if unlearn is not None else values)

    @field_validator("evaluate")
    @classmethod
    def has_probability(cls, evaluate: EvaluateConfig) -> EvaluateConfig:
        if "probability" not in evaluate.metrics:
            raise ValueError("metrics needs probability: the goal and the figures are made of it")
        return evaluate

    @model_validator(mode="after")
    def scores_are_possible(self) -> RunConfig:
        if self.unlearn.sampling.by == "mrd" and self.model.dtype != "float32":
            raise ValueError(
                f"unlearn.sampling=mrd scores by small changes of the weights: set model.dtype=float32, got "
                f"{self.model.dtype} (unlearn.bf16=true still computes the updates in bfloat16)"
            )
        return self

    @model_validator(mode="after")
    def retraining_is_told_how(self) -> RunConfig:
        if "retrained" in self.evaluate.anchors and self.memorise is None:
            raise ValueError(
                "evaluate.anchors=[retrained] trains the starting model by the memorise settings, without the forget "
                "set: set memorise (epochs, learning_rate, ...), got null"
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
    def max_length(self) -> int | None:
        return self.data.max_length

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(key, path) of all that the run reads and that is a file or a folder here."""
        sources = {"data.forget": self.data.forget, "data.retain": self.data.retain}
        sources |= {f"evaluate.sets.{name}": source for name, source in self.evaluate.sets.items()}
        named = {key: source.path for key, source in sources.items() if source is not None}
        yield from existing({"data.refusals": self.data.refusals, **named, **self.model.named_paths()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out: loading it gives this configuration again."""
        return self.model_dump(mode="json")


class FilesConfig(Section):
    """A model and one data set, in the place of a run's configuration; what else a job reads has its default."""

    model: ModelConfig
    data: SourceConfig
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    seed: int = 0
    num_threads: Threads | None = None
    max_length: int | None = None
    memorise: None = None
    folder: Path = Path()

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(key, path) of all that the job reads and that is a file or a folder here."""
        yield from existing({"--data": self.data.path, **self.model.named_paths()})

    @classmethod
    def of(
        cls,
        model: str,
        data: str,
        *,
        name: str | None = None,
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        limit: int | None = None,
        rouge_samples: int = 20,
        batch_size: int = 16,
        variant: Any = "suffix",
        metrics: Sequence[str] = (),
        embedder: str | None = None,
        judge: Mapping[str, Any] | None = None,
    ) -> FilesConfig:
        """model, data: paths or Hub ids; name: of a Hub data set's configuration; rouge_samples: 0 writes nothing;
        metrics: none are the default ones; judge: of `EndpointConfig`."""
        check_known("variant", variant, get_args(Variant))
        return cls(
            model=ModelConfig(name_or_path=model, gguf_file=gguf_file, tokenizer=tokenizer),
            data=SourceConfig(path=data, name=name, limit=limit),
            evaluate=EvaluateConfig(
                metrics=[*metrics] or [name for name in DEFAULT_METRICS if rouge_samples or name != "rouge_l"],
                embedder=embedder,
                judge=None if judge is None else EndpointConfig.model_validate(judge),
                rouge_samples=rouge_samples or None,
                batch_size=batch_size,
                variant=variant,
            ),
        )


class SuiteConfig(FilesConfig):
    """A model and a folder or Hub data set with TOFU's sets, for all numbers of a suite. data.name: the forget set."""

    suite: str
    split: str = Field(description="of the forget set, e.g. forget10")
    logs: dict[str, str] = Field(default_factory=dict, description="of reference models: retain, full")

    @field_validator("suite")
    @classmethod
    def exists(cls, suite: str) -> str:
        return get_suite(suite).name

    def paths(self) -> Iterator[tuple[str, Path]]:
        yield from super().paths()
        yield from existing({f"--{name}-log": path for name, path in self.logs.items()})

    @classmethod
    def of_tofu(
        cls,
        suite: str,
        model: str,
        data: str,
        *,
        split: str = "forget10",
        gguf_file: str | None = None,
        tokenizer: str | None = None,
        limit: int | None = None,
        batch_size: int = 16,
        logs: Mapping[str, str] | None = None,
    ) -> SuiteConfig:
        """model, data: paths or Hub ids; split: whose {split}_perturbed is the forget set; limit: rows of each set."""
        get_suite(suite)
        return cls(
            suite=suite,
            split=split,
            model=ModelConfig(name_or_path=model, gguf_file=gguf_file, tokenizer=tokenizer),
            data=SourceConfig(path=data, name=f"{split}_perturbed", limit=limit),
            evaluate=EvaluateConfig(batch_size=batch_size),
            logs=dict(logs or {}),
        )
