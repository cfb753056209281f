"""Whether the objectives of a run fit its model, as far as its files tell before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from .._files import read_json
from ..model.forward import number_of
from .config import RunConfig
from .sections import ModelConfig


def check_fits(config: RunConfig) -> None:
    """Raises ValueError for hidden states of a layer that the model does not have, or a top k of more tokens than its
    vocabulary."""
    depth, vocabulary = sizes(config.model)
    for role in ("forget", "retain"):
        for term in getattr(config.unlearn, role):
            for part, _ in term.weighted():
                where, name = f"unlearn.{role}: {term.name}", config.model.name_or_path
                if part.layer is not None and depth is not None:
                    try:
                        number_of(part.layer, depth, name)
                    except ValueError as error:
                        raise ValueError(f"{where}: {error}") from None
                if part.k is not None and vocabulary is not None and part.k > vocabulary:
                    raise ValueError(f"{where}: k={part.k}: the vocabulary of {name} has {vocabulary} tokens")


def sizes(model: ModelConfig) -> tuple[int | None, int | None]:
    """Layers, and tokens of the vocabulary at most; None for what is not known yet."""
    if model.embedded:
        from ..data.tiny import SIZES

        layers = model.options.get("num_hidden_layers", SIZES["num_hidden_layers"])
        return layers, model.options.get("vocab_size", 2048)
    base = model.name_or_path if model.adapters_base is None else model.adapters_base
    return (None, None) if model.gguf_file is not None else sizes_of(str(Path(base) / "config.json"))


@lru_cache(8)  # of all runs of a grid
def sizes_of(file: str) -> tuple[int | None, int | None]:
    if not Path(file).is_file():
        return None, None
    values = read_json(Path(file), "get the model's files again")
    if not isinstance(values, Mapping):  # loading it tells that
        return None, None
    text = {**values, **values.get("text_config", {})}
    return text.get("num_hidden_layers"), text.get("vocab_size")
