"""The sections of a run's configuration that say which model and which data, each checked as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from .._hints import check_known, hint
from ..data import Prompt, make_prompt
from ..data.columns import check_fields
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
