"""What a run is told, checked as a whole before anything is loaded (`overrides` reads it from YAML and `--set`).

Anything left out takes the embedded demo's value while `model.name_or_path` is `embedded`, and a cautious value for a
pretrained model otherwise (no memorise stage, and the learning rate that `training.rate` has for its size).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..data import Prompt
from ..model.load import EMBEDDED
from ..recipes import model_of
from ..training.method import UnlearnConfig, with_recipe
from ..training.settings import GEffectConfig, MemoriseConfig, Section, merge
from .evaluate_config import EvaluateConfig
from .sections import DataConfig, ModelConfig, existing


class ConfigError(ValueError):
    """A configuration that cannot run. The message has one line per problem: the key, what came, what is needed."""


def as_threads(value: Any) -> Any:
    """Raises ValueError for a number of threads that the system would not start."""
    most = max(1024, os.cpu_count() or 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"needs an integer from 1 to {most}, got {value!r}; this machine has {os.cpu_count()} cores")
    return value


Threads = Annotated[int, BeforeValidator(as_threads)]


# What keys that came later were as good as, in the configurations that runs have written before (`as_meant`).
EARLIER: dict[str, Any] = {"data": {"holdout": 0, "num_unknown": 0}}


def as_meant(written: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run folder's config.yaml, without its versions and what was made of its models later: what the
    run did, whatever is the default now."""
    return merge(EARLIER, {key: value for key, value in written.items() if key not in ("versions", "calibration")})


# What the embedded demo sets apart from the defaults; examples/demo.yaml has the same.
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


DEMO_ADAPTER_RATE = 3e-3  # of an adapter in the place of the demo's model


def defaults_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """DEMO, or nothing where `values` name a pretrained model."""
    model = values.get("model") or {}
    pretrained = isinstance(model, Mapping) and (
        model.get("name_or_path", EMBEDDED) != EMBEDDED or model.get("gguf_file") is not None
    )
    if pretrained:
        return {}
    if isinstance(model, Mapping) and model.get("lora") is not None:
        return merge(DEMO, {"unlearn": {"learning_rate": DEMO_ADAPTER_RATE}})
    return DEMO


def lacks_retain(values: Mapping[str, Any]) -> bool:
    """Whether the data are files, and none of them is to be retained."""
    data = values.get("data")
    return isinstance(data, Mapping) and data.get("forget") is not None and data.get("retain") is None


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
        if not isinstance(values, Mapping):
            return values
        unlearn = values.get("unlearn")
        if lacks_retain(values) and (unlearn is None or isinstance(unlearn, Mapping)):
            unlearn = {"retain": [], **(unlearn or {})}
        own = {**values, "unlearn": with_recipe(unlearn)} if unlearn is not None else values
        if isinstance(unlearn, Mapping) and isinstance(named := unlearn.get("recipe"), str):
            own = merge({"model": model} if (model := model_of(named)) else {}, own)
        return merge(defaults_of(values), own)

    @field_validator("evaluate")
    @classmethod
    def has_probability(cls, evaluate: EvaluateConfig) -> EvaluateConfig:
        if "probability" not in evaluate.metrics:
            raise ValueError("metrics needs probability: the goal and the figures are made of it")
        return evaluate

    @model_validator(mode="after")
    def adapter_fits(self) -> RunConfig:
        model, lora = self.model, self.model.lora
        if model.quantize is not None and (lora is None or lora.save != "adapter" or self.memorise is not None):
            raise ValueError(
                f"model.quantize={model.quantize}: quantised weights are not trained, nor is an adapter merged "
                "into them: needs model.lora.save=adapter, and no memorise"
            )
        nameless = self.memorise is None and (model.embedded or model.gguf_file is not None)
        if lora is not None and lora.save == "adapter" and nameless:
            raise ValueError(
                "model.lora.save=adapter: needs a base that is found again, a folder or Hub id of safetensors, or what "
                "the run memorises; or model.lora.save=merged"
            )
        return self

    @model_validator(mode="after")
    def scores_are_possible(self) -> RunConfig:
        if self.unlearn.sampling.by == "mrd" and self.model.quantize is not None:
            raise ValueError(
                "unlearn.sampling=mrd scores by small changes of the weights, and quantised ones have none: set "
                f"model.quantize=null, got {self.model.quantize}"
            )
        if self.unlearn.sampling.by == "mrd" and self.model.dtype != "float32":
            raise ValueError(
                f"unlearn.sampling=mrd scores by small changes of the weights: set model.dtype=float32, got "
                f"{self.model.dtype} (unlearn.bf16=true still computes the updates in bfloat16)"
            )
        return self

    @model_validator(mode="after")
    def reinforced_fits(self) -> RunConfig:
        made, model = self.unlearn.reinforce, self.model
        if made is None:
            return self
        if made.into != "weights" and model.quantize is not None:
            raise ValueError(
                f"unlearn.reinforce.into={made.into}: needs the reinforced model whole, and model.quantize="
                f"{model.quantize} leaves its adapter on packed weights; set model.quantize=null"
            )
        others = {} if model.lora is None else model.lora.model_extra or {}
        if made.into == "weights" and (own := [key for key in ("use_dora", "modules_to_save") if others.get(key)]):
            raise ValueError(
                f"unlearn.reinforce.into=weights: scales what plain LoRA adds; leave out model.lora.{own[0]}"
            )
        if made.into != "labels" and self.evaluate.every is not None:
            raise ValueError(
                f"evaluate.every={self.evaluate.every}: unlearn.reinforce.into={made.into} has no steps; set it to null"
            )
        return self

    @model_validator(mode="after")
    def picks_of_what_is_kept(self) -> RunConfig:
        pick, every, keep = self.evaluate.pick, self.evaluate.every, self.unlearn.keep_steps
        if pick is None:
            return self
        if not isinstance(every, int) or keep is None or every % keep:
            raise ValueError(
                f"evaluate.pick: picks of models that are measured and kept: set evaluate.every=N and "
                f"unlearn.keep_steps=N, or a number that divides it; got {every} and {keep}"
            )
        if pick.by not in self.evaluate.metrics:
            raise ValueError(
                f"evaluate.pick.by={pick.by}: needs it among evaluate.metrics, got {', '.join(self.evaluate.metrics)}"
            )
        if not self.has_retain:
            raise ValueError("evaluate.pick: needs rows to retain: set data.retain=FILE, or evaluate.pick=null")
        return self

    @model_validator(mode="after")
    def retraining_is_told_how(self) -> RunConfig:
        if "retrained" in self.evaluate.anchors and self.memorise is None:
            raise ValueError(
                "evaluate.anchors=[retrained] trains the starting model by the memorise settings, without the forget "
                "set: set memorise (epochs, learning_rate, ...), got null"
            )
        if "retrained" in self.evaluate.anchors and not self.has_retain:
            raise ValueError(
                "evaluate.anchors=[retrained]: there is nothing to train on but what is to be forgotten; set "
                "data.retain=FILE, or evaluate.anchors=[]"
            )
        return self

    @model_validator(mode="after")
    def retain_rows_given(self) -> RunConfig:
        if self.has_retain:
            return self
        if terms := [term.name for term in self.unlearn.retain]:
            raise ValueError(
                f"unlearn.retain={terms}: needs rows to retain: set data.retain=FILE, or unlearn.retain=[]"
            )
        if self.geffect is not None:
            raise ValueError("geffect: is measured on what is forgotten and what is retained: set data.retain=FILE")
        return self

    @model_validator(mode="after")
    def probed_objectives_fit(self) -> RunConfig:
        if self.geffect is not None:
            self.unlearn.check_probed()
        return self

    @property
    def needs_refusals(self) -> bool:
        """Whether an objective answers with them."""
        terms = (*self.unlearn.forget, *self.unlearn.retain)
        return any("refusal" in part.batches for term in terms for part, _ in term.weighted())

    @property
    def has_retain(self) -> bool:
        """Whether there are rows to retain."""
        return self.data.source == EMBEDDED or self.data.retain is not None

    @property
    def max_length(self) -> int | None:
        return self.data.max_length

    @property
    def prompt(self) -> Prompt:
        return self.data.prompt

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path("runs") / self.name

    def paths(self) -> Iterator[tuple[str, Path]]:
        """(key, path) of all that the run reads and that is a file or a folder here."""
        sources = {"data.forget": self.data.forget, "data.retain": self.data.retain}
        sources |= {f"evaluate.sets.{name}": source for name, source in self.evaluate.sets.items()}
        named = {key: source.path for key, source in sources.items() if source is not None}
        anchors = None if self.unlearn.reinforce is None else self.unlearn.reinforce.anchors
        own = {"data.refusals": self.data.refusals, "unlearn.reinforce.anchors": anchors}
        yield from existing({**own, **named, **self.model.named_paths()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out: loading it gives this configuration again."""
        return self.model_dump(mode="json")
