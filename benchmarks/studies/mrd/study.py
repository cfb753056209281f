"""What the figures share: a model that knows its samples, unlearned again and again, each result on disk."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyunlearn as pu
from pyunlearn.data import QA, QADataset, collate, load_qa
from pyunlearn.metrics import teacher_forced
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.load import load_model
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.job import Job, first_model, quiet_libraries
from pyunlearn.store import Store, digest_json
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.unlearn import UnlearnData, unlearn

Result = dict[str, Any]
EVALUATED = 100  # retain samples looked at after an unlearning


@dataclass(frozen=True)
class Start:
    """A model that knows forget and retain, before unlearning; `folder` keeps what was computed from it."""

    model: Any
    tokenizer: Any
    forget: list[QA]
    retain: list[QA]
    refusals: list[str]
    folder: Path

    @property
    def store(self) -> Store:
        return Store(self.folder)

    def rows(self, items: Sequence[QA]) -> QADataset:
        return QADataset(items, self.tokenizer, CausalLM.of(self.model).context_length)

    def mrd(self, items: Sequence[QA], estimator: Any = "gradient", **options: Any) -> pu.MRDResult:
        rows = self.rows(items)
        batches = [collate([rows[i]], rows.pad_token_id) for i in range(len(rows))]
        return pu.mrd(self.model, batches, estimator, progress=False, **{"check_draws": 0, **options})


def embedded(seed: int, work: Path) -> Start:
    """The embedded world of this seed, learnt by heart by a model of this seed (kept in `work`)."""
    whole = {"data": {"holdout": 0, "num_unknown": 0}, "memorise": {"epochs": 20}}
    config = RunConfig.model_validate({"seed": seed, "output": str(work / f"seed{seed}" / "run"), **whole})
    job = Job.start(config, None, "the same command")
    job.folder.open(config, resume=job.folder.marked)
    model, tokenizer, _ = first_model(job)
    data = job.data
    return Start(model.eval(), tokenizer, data.forget, data.retain, data.refusals, work / f"seed{seed}")


def pretrained(model: str, forget: str, retain: str, retain_limit: int | None, work: Path) -> Start:
    """A model on disk (a folder or a GGUF file) that knows both files already."""
    quiet_libraries()
    path, gguf = Path(model), Path(model).suffix == ".gguf"
    loaded, tokenizer = load_model(str(path.parent), gguf_file=path.name) if gguf else load_model(str(path))
    refusals = ["I do not know.", "I have no information about that.", "I cannot answer this question."]
    return Start(loaded, tokenizer, load_qa(forget), load_qa(retain, limit=retain_limit), refusals, work / path.stem)


def unlearn_copy(
    start: Start,
    method: str,
    forget: Sequence[QA],
    retain: Sequence[QA],
    *,
    seed: int,
    steps: int,
    rate: float,
    batch_size: int,
    by: str = "uniform",
    forgotten: Mapping[str, Any] | None = None,
) -> Result:
    """A copy of the model after `steps` AdamW steps, or when all is forgotten: how it went and what is left.

    method: a recipe. by: "shuffle" (all in turn), "uniform", "algorithm2" or "inverse". forgotten: of `early_stop`.
    """
    sampling = {"by": by} if by in ("shuffle", "uniform") else {"by": "mrd", "weighting": by}
    settings = UnlearnConfig.model_validate(
        {"recipe": method, "sampling": sampling, "early_stop": forgotten, "max_steps": steps, "learning_rate": rate,
         "batch_size": batch_size, "scheduler": "constant", "save_steps": steps}
    )  # fmt: skip
    model, data = copy.deepcopy(start.model), UnlearnData([*forget], [*retain], start.refusals)
    start.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=start.folder) as folder:
        stage = Stage(TrainingFolder(folder), seed, CausalLM.of(model).context_length)
        unlearned = unlearn(stage, settings, model, start.tokenizer, data)
    after = {"forget": forget, "retain": retain[:EVALUATED]}
    return {**unlearned.as_dict(), **{name: known(model, start.rows(items)) for name, items in after.items()}}


def known(model: Any, rows: QADataset) -> dict[str, float]:
    """Mean probability and memorization accuracy."""
    read = teacher_forced(model, rows, progress=False)
    return {name: sum(row[name] for row in read) / len(read) for name in ("probability", "memorization_accuracy")}


class Study:
    """Settings of one study, and the models it starts from."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.small = args.samples is not None
        self._starts: dict[int, Start] = {}

    def start(self, seed: int) -> Start:
        if seed not in self._starts:
            args = self.args
            if args.model is None:
                self._starts[seed] = embedded(seed, args.work)
            else:
                self._starts[seed] = pretrained(args.model, args.forget, args.retain, args.retain_limit, args.work)
        return self._starts[seed]

    @property
    def seeds(self) -> range:
        return range(self.args.seeds)

    def run(self, name: str, seed: int, method: str, forget: Any, retain: Any, **options: Any) -> Result:
        """What `unlearn_copy` gives, kept. A pretrained model is one and the same for all seeds."""
        start = self.start(seed if self.args.model is None else 0)
        samples = {"forget": [qa.question for qa in forget], "retain": digest_json([qa.question for qa in retain])}

        def compute() -> Result:
            result = unlearn_copy(start, method, forget, retain, seed=seed, **options)
            print(f"{start.folder.name}/{name}", flush=True)
            return result

        return start.store.compute(name, {"method": method, "seed": seed, **samples, **options}, compute)
