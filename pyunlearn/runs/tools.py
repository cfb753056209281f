"""What metrics need besides the model, loaded as an evaluation's settings name it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..metrics import Classifier, Embedder, Endpoint, cache_folder, get_metric
from .sections import EndpointConfig, EvaluateConfig


def load_tools(
    settings: EvaluateConfig, texts: Iterable[str], device: str | torch.device, progress: bool = True
) -> dict[str, Any]:
    """By name, those that the settings' metrics need; texts: all of the data, whose words are known.

    Raises what `Embedder`, `Classifier` and `Endpoint` raise.
    """
    return {"texts": tuple(texts)} | load_models(settings, settings.metrics, device, progress)


def load_models(
    settings: EvaluateConfig, metrics: Iterable[str], device: str | torch.device, progress: bool = True
) -> dict[str, Any]:
    """Of the tools that these metrics need, those that the settings name. Raises as `load_tools`."""
    needed = tools_of(metrics)
    tools: dict[str, Any] = {}
    if "embedder" in needed and settings.embedder:
        tools["embedder"] = Embedder(settings.embedder, batch_size=settings.batch_size, device=device)
    for name in ("entailer", "classifier"):
        if name in needed and (model := getattr(settings, name)):
            tools[name] = Classifier(model, what=name, batch_size=settings.batch_size, device=device)
    if "judge" in needed and settings.judge:
        tools["judge"] = make_endpoint(settings.judge, settings, progress)
    return tools


def tools_of(metrics: Iterable[str]) -> set[str]:
    """The names of all that they need or can use."""
    return {tool for name in metrics for tool in get_metric(name).tools}


def make_endpoint(config: EndpointConfig, settings: EvaluateConfig, progress: bool) -> Endpoint:
    return Endpoint(**config.model_dump(), cache=settings.cache or cache_folder(), progress=progress)
