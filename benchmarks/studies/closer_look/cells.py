"""The cells of the study: one model, of one world and seed, under all metrics; each is kept as soon as it is there."""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pyunlearn.metrics import Kept
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.runs import RunConfig
from pyunlearn.runs.anchors import retrained
from pyunlearn.runs.evaluate import evaluate_items
from pyunlearn.runs.fingerprint import fingerprints
from pyunlearn.runs.job import Job, first_model
from pyunlearn.runs.tools import load_tools
from pyunlearn.store import Store
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.unlearn import unlearn

METHODS: dict[str, dict[str, Any]] = {  # in all else they are trained alike
    "GA": {"forget": "ga", "retain": []},
    "NPO": {"forget": "npo", "retain": []},
    "ME+GD": {"forget": "me", "retain": "gd"},
    "IDK+AP": {"forget": "idk", "retain": "ap"},
}
METRICS = (
    "probability", "rouge_l", "truth_ratio", "token_entropy", "fluency", "memorization_accuracy", "extraction_strength",
    "paraphrase_probability",
)  # fmt: skip
WITH_EMBEDDER = "cosine_similarity"
MODELS = ("before", "retrained", *METHODS)
SHOWN = 4  # questions whose answers are kept


@dataclass
class Cell:
    """values: set -> metric -> one value a sample, None where it has none; said: to the first questions of the forget
    set; seconds: to unlearn (or to train anew) and to measure."""

    values: dict[str, dict[str, list[float | None]]]
    said: list[str]
    seconds: dict[str, float]


@dataclass
class Start:
    """A model that knows its rows by heart, loaded or learnt when it is first asked for, and what becomes of it."""

    config: RunConfig
    store: Store
    loaded: tuple[Any, Any, Stage] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        # what is measured later is no other start
        kept = self.config.model_dump(include={"name", "output", "seed", "num_threads", "model", "data", "memorise"})
        own = RunConfig.model_validate({**kept, "evaluate": {"sets": self.config.evaluate.model_dump()["sets"]}})
        self.job = Job.start(own, None, "the same command")
        self.reads = fingerprints(own, self.job.data)
        self.asked = [item.question for item in self.job.data.forget[:SHOWN]]

    def model(self) -> tuple[Any, Any, Stage]:
        if self.loaded is None:
            folder = self.job.folder
            folder.open(self.job.config, resume=folder.marked, reads=self.reads)
            model, tokenizer, stage = first_model(self.job)
            self.loaded = model.eval(), tokenizer, stage
        return self.loaded

    def identity(self, name: str) -> dict[str, Any]:
        """What the cell's numbers depend on: settings, and the content of what is read in place of where it lies."""
        config = self.config
        plain: dict[str, Any] = {"mode": "json", "exclude_defaults": True}  # keys that come later change nothing
        told = {
            "data": config.data.model_dump(**plain, exclude={"forget", "retain", "refusals"}),
            "memorise": config.memorise and config.memorise.model_dump(**plain),
            "evaluate": config.evaluate.model_dump(**plain, exclude={"embedder", "cache", "goal", "sets"}),
            **({"unlearn": self.settings(name).model_dump(**plain)} if name in METHODS else {}),
        }
        more = {"seed": config.seed, "model": config.model.options, "reads": self.reads, "embedder": self.embedder}
        return {**told, **more}

    @property
    def embedder(self) -> str | None:
        """Its name, wherever it lies."""
        return self.config.evaluate.embedder and Path(self.config.evaluate.embedder).name

    def settings(self, name: str) -> UnlearnConfig:
        return UnlearnConfig.model_validate({**self.config.unlearn.model_dump(), **METHODS[name]})

    def cell(self, name: str) -> Cell:
        """The model of this name (of MODELS): its cell, from the store where it is there."""
        return Cell(**self.store.compute(name, self.identity(name), lambda: vars(self.compute(name))))

    def compute(self, name: str) -> Cell:
        begun = time.perf_counter()
        model = self.make(name)
        made = time.perf_counter()
        values, said = self.measure(model)
        seconds = {"training": made - begun, "measuring": time.perf_counter() - made}
        print(f"{self.config.name}, seed {self.config.seed}: {name} {seconds}", flush=True)
        return Cell(values, said, seconds)

    def make(self, name: str) -> Any:
        model, tokenizer, stage = self.model()
        if name == "before":
            return model
        if name == "retrained":
            return retrained(self.job, stage)[0].eval()
        model = copy.deepcopy(model)
        with tempfile.TemporaryDirectory() as folder:
            own = replace(stage, folder=TrainingFolder(folder))
            unlearn(own, self.settings(name), model, tokenizer, self.job.data)
        return model.eval()

    def measure(self, model: Any) -> tuple[dict[str, dict[str, list[float | None]]], list[str]]:
        """Of every set the metrics' values; and what is said to the first questions of the forget set."""
        _, tokenizer, stage = self.model()
        settings, data = self.config.evaluate, self.job.data
        stage = replace(stage, console=Console(quiet=True))
        tools = load_tools(settings, data.texts, self.job.processes.device, progress=False)
        kept, values, said = Kept(None, CausalLM.of(model)), {}, []
        for name, items in data.evaluated(settings.retain_limit).items():
            result = evaluate_items(stage, settings, items, model, tokenizer, tools, kept)
            values[name] = {metric: [row.get(metric) for row in result.records] for metric in settings.metrics}
            if name == "forget":
                said = [row["generated"] for row in result.records[:SHOWN]]
        return values, said
