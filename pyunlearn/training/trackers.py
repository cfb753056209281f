"""TensorBoard and Weights & Biases, by transformers' own callbacks: off unless asked for, their files in the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from .arguments import check_trackers


@contextmanager
def trackers(names: Sequence[str], folder: Path, run: str, stage: str, first: bool) -> Iterator[list[TrainerCallback]]:
    """Callbacks that tell these trackers (`TRACKERS`) every log line of a stage.

    TensorBoard's events go to folder/tensorboard/stage, W&B's files to folder/wandb; the project there is
    $WANDB_PROJECT, or pyunlearn, and each stage one of its runs, unless the caller has begun one. first: whether this
    process is the first one, which alone tells.

    Raises ImportError as `check_trackers`.
    """
    check_trackers(names)
    callbacks: list[TrainerCallback] = []
    if "tensorboard" in names:
        from transformers.integrations import TensorBoardCallback

        board = TensorBoardCallback()
        board.logging_dir = str(folder / "tensorboard" / stage)
        callbacks.append(board)
    begun = None
    if "wandb" in names:
        import wandb
        from transformers.integrations import WandbCallback

        if first and wandb.run is None:
            folder.mkdir(parents=True, exist_ok=True)
            begun = wandb.init(project=os.environ.get("WANDB_PROJECT", "pyunlearn"), name=f"{run}/{stage}", dir=folder)
        callbacks.append(WandbCallback())
    try:
        yield callbacks
    finally:
        if begun is not None:
            begun.finish()
