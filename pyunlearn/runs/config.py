"""What a run is told, checked as a whole before anything is loaded (`overrides` reads it from YAML and `--set`).

Anything left out takes the embedded demo's value while `model.name_or_path` is `embedded`, and a cautious value for a
pretrained model otherwise (no memorise stage, learning rate 1e-5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from .._hints import check_known
from ..metrics import Variant
from ..model.load import EMBEDDED
from ..training.settings import GEffectConfig, MemoriseConfig, Section, UnlearnConfig, merge, with_recipe

Metric = Literal["probability", "memorization_accuracy", "extraction_strength", "rouge_l"]
ALL_METRICS = get_args(Metric)


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


class DataConfig(Section):
    source: Literal["embedded", "files"] = Field(
        default=EMBEDDED, description="`files` also reads Hub ids (with a name)"
    )
    forget: Source | None = None
    retain: Source | None = None
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
    variant: Variant = Field(
        default="suffix", description="of memorization_accuracy and extraction_strength, see pyunlearn.metrics"
    )
    goal: GoalConfig | None = Field(default_factory=GoalConfig)

    @field_validator("metrics")
    @classmethod
    def has_probability(cls, metrics: list[str]) -> list[str]:
        if "probability" not in metrics:
            raise ValueError("needs probability: the goal and the figures are made of it")
        return list(dict.fromkeys(metrics))


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
    def max_length(self) -> int | None:
        return self.data.max_length

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(key, path) of all that the run reads and that is a file or a folder here."""
        sources = {"data.forget": self.data.forget, "data.retain": self.data.retain}
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
    ) -> FilesConfig:
        """model, data: paths or Hub ids; name: of a Hub data set's configuration; rouge_samples: 0 writes nothing."""
        check_known("variant", variant, get_args(Variant))
        return cls(
            model=ModelConfig(name_or_path=model, gguf_file=gguf_file, tokenizer=tokenizer),
            data=SourceConfig(path=data, name=name, limit=limit),
            evaluate=EvaluateConfig(
                metrics=[metric for metric in ALL_METRICS if rouge_samples or metric != "rouge_l"],
                rouge_samples=rouge_samples or None,
                batch_size=batch_size,
                variant=variant,
            ),
        )
