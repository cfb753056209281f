"""Whether all that a run names is there and fits its model, as far as names and headers tell before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from .._files import read_json
from ..data.qa import find_rows
from ..data.rows import check_file
from ..model.combined import find_combined
from ..model.forward import number_of
from ..model.gguf_header import read_header
from ..model.load import baseless, check_name, locate
from ..objectives import representation
from ..training.generic import read_anchors
from ..training.selection import trained_names
from .config import RunConfig
from .job import check_no_run
from .sections import ModelConfig


def check_fits(config: RunConfig) -> None:
    """Raises, naming the setting, FileNotFoundError for a file or a folder that is not there, ImportError for a package
    that a GGUF file needs, and ValueError for one that is not what it is named for, hidden states of a layer that the
    model does not have, or of another for rr than for rmu, a top k of more tokens than its vocabulary, or parameters to
    train that it does not have.

    What may be a name on the Hub is not asked for there.
    """
    check_data(config)
    check_model(config.model)
    check_tools(config)
    check_layers(config)
    check_trained(config)


def check_data(config: RunConfig) -> None:
    sources = {"data.forget": config.data.forget, "data.retain": config.data.retain}
    sources |= {f"evaluate.sets.{name}": source for name, source in config.evaluate.sets.items()}
    for key, source in sources.items():
        if source is not None:
            with told_of(key):
                find_rows(source.path, source.name, source.split)
    if config.data.refusals is not None:
        with told_of("data.refusals"):
            check_file(Path(config.data.refusals))
    if config.unlearn.reinforce is not None:
        read_anchors(config.unlearn.reinforce.anchors)


@contextmanager
def told_of(key: str) -> Iterator[None]:
    """Errors inside name the setting."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from None


def check_model(model: ModelConfig) -> None:
    if model.tokenizer is not None:
        check_name(model.tokenizer, "model.tokenizer")
    if model.embedded:
        return
    if model.gguf_file is None:
        check_no_run(Path(model.name_or_path))
    locate(model.name_or_path, model.gguf_file)
    if (base := model.adapters_base) is not None:
        try:
            locate(base, None)
        except FileNotFoundError as error:
            raise baseless(model.name_or_path, base, error) from None


def check_tools(config: RunConfig) -> None:
    """Of the models that metrics need."""
    named = config.evaluate.classifier
    several = named.items() if isinstance(named, dict) else [("", named)]
    models = {f"evaluate.classifier{name and f'.{name}'}": model for name, model in several}
    models |= {"evaluate.embedder": config.evaluate.embedder, "evaluate.entailer": config.evaluate.entailer}
    for key, model in models.items():
        if model is not None:
            locate(model, None, key)


def check_layers(config: RunConfig) -> None:
    depth, vocabulary = sizes(config.model)
    for role in ("forget", "retain"):
        for term in getattr(config.unlearn, role):
            for part, _ in term.weighted():
                where, name = f"unlearn.{role}: {term.name}", config.model.gguf_file or config.model.name_or_path
                if part.layer is not None and depth is not None:
                    try:
                        number_of(part.layer, depth, name)
                    except ValueError as error:
                        raise ValueError(f"{where}: {error}") from None
                if part.k is not None and vocabulary is not None and part.k > vocabulary:
                    raise ValueError(f"{where}: k={part.k}: the vocabulary of {name} has {vocabulary} tokens")
    if depth is not None:
        with told_of("unlearn"):
            representation.check_layers(
                (part for part, _ in config.unlearn.weighted_objectives()), partial(number_of, depth=depth)
            )


def sizes(model: ModelConfig) -> tuple[int | None, int | None]:
    """Layers, and tokens of the vocabulary at most; None for what is not known yet."""
    if model.embedded:
        from ..data.tiny import SIZES

        layers = model.options.get("num_hidden_layers", SIZES["num_hidden_layers"])
        return layers, model.options.get("vocab_size", 2048)
    if model.gguf_file is not None:
        return sizes_of_gguf(Path(str(model.named_paths()["model.gguf_file"])).resolve())
    base = model.name_or_path if model.adapters_base is None else model.adapters_base
    return sizes_of(Path(base).resolve() / "config.json")


@lru_cache(8)  # of all runs of a grid
def sizes_of(file: Path) -> tuple[int | None, int | None]:
    if not file.is_file():
        return None, None
    values = read_json(file, "get the model's files again")
    if not isinstance(values, Mapping):  # loading it tells that
        return None, None
    text = {**values, **values.get("text_config", {})}
    return text.get("num_hidden_layers"), text.get("vocab_size")


@lru_cache(8)
def sizes_of_gguf(file: Path) -> tuple[int | None, int | None]:
    if not file.is_file():  # in a folder on the Hub
        return None, None
    depth, own, tokens = "{arch}.block_count", "{arch}.vocab_size", "tokenizer.ggml.tokens"
    with told_of("model.gguf_file"):
        found = read_header(file, (depth, own))
        if own not in found:  # transformers then counts the tokens, too
            found |= read_header(file, (tokens,))
    return found.get(depth), found.get(own, found.get(tokens))


def check_trained(config: RunConfig) -> None:
    """By the names in a model without weights; a GGUF file, a folder on the Hub and adapters are told when loaded."""
    unlearn = config.unlearn if config.unlearn.trains and config.model.lora is None else None
    trainings = (unlearn, config.unlearn.reinforce, config.memorise)
    chosen = [settings for settings in trainings if settings is not None and (settings.train_only or settings.freeze)]
    if chosen and (model := outline(config.model)) is not None:
        for settings in chosen:
            trained_names(model, settings)


def outline(model: ModelConfig) -> Any:
    """The model with its parameters' names alone, or None where these are not known."""
    if model.embedded:
        return embedded_outline(json.dumps(model.options, sort_keys=True))
    folder = Path(model.name_or_path if model.adapters_base is None else model.adapters_base)
    known = model.gguf_file is None and model.quantize is None and (folder / "config.json").is_file()
    return outline_of(folder.resolve()) if known and find_combined(str(folder)) is None else None


@lru_cache(8)
def embedded_outline(options: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ..data.tiny import SIZES

    config = LlamaConfig(**{"tie_word_embeddings": True, **SIZES, **json.loads(options), "vocab_size": 8})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@lru_cache(8)
def outline_of(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # loading it tells, whatever it is
        return None
