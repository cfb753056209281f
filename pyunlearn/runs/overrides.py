"""A run's configuration from a YAML file and `--set key.sub=value`; what is wrong is told by key, with near names."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .._hints import hint, near
from ..objectives import table
from ..recipes import model_of, recipe
from ..training.method import DEFAULT_TERMS
from ..training.settings import merge
from .config import ConfigError, RunConfig, as_meant, defaults_of, lacks_retain

QUOTED = r"'([^']*)'"
NUMBER, WHOLE, SECTION = "a number", "a whole number", "a section of keys and values"
NEEDED = {  # by pydantic's type of error
    "int_type": WHOLE, "int_parsing": WHOLE, "int_from_float": WHOLE, "int_parsing_size": WHOLE,
    "float_type": NUMBER, "float_parsing": NUMBER, "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
    "list_type": "a list", "dict_type": SECTION, "model_type": SECTION, "too_short": "a list of {min_length} at least",
    "greater_than": "a number above {gt:g}", "greater_than_equal": "{ge:g} at least",
    "less_than": "a number below {lt:g}", "less_than_equal": "{le:g} at most",
    "string_pattern_mismatch": "letters, digits, _, . and - alone",
}  # fmt: skip
SETS = ["evaluate", "sets"]
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)  # not UTF-8, a 13th month, too deep


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    anchors: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    under: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Reads a YAML file (None: the embedded demo), applies `key.sub=value` overrides, checks everything.

    anchors: further ones of evaluate.anchors. given: values by dotted key, laid on the file's before the overrides are;
    under: sections that these are laid on.
    A recipe among the overrides comes before the others, and takes the place of what the file has for its keys; before
    it come the model and the data, whose kind decides on the defaults, and the whole section, which would undo it.

    Raises FileNotFoundError when `path` is missing, and ConfigError with one line per problem, or for an override that
    would undo an earlier one of a key below it.
    """
    values: Any = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"configuration {str(path)!r}: no such file; needs a YAML file (pyunlearn init writes one)"
            )
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except UNREADABLE as error:
            raise ConfigError(f"configuration {str(path)!r}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"configuration {str(path)!r}: needs sections (key: value), got {type(values).__name__}")
        if "versions" in values:  # a run folder's config.yaml records them
            values = as_meant(values)
    values = merge(under or {}, values)
    for key, value in (given or {}).items():
        put(values, key.split("."), value, f"{key}={value}")
    check_order(overrides)
    for override in sorted(overrides, key=rank):
        for role, name in DEFAULT_TERMS.items():  # so that one key of a term that was left out can be set
            if override.startswith(f"unlearn.{role}.") and isinstance(values.setdefault("unlearn", {}), dict):
                named = values["unlearn"].get("recipe")
                defaults = recipe_by(named) if isinstance(named, str) else defaults_of(values).get("unlearn", {})
                terms = copy.deepcopy(defaults.get(role, [{"name": name}]))
                values["unlearn"].setdefault(role, terms)
        set_value(values, override)
        if override.startswith("unlearn.recipe=") and isinstance(named := values["unlearn"]["recipe"], str):
            alone: dict[str, Any] = {"retain": []} if lacks_retain(values) else {}
            values["unlearn"] = merge(values["unlearn"], recipe_by(named) | alone)
            if isinstance(model := values.get("model") or {}, dict) and (adapted := model_of(named)):
                values["model"] = merge(model, adapted)
                for typed in overrides:  # what is typed of the model wins over the recipe's
                    if typed.startswith("model"):
                        set_value(values, typed)
    evaluate = values.get("evaluate") or {}
    if anchors and isinstance(evaluate, dict) and isinstance(evaluate.get("anchors") or [], list):
        values["evaluate"] = {**evaluate, "anchors": [*(evaluate.get("anchors") or []), *anchors]}
    with problems_told():
        return RunConfig.model_validate(values)


@contextmanager
def problems_told() -> Iterator[None]:
    """Raises ConfigError, one line per problem, for what pydantic raises inside."""
    try:
        yield
    except ValidationError as error:
        raise ConfigError("\n".join(explain(problem) for problem in error.errors())) from None


FIRST = ("model", "data", "unlearn=", "unlearn.recipe=")


def rank(override: str) -> int:
    return next((i for i, key in enumerate(FIRST) if override.startswith(key)), len(FIRST))


def recipe_by(name: str) -> dict[str, Any]:
    try:
        return recipe(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_order(overrides: Sequence[str]) -> None:
    """Raises ConfigError for `a=...` after `a.b=...`, which nobody means to drop."""
    keys = [override.partition("=")[0].replace(" ", "") for override in overrides]
    for place, key in enumerate(keys):
        for earlier, below in zip(overrides[:place], keys, strict=False):
            if below.startswith(f"{key}."):
                raise ConfigError(
                    f"--set {overrides[place]!r}: would undo {earlier!r}, which is given before it; give it first, or "
                    "leave one of them out"
                )


def set_value(config: dict[str, Any], override: str) -> None:
    """Applies one `key.sub=value` in place; the value is YAML. A list of one term needs no index."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: needs key.sub=value, e.g. unlearn.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except UNREADABLE as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    put(config, parts, as_number(value) if isinstance(value, str) else value, override)


def put(config: dict[str, Any], parts: Sequence[str], value: Any, override: str) -> None:
    """Sets the value at a key in place. override: what errors call it. Raises ConfigError for a key below a value."""
    at: Any = config
    for depth, part in enumerate(parts[:-1]):
        if isinstance(at, list):
            at = at[list_index(at, part, override)]
            if part.isdigit():
                continue
        if not isinstance(at, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parts[:depth])} is {at!r}, not a section")
        if at.get(part) is None:
            at[part] = {}
        elif isinstance(at[part], str) and (part in ("forget", "retain", "sampling", "prompt") or parts[:2] == SETS):
            path = part != "prompt" and (parts[0] == "data" or parts[:2] == SETS)
            at[part] = {"by" if part == "sampling" else "path" if path else "name": at[part]}
            if parts[0] == "unlearn" and part != "sampling":
                at[part] = [at[part]]  # of terms
        at = at[part]
    if isinstance(at, list) and not parts[-1].isdigit():
        at = at[list_index(at, parts[-1], override)]
    if isinstance(at, list):
        at[list_index(at, parts[-1], override)] = value
    elif isinstance(at, dict):
        at[parts[-1]] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parts[:-1])} is {at!r}, not a section")


def list_index(items: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if not part.isdigit() and len(items) == 1:
        return 0
    raise ConfigError(f"--set {override!r}: a list of {len(items)} needs an index below {len(items)}, got {part!r}")


def as_number(text: str) -> str | float:
    """YAML 1.1 reads 1e-4 as text; people mean the number."""
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def explain(problem: Any) -> str:
    """One pydantic problem as `key: what is wrong, what came; what is needed`."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; {key_hint(location)}"
    came = problem["input"]
    if problem["type"] == "missing":
        return f"{key}: is needed, and not given"
    if problem["type"] == "value_error":
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    if problem["type"] == "literal_error":
        return f"{key}={came!r}: {hint(came, re.findall(QUOTED, problem['ctx']['expected']))}"
    if problem["type"] in NEEDED:
        return f"{key}: needs {NEEDED[problem['type']].format(**problem.get('ctx', {}))}, got {came!r}"
    return f"{key}: {problem['msg']}, got {came!r}"


# What other tools call a key here.
ALSO_CALLED = {
    "lr": "learning_rate", "num_epochs": "epochs", "num_train_epochs": "epochs", "bs": "batch_size",
    "per_device_train_batch_size": "batch_size", "grad_accum": "gradient_accumulation_steps", "wd": "weight_decay",
    "warmup_steps": "warmup", "warmup_ratio": "warmup", "lr_scheduler_type": "scheduler", "model_name": "name_or_path",
    "path": "name_or_path", "torch_dtype": "dtype", "forget_set": "forget", "retain_set": "retain", "out": "output",
    "output_dir": "output", "loss": "forget", "objective": "forget", "method": "recipe", "trackers": "report_to",
}  # fmt: skip


def key_hint(location: Sequence[str]) -> str:
    """What may have been meant: a near key of the section, or one of that name elsewhere; else all of the section's."""
    word, known = location[-1], list(fields_at(location[:-1]))
    if "options" in known and location[0] == "unlearn" and any(word in row.defaults for row in table()):
        return f"did you mean {'.'.join([*location[:-1], 'options', word])}?"
    word = ALSO_CALLED.get(word, word)
    everywhere = dict(all_keys(RunConfig))
    elsewhere = [key for key, name in everywhere.items() if name == word and word not in known]
    if word in known or not elsewhere or (word == location[-1] and near(word, known)):
        return hint(word, known)
    return f"did you mean {' or '.join(elsewhere[:3])}?"


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, last name) of every key below a section; of terms in lists, none."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", name
        if "list" not in str(field.annotation):
            for inner in sections_in(field.annotation):
                yield from all_keys(inner, f"{prefix}{name}.")


def fields_at(location: Sequence[str]) -> Iterable[str]:
    """The keys of the section at `location`."""
    section: type[BaseModel] = RunConfig
    for part in location:
        if part not in section.model_fields:  # a place in a list, a name of the user's
            continue
        section = next(iter(sections_in(section.model_fields[part].annotation)))
    return section.model_fields


def sections_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """The Section classes inside an annotation such as `list[TermConfig]` or `GoalConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)
