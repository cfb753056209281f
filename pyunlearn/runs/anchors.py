"""The models that an unlearned one is held against: trained without the forget set, and not trained at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..model.load import with_random_weights
from ..training.stage import Stage
from ..training.unlearn import memorise
from .config import RunConfig
from .job import Job, loaded, save
from .sections import ModelConfig


def retrained(job: Job[RunConfig], stage: Stage) -> tuple[Any, Any]:
    """Model and tokenizer: what the run starts from, trained as it memorises, on all rows but those to forget.

    It is kept in the run's folder, and what a kill has left of the training is taken up.
    """
    if job.folder.retrained.is_dir():
        return loaded(job, ModelConfig(name_or_path=str(job.folder.retrained), dtype=job.config.model.dtype))
    assert job.config.memorise is not None  # the configuration is checked for it
    model, tokenizer = loaded(job, job.config.model)
    job.console.print("[bold]retrain[/] without what is to be forgotten")
    memorise(stage, job.config.memorise, model, tokenizer, replace(job.data, forget=[]), name="retrain")
    save(job, "retrain", model, tokenizer)
    return model, tokenizer


def random(job: Job[RunConfig], stage: Stage) -> tuple[Any, Any]:
    """What the run starts from, with the weights that the seed gives it."""
    model, tokenizer = loaded(job, job.config.model.model_copy(update={"quantize": None}))
    return with_random_weights(model, job.config.seed), tokenizer


ANCHORS: dict[str, Callable[[Job[RunConfig], Stage], tuple[Any, Any]]] = {"retrained": retrained, "random": random}
