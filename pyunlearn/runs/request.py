"""What is asked for in a few words, as a configuration: a source, a model, files.

A source is a YAML file, a run's folder, recipe:NAME or a file to forget. What is missing is told with a command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .._hints import path_hint
from ..data.rows import is_hub_id
from ..model.load import EMBEDDED
from ..recipes import names as recipes
from .config import DEMO, RunConfig
from .evaluate import run_of
from .folder import MARK, RunFolder
from .overrides import load_config

RECIPE = "recipe:"
# words of the command line -> what they set
KEYS = {
    "model": "model.name_or_path",
    "gguf_file": "model.gguf_file",
    "tokenizer": "model.tokenizer",
    "forget": "data.forget",
    "retain": "data.retain",
    "refusals": "data.refusals",
    "prompt": "data.prompt",
    "out": "output",
}
SECTIONS = ("data", "evaluate")  # of a configuration, that name files
Kind = Literal["configuration", "run", "recipe", "model", "data"]


def kind_of(source: str) -> Kind:
    """What a source is, told by what is there. Raises FileNotFoundError for nothing, with near names."""
    path = Path(source)
    if source.startswith(RECIPE):
        return "recipe"
    if path.suffix in (".yaml", ".yml"):
        return "configuration"
    if (path / MARK).is_file():
        return "run"
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return "model"
    if path.exists() or is_hub_id(source, None):
        return "data"
    other = f"; a recipe is asked for by {RECIPE}{source}" if source in recipes() else path_hint(path)
    raise FileNotFoundError(
        f"{source}: no such file or folder{other}; needs a YAML file, a file of questions and answers, a run's folder "
        f"or {RECIPE}NAME"
    )


def run_config(
    source: str | None = None,
    overrides: Sequence[str] = (),
    *,
    recipe: str | None = None,
    columns: str | None = None,
    lora: bool = False,
    anchors: Sequence[str] = (),
    **words: str | None,
) -> RunConfig:
    """The configuration of a run.

    source: of `kind_of`; None is the embedded demo. overrides: key.sub=value. recipe: by name. columns: of the files,
    as question=NAME,answer=NAME. lora: trains an adapter of the default size. words: of KEYS. A run of files is called
    by its forget set and its recipe or objective, and one of the embedded demo by its recipe, unless it has a name.

    Raises what `load_config` raises, and ValueError that tells what is missing, with a command that has it.
    """
    given = {name: value for name, value in words.items() if value is not None}
    path, kind = None, None if source is None else kind_of(source)
    if source is not None and kind == "recipe":
        if recipe is not None:
            raise ValueError(f"--recipe={recipe}: the recipe is {source} already; needs one of them")
        recipe = source.removeprefix(RECIPE)
    elif source is not None and kind == "run":
        path = RunFolder(source).config
        given.setdefault("out", source)
    elif source is not None and kind == "model":
        raise ValueError(f"{source}: is a model; what is it to forget?\n{command_for(given | {'model': source})}")
    elif source is not None and kind == "data":
        if "forget" in given:
            raise ValueError(f"--forget={given['forget']}: what to forget is {source} already; needs one of them")
        given["forget"] = source
    elif source is not None:
        path = Path(source)
    check_words(given | ({} if recipe is None else {"recipe": recipe}), overrides)
    if path is None:
        check_whole(given, overrides)
    values: dict[str, Any] = {KEYS[name]: value for name, value in given.items()}
    named = any(override.startswith("name=") for override in overrides)
    if path is None and not named:
        method = recipe or objective_of(overrides)
        if "forget" in given:
            values["name"] = name_of(given["forget"], method)
        elif recipe is not None:  # so that one demo after another has a folder of its own
            values["name"] = name_of(DEMO["name"], recipe)
    if columns is not None:
        if not {"forget", "retain"} & given.keys():
            raise ValueError(
                f"--columns={columns}: goes with --forget and --retain; a configuration has data.forget.columns"
            )
        values |= {f"data.{role}.columns": columns for role in ("forget", "retain") if role in given}
    chosen = [] if recipe is None else [f"unlearn.recipe={recipe}"]
    under: dict[str, Any] = {"model": {"lora": {}}} if lora else {}
    config = load_config(path, [*chosen, *overrides], anchors=anchors, given=values, under=under)
    if lora and config.model.lora is None:
        raise ValueError("--lora: and model.lora=null in the configuration; leave one of them out")
    return config


def check_words(given: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Raises ValueError for a word without a value, and for one whose key is set by --set, too."""
    for name, value in given.items():
        option, key = f"--{name.replace('_', '-')}", KEYS.get(name, f"unlearn.{name}")
        if not value.strip():
            raise ValueError(f"{option}: is empty, needs a value")
        for override in overrides:
            if override.partition("=")[0].strip() == key:
                raise ValueError(f"{option}={value} and --set {override}: both are {key}; needs one of them")


def check_whole(given: Mapping[str, str], overrides: Sequence[str], command: str = "run") -> None:
    """Raises ValueError for a model without anything to forget, and the reverse: there is no default for either.

    command: that the error tells.
    """
    has = {name for name in KEYS if name in given or any(each.startswith(KEYS[name]) for each in overrides)}
    if "forget" in given and not {"model", "gguf_file"} & has:
        raise ValueError(
            f"{given['forget']}: is to be forgotten, and by which model?\n{command_for(given, command)}\n"
            f"MODEL is a folder or a Hub id; {EMBEDDED} is a small one, made here, that learns the rows first"
        )
    alone = [name for name in ("model", "gguf_file", "retain") if name in given]
    if "forget" not in has and alone and given.get("model") != EMBEDDED:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in alone)
        raise ValueError(f"{options}: needs --forget, too: what is to be forgotten\n{command_for(given, command)}")


def command_for(given: Mapping[str, str], command: str = "run") -> str:
    """The command with all that a run of one's own takes."""
    words = {"model": "MODEL", "forget": "FORGET.jsonl", "retain": "RETAIN.jsonl"} | dict(given)
    return f"  pyunlearn {command} " + " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in words.items()
    )


def objective_of(overrides: Sequence[str]) -> str | None:
    """The objective, or the recipe, that overrides name alone."""
    keys = ("unlearn.recipe=", "unlearn.forget=")
    named = [override.partition("=")[2] for key in keys for override in overrides if override.startswith(key)]
    return next(iter(named), None)


def name_of(forget: str, method: str | None) -> str:
    """
    >>> name_of("data/my set.jsonl", "npo+mrd"), name_of("locuslab/TOFU", None)
    ('my_set-npo_mrd', 'TOFU')
    """
    whole = Path(forget).name.strip(".") or Path(forget).resolve().name
    stem = whole.partition(".")[0] or whole
    return "-".join(re.sub(r"[^\w.-]+", "_", part).strip("_") or "run" for part in (stem, method) if part)


def of_source(source: str | None, model: str | None, data: str | None) -> tuple[str | None, str | None, str | None]:
    """(configuration, model, data) of a command that measures: a source may be any of them.

    A run's folder is its model, where data are given; else its configuration. Raises ValueError for a source beside
    what it stands for, and FileNotFoundError as `kind_of`.
    """
    if source is None:
        return None, model, data
    kind = kind_of(source)
    if kind in ("configuration", "run") and model is None and data is None:
        return str(RunFolder(source).config) if kind == "run" else source, None, None
    if kind == "run" and model is None and data is not None:
        return None, str(RunFolder(source).checkpoint), data
    if kind == "model" and model is None:
        return None, source, data
    if kind == "data" and data is None:
        return None, model, source
    if kind == "recipe":
        raise ValueError(f"{source}: is a recipe, of which there is nothing to measure; needs a file, a model or a run")
    raise ValueError(f"{source}: is a {kind}, which is given already or does not go with --model and --data")


def prompt_of(model: str | None) -> Any:
    """The prompt of the run that a model on disk is of, as `make_prompt` takes it; None for any other model."""
    run = None if model is None else run_of(model)
    if run is None:
        return None
    data = run.read_config().get("data")
    return data.get("prompt") if isinstance(data, Mapping) else None


def columns_of(model: str | None, data: str) -> dict[str, str] | None:
    """The columns that the run a model on disk is of was told for this file; None for any other."""
    run = None if model is None else run_of(model)
    if run is None:
        return None
    written = run.read_config()
    read, evaluated = (section if isinstance(section, Mapping) else {} for section in map(written.get, SECTIONS))
    sources = [read.get("forget"), read.get("retain"), *(evaluated.get("sets") or {}).values()]
    own = [each for each in sources if isinstance(each, Mapping) and each.get("path") is not None]
    same = (each.get("columns") for each in own if Path(each["path"]).resolve() == Path(data).resolve())
    return next(same, None)


def check_pair(command: str, model: str | None, data: str | None) -> tuple[str, str]:
    """Both. Raises ValueError that tells which is missing, with the command."""
    if model is None or data is None:
        words = f"--model {shlex.quote(model or 'MODEL')} --data {shlex.quote(data or 'FILE.jsonl')}"
        missing = "--model: which model" if model is None else "--data: which questions and answers"
        raise ValueError(f"{missing}? needs a folder or a Hub id{'' if model is None else ', or a file'}\n"
                         f"  pyunlearn {command} {words}")  # fmt: skip
    return model, data
