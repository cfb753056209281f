"""The sections of a run's configuration: which model, which data, how it is evaluated. Each is checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .._hints import check_known, hint
from ..data import Prompt, make_prompt
from ..data.columns import check_fields
from ..data.rows import brief
from ..metrics import DEFAULT_METRICS, METRICS, Endpoint, Variant, get_metric
from ..metrics.endpoint import KEY
from ..model.load import EMBEDDED
from ..model.lora import ALL_LINEAR, base_of, find_adapter
from ..training.settings import Section, as_list

# Of peft's LoraConfig: what is called otherwise here; what else is taken. Others train the base too, which with the
# adapter off is the reference, or cannot be merged into it.
RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets"}
PEFTS = ("use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "exclude_modules",
         "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out")  # fmt: skip


def as_targets(value: Any) -> Any:
    return value if value == ALL_LINEAR else as_list(value)


class LoraConfig(Section):
    """An adapter that the unlearning trains in the place of the model; further keys are those of peft's LoraConfig.

    It is put on the model that unlearning starts from, the memorised one where the run memorises (which trains the
    whole model), and that model, the adapter off, is the reference: there is no second model and no reference cache.
    """

    model_config = ConfigDict(extra="allow")

    r: int = Field(default=8, ge=1, description="rank of the two factors")
    alpha: float = Field(default=16, gt=0, allow_inf_nan=False, description="their product counts alpha / r times")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[Literal["all-linear"] | list[str], BeforeValidator(as_targets)] = Field(
        default=ALL_LINEAR, description="layers by name or the end of it; all-linear: all but the head"
    )
    save: Literal["merged", "adapter"] = Field(
        default="merged",
        description="the unlearned model: as a plain one, or as an adapter that names its base",
    )

    @model_validator(mode="after")
    def others_are_pefts(self) -> LoraConfig:
        for key, value in (self.model_extra or {}).items():
            check_lora_option(key, value)
        return self

    def adapter(self) -> dict[str, Any]:
        """Arguments of `pyunlearn.model.lora.add_adapter`."""
        return self.model_dump(exclude={"save"})


def check_lora_option(key: str, value: Any) -> None:
    """Raises ValueError for a key of peft's LoraConfig that is none, is called otherwise here, or is not taken."""
    if key in RENAMED:
        raise ValueError(f"{key} is model.lora.{RENAMED[key]}")
    if key not in PEFTS:
        raise ValueError(f"{key!r}: unknown key; {hint(key, [*LoraConfig.model_fields, *PEFTS])}")
    if key == "init_lora_weights" and value not in (True, "gaussian"):
        raise ValueError(f"{key}={value!r}: needs true or gaussian, which leave the model under the adapter as it is")


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
    lora: LoraConfig | None = Field(default=None, description="unlearn by an adapter; {} takes the defaults")
    quantize: Literal["nf4", "int8"] | None = Field(
        default=None, description="weights of 4 or 8 bits by bitsandbytes, under an adapter (QLoRA)"
    )

    @property
    def embedded(self) -> bool:
        return self.name_or_path == EMBEDDED and self.gguf_file is None

    def loading(self) -> dict[str, Any]:
        """Arguments of `pyunlearn.model.load.load_model`."""
        return self.model_dump(exclude={"lora"})

    def named_paths(self) -> dict[str, str | None]:
        """What may be a file or a folder, by key."""
        inside = None if self.gguf_file is None else str(Path(self.name_or_path) / self.gguf_file)
        return {
            "model.name_or_path": None if self.name_or_path == EMBEDDED else self.name_or_path,
            "model.gguf_file": self.gguf_file if self.name_or_path == EMBEDDED else inside,
            "model.tokenizer": self.tokenizer,
            "model.name_or_path's base": self.adapters_base,
        }

    @property
    def adapters_base(self) -> str | None:
        """What the adapter is on that name_or_path is, if it is one's folder."""
        if self.gguf_file is not None or not Path(self.name_or_path).is_dir():
            return None
        folder = find_adapter(self.name_or_path)
        return None if folder is None else base_of(folder)

    @model_validator(mode="after")
    def options_fit(self) -> ModelConfig:
        if self.options and not self.embedded:
            raise ValueError(
                f"options={sorted(self.options)} are sizes of the embedded model; a pretrained one has its own"
            )
        if self.options:
            check_options(self.options)
        if self.quantize is not None and (self.name_or_path == EMBEDDED or self.gguf_file is not None):
            raise ValueError(f"quantize={self.quantize}: needs a model of safetensors, a folder or a Hub id")
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


def as_columns(value: Any) -> Any:
    """`FIELD=COLUMN`, several of them with commas between, as a mapping.

    Raises ValueError for text without =, and as `check_fields`.
    """
    if isinstance(value, str):
        parts = [part.partition("=") for part in value.split(",")]
        if not all(equals and column.strip() for _, equals, column in parts):
            raise ValueError(f"needs FIELD=COLUMN,FIELD=COLUMN, as question=prompt,answer=reply, got {value!r}")
        value = {field.strip(): column.strip() for field, _, column in parts}
    if isinstance(value, Mapping):
        check_fields({str(field): column for field, column in value.items()})
    return value


class SourceConfig(Section):
    """One data set: a file, a folder of files, or a Hub id with its configuration name (`pyunlearn.data.load_qa`)."""

    path: str
    name: str | None = None
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    columns: Annotated[dict[str, str] | None, BeforeValidator(as_columns)] = Field(
        default=None,
        description="by what they are, e.g. {question: prompt_text, answer: reply}; None: usual names",
    )


def as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Source = Annotated[SourceConfig, BeforeValidator(as_source)]


def as_holdout(value: Any) -> Any:
    """Raises ValueError for what is neither a share nor a number of rows."""
    rows, share = isinstance(value, int) and value >= 0, isinstance(value, float) and 0 <= value < 1
    if not rows and not share:
        raise ValueError(f"needs a share below 1, or a whole number of rows, got {value!r}")
    return value


PromptConfig = Annotated[Prompt, BeforeValidator(make_prompt)]


class DataConfig(Section):
    source: Literal["embedded", "files"] = Field(
        default=EMBEDDED, description="files where there is data.forget; they may be Hub ids (with a name)"
    )
    forget: Source | None = None
    retain: Source | None = Field(default=None, description="without any, nothing keeps the rest in its place")
    holdout: Annotated[int | float, BeforeValidator(as_holdout)] = Field(
        default=0.1,
        description="retain rows, a share below 1 or a number, that are memorised and evaluated but kept out of the "
        "unlearning; drawn with the seed",
    )
    refusals: str | None = Field(
        default=None,
        description="a text file, one refusal a line, for idk, dpo and ap; None takes some that pyunlearn has",
    )
    prompt: PromptConfig = Field(
        default_factory=Prompt,
        description="a name, e.g. llama3 or plain, or tags, {user_start: ..., user_end: ..., ...}",
    )
    max_length: int | None = Field(default=None, ge=8, description="tokens; None is the model's context")
    num_authors: int = Field(default=40, ge=2, description="embedded source only, as the next three")
    questions_per_author: int = Field(default=10, ge=1)
    forget_fraction: float = Field(default=0.1, gt=0, lt=1)
    num_unknown: int = Field(default=240, ge=0, description="questions about unknown authors, to learn refusals from")

    @model_validator(mode="before")
    @classmethod
    def files_are_a_source(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("forget") is not None:
            return {"source": "files", **values}
        return values

    @model_validator(mode="after")
    def sources_fit(self) -> DataConfig:
        named = [key for key in ("forget", "retain") if getattr(self, key) is not None]
        if self.source == EMBEDDED and "forget" in named:
            raise ValueError(f"source=embedded generates its own authors, got {named}; set data.source=files")
        if self.forget is None and (named or self.source != EMBEDDED):
            what = f"source={self.source}" if self.source != EMBEDDED else "retain"
            raise ValueError(f"{what}: needs data.forget too, what is to be forgotten")
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
            if own:
                keys = " and ".join(f"evaluate.{tool}" for tool in own)
                raise ValueError(f"metrics: {name} needs {keys} (pyunlearn evaluate: --{', --'.join(own)})")
        return self

    def has_tool(self, tool: str, metric: str) -> bool:
        """Whether a model is named for this tool of the metric."""
        given = getattr(self, tool, None)
        return metric in given if isinstance(given, dict) else given is not None
