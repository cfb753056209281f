"""Where a training keeps its things.

training/STAGE/       resumable checkpoints of the stage under way; removed when the stage is done
training/unlearn/start/    the trained weights before its first step, of as many bytes as they have in memory; the same
metrics.jsonl         one line per optimiser step
reference/            what the frozen reference says, per kind of sequence
texts/                what models have written for the objectives, by model and prompt
checkpoints/step-N/   models on the way, with keep_steps
trackers/             what TensorBoard and Weights & Biases keep, with report_to
geffect/reference/    the same of the samples that the G-effect is measured on
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from .._files import SEAL, named_failures, seal, write_folder
from ..model.lora import saving

logger = logging.getLogger(__name__)


class TrainingFolder:
    """Paths below one folder, and models written into it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.reference = self.path / "reference"
        self.texts = self.path / "texts"
        self.kept = self.path / "checkpoints"
        self.geffect = self.path / "geffect"
        self.trackers = self.path / "trackers"

    def training(self, stage: str) -> Path:
        return self.path / "training" / stage

    def start(self, stage: str) -> Path:
        """The trained weights before the stage's first step (`start.Start`)."""
        return self.training(stage) / "start"

    def last_checkpoint(self, stage: str) -> Path | None:
        """The resumable checkpoint of the most steps that was written to its end (its seal comes last).

        Later ones are passed over, with a warning in the log that names them.
        """
        for _, path in sorted(self.checkpoints(stage).items(), reverse=True):
            if (path / SEAL).is_file():
                return path
            logger.warning(
                "%s: passed over, it has no %s: it was not written to its end, or that file was deleted", path, SEAL
            )
        return None

    def checkpoints(self, stage: str) -> dict[int, Path]:
        """Optimiser step -> the resumable checkpoint there, whole or not."""
        return numbered(self.training(stage), "checkpoint-")

    def remove_training(self, stage: str) -> None:
        """The resumable checkpoints of a finished stage."""
        path = self.training(stage)
        shutil.rmtree(path, ignore_errors=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def kept_models(self) -> dict[int, Path]:
        """Optimiser step -> the model kept there."""
        return numbered(self.kept, "step-")


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """Number -> path of what is called so: prefix, number."""
    numbers = {path: path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")}
    return {int(number): path for path, number in numbers.items() if number.isdigit()}


def write_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Model (safetensors; of one under peft its adapter alone) and tokenizer in a folder that is there whole or not at
    all, sealed (`_files.seal`).

    Raises OSError that names the folder where it cannot be written.
    """

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary, **saving(model))
        tokenizer.save_pretrained(temporary)
        seal(temporary)

    with named_failures(path):
        write_folder(path, fill)
