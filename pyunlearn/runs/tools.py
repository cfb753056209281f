"""What metrics need besides the model, loaded as an evaluation's settings name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch

from ..metrics import Classifier, Embedder, Endpoint, cache_folder, get_metric
from .evaluate_config import EndpointConfig, EvaluateConfig


def load_tools(
    settings: EvaluateConfig,
    texts: Iterable[str],
    device: str | torch.device,
    progress: bool = True,
    before: Callable[[], Any] | None = None,
    endpoints: dict[str, Endpoint] | None = None,
) -> dict[str, Any]:
    """By name, those that the settings' metrics need, and the writer where they name one; texts: all of the data, whose
    words are known; before: gives the tool of that name; endpoints: those that the job has made, whose budgets are the
    job's.

    Raises what `Embedder`, `Classifier` and `Endpoint` raise.
    """
    endpoints = {} if endpoints is None else endpoints
    tools = {"texts": tuple(texts)} | load_models(settings, settings.metrics, device, progress, endpoints)
    if settings.endpoint:
        tools["writer"] = endpoint_of("writer", settings.endpoint, settings, progress, endpoints)
    if "before" in tools_of(settings.metrics) and before is not None:
        tools["before"] = before() or None
    return tools


def load_models(
    settings: EvaluateConfig,
    metrics: Sequence[str],
    device: str | torch.device,
    progress: bool = True,
    endpoints: dict[str, Endpoint] | None = None,
) -> dict[str, Any]:
    """Of the tools that these metrics need, those that the settings name. Raises as `load_tools`."""
    needed = tools_of(metrics)
    tools: dict[str, Any] = {}
    options: dict[str, Any] = {"batch_size": settings.batch_size, "device": device}
    if "embedder" in needed and settings.embedder:
        tools["embedder"] = Embedder(settings.embedder, **options)
    if "entailer" in needed and settings.entailer:
        tools["entailer"] = Classifier(settings.entailer, what="entailer", **options)
    if "classifier" in needed and (named := settings.classifier):
        load = cache(partial(Classifier, **options))  # metrics may share one
        tools["classifier"] = (
            load(named)
            if isinstance(named, str)
            else {metric: load(model) for metric, model in named.items() if metric in metrics}
        )
    if "judge" in needed and settings.judge:
        made = {} if endpoints is None else endpoints
        tools["judge"] = endpoint_of("judge", settings.judge, settings, progress, made)
    return tools


def tools_of(metrics: Iterable[str]) -> set[str]:
    """The names of all that they need or can use."""
    return {tool for name in metrics for tool in get_metric(name).tools}


def endpoint_of(
    name: str, config: EndpointConfig, settings: EvaluateConfig, progress: bool, made: dict[str, Endpoint]
) -> Endpoint:
    """The one of this name, made once."""
    if name not in made:
        made[name] = Endpoint(**config.model_dump(), cache=settings.cache or cache_folder(), progress=progress)
    return made[name]
