"""The run folder: what is where, and whether an existing folder is this run's.

config.yaml        the configuration as resolved, with versions
memorised/         model and tokenizer after memorising (if the run does)
evaluation/        {before,after}-{forget,retain}.jsonl, one line a sample; {before,after}.json, the means
unlearning.json    mean absolute change of a weight; with sampling also each sample's updates, MRD, and when forgotten
checkpoint/        the unlearned model and tokenizer
geffect/           what `pyunlearn geffect` measures, beside the reference of its samples
table.json, table.md, report.html
and what the trainings keep: see `pyunlearn.training.folder`
"""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import yaml

from .._files import write_text
from ..store import differences
from ..training.folder import TrainingFolder
from .config import RunConfig

# What does not change a run's results.
NOT_COMPARED = ("output", "num_threads", "versions")


class RunFolder(TrainingFolder):
    """Paths of a run."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.config = self.path / "config.yaml"
        self.memorised = self.path / "memorised"
        self.unlearning = self.path / "unlearning.json"
        self.checkpoint = self.path / "checkpoint"
        self.report = self.path / "report.html"

    def open(self, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """Makes the folder, or takes up an existing one of the same run.

        Raises FileExistsError if the folder holds something else, another configuration, or this run without `resume`.
        """
        if overwrite and self.path.exists():
            if not self.config.is_file() and any(self.path.iterdir()):
                raise FileExistsError(
                    f"--overwrite: {self.path} is not a run folder (no config.yaml); it is left alone"
                )
            shutil.rmtree(self.path)
        if self.config.is_file():
            if any(path != self.config for path in self.path.iterdir()):  # else it failed before it computed anything
                self._compare(config, resume)
        elif self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(f"{self.path} exists and is not a run folder; choose --set output=...")
        write_text(self.config, config_text(config))

    def _compare(self, config: RunConfig, resume: bool) -> None:
        there, here = (
            {key: value for key, value in values.items() if key not in NOT_COMPARED}
            for values in (yaml.safe_load(self.config.read_text(encoding="utf-8")), config.to_dict())
        )
        changed = differences(there, here)
        if changed:
            raise FileExistsError(
                f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}); choose --set output=... or --overwrite"
            )
        if not resume:
            state = "a finished run" if self.report.is_file() else "an unfinished run"
            raise FileExistsError(f"{self.path} holds {state}; choose --resume, --overwrite or --set output=...")

    def result(self, stage: str) -> Path:
        """Where the model goes that a stage leaves."""
        return {"memorise": self.memorised, "unlearn": self.checkpoint}[stage]

    def evaluation(self, name: str) -> Path:
        return self.path / "evaluation" / name


def config_text(config: RunConfig) -> str:
    return yaml.safe_dump({**config.to_dict(), "versions": versions()}, sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    import torch
    import transformers

    from .. import __version__

    return {
        "pyunlearn": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(terse=True),
    }
