"""Unlearning methods by the names papers give them: a file NAME.yaml each, with a summary, its source, and settings of
`unlearn` in the words of a run's configuration, which are laid under what the user sets.

NAME+mrd draws the forget samples by Memory Removal Difficulty (arXiv:2504.06658, Section 3.4). NAME@SETTINGS lays
settings that were published for a model and a data set on the recipe's: learning rate, epochs, options, and an adapter
of `model` where there was one. Where a batch is split into micro-batches there, the split is ours; what a source does
not tell is left out. What one source tells of several recipes is in published/SOURCE.yaml; a recipe has of that what is
named like SOURCE/PATTERN, but for the keys that it sets beside it.

grids/ has the grids of `pyunlearn sweep` by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from .._hints import check_known, hint, near

SUFFIX, AT = "+mrd", "@"
FILE = re.compile(r"([a-z0-9][a-z0-9_.-]*)\.yaml")
NEEDED = ("summary", "source", "unlearn")
SETTINGS, FURTHER = ("source", "unlearn"), ("model",)  # of what was published


class Recipe(NamedTuple):
    """One file. published: by model and data set, settings of `unlearn`, also of `model`, and where they are told."""

    summary: str
    source: str
    unlearn: dict[str, Any]
    published: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (not written into)


@cache
def names() -> tuple[str, ...]:
    """Every recipe, in alphabetical order."""
    return names_in(files(__name__))


def names_in(folder: Any) -> tuple[str, ...]:
    return tuple(sorted(match[1] for file in folder.iterdir() if (match := FILE.fullmatch(file.name))))


def read(name: str) -> Recipe:
    """The file of a recipe, anew, with what it has of published/ in place.

    Raises FileNotFoundError, and ValueError for other keys than it needs, what is not in published/, and no YAML.
    """
    file = files(__name__).joinpath(f"{name}.yaml")
    keys = load(file)
    if (
        not isinstance(keys, dict)
        or not set(NEEDED) <= keys.keys() <= set(Recipe._fields)
        or not isinstance(keys["unlearn"], dict)
    ):
        raise ValueError(f"{file}: needs the keys {', '.join(NEEDED)}, the last a section, got {keys!r}")
    try:
        published = whole(keys.get("published", {}))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for setting, own in published.items():
        if (
            not isinstance(own, dict)
            or not set(SETTINGS) <= own.keys() <= {*SETTINGS, *FURTHER}
            or not all(isinstance(own[key], dict) for key in own.keys() - {"source"})
        ):
            needed = f"published.{setting} needs {' and '.join(SETTINGS)}, the last a section, as {FURTHER[0]} is"
            raise ValueError(f"{file}: {needed}, got {own!r}")
    return Recipe(keys["summary"], keys["source"], keys["unlearn"], published)


def load(file: Any) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None


def whole(published: dict[str, Any]) -> dict[str, Any]:
    """A recipe's own settings, and for SOURCE/PATTERN those of published/SOURCE.yaml that are named like it, in its
    order, the recipe's keys laid on each. Raises ValueError where there is none, or a setting is there twice."""
    folder = files(__name__) / "published"
    told = cache(lambda source: load(folder / f"{source}.yaml"))
    settings: dict[str, Any] = {}
    for key, own in published.items():
        source, slash, pattern = key.partition("/")
        found = {key: own}
        if slash:
            check_known("published", source, names_in(folder))
            found = {name: instead(told(source)[name], own) for name in told(source) if fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(f"published.{key}: {hint(pattern, told(source))}")
        if twice := found.keys() & settings.keys():
            raise ValueError(f"published.{key}: has {', '.join(sorted(twice))} once more")
        settings |= found
    return settings


def instead(told: dict[str, Any], own: Any) -> Any:
    """One of a source's settings, a recipe's own keys laid on each of its sections."""
    if not isinstance(own, dict):
        return own  # which `read` refuses
    laid = {key: told[key] | own[key] for key in own if isinstance(told.get(key), dict) and isinstance(own[key], dict)}
    return told | own | laid


def recipe(name: str) -> dict[str, Any]:
    """Settings of `unlearn` by the name of a recipe, e.g. "cga", "NPO+MRD" or "wga_kl@phi-1.5-forget05"; case does not
    matter.

    Raises ValueError naming the nearest recipes, or the nearest of those for which settings were published.
    """
    chosen, at, setting = name.lower().partition(AT)
    base = chosen.removesuffix(SUFFIX)
    if base not in names():
        suffix = SUFFIX if SUFFIX[0] in chosen else ""  # near names have it where it was asked for
        close = near(chosen, (each + suffix for each in names()))
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unlearn.recipe={name!r}: {meant}needs one of {', '.join(names())}; each also NAME{SUFFIX}")
    file = read(base)
    by_mrd = {"sampling": {"by": "mrd"}} if chosen != base else {}
    if not at:
        return file.unlearn | by_mrd
    if setting not in file.published:
        if setting.endswith(SUFFIX) and setting.removesuffix(SUFFIX) in file.published:
            raise ValueError(f"unlearn.recipe={name!r}: needs {base}{SUFFIX}{AT}{setting.removesuffix(SUFFIX)}")
        what = hint(setting, file.published) if file.published else "has no published settings"
        raise ValueError(f"unlearn.recipe={name!r}: {what}")
    return file.unlearn | by_mrd | file.published[setting]["unlearn"]


def model_of(name: str) -> dict[str, Any]:
    """Settings of `model` that go with `recipe(name)`, e.g. the adapter of "undial@llama-2-7b-lora"; mostly none."""
    recipe(name)  # which tells unknown names
    chosen, at, setting = name.lower().partition(AT)
    return read(chosen.removesuffix(SUFFIX)).published[setting].get("model", {}) if at else {}


def matching(patterns: Iterable[str]) -> list[str]:
    """Recipes by name and, where there is a * in it, all of such names, methods of equal settings once; as written.

    Raises ValueError for a pattern of no recipe.

    >>> matching(["npo+mrd", "sg*"])
    ['npo+mrd', 'sga']
    """
    found: list[str] = []
    for pattern in patterns:
        if "*" not in pattern:
            found.append(pattern)
            continue
        base = pattern.removesuffix(SUFFIX)
        those = [name for name in names() if fnmatchcase(name, base)]
        if not those:
            raise ValueError(f"recipe={pattern!r}: is like none of {', '.join(names())}")
        settings = {name: read(name).unlearn for name in those}
        first = [name for i, name in enumerate(those) if settings[name] not in [settings[each] for each in those[:i]]]
        found += [name + pattern[len(base) :] for name in first if name + pattern[len(base) :] not in found]
    return found


def grids() -> tuple[str, ...]:
    """Every grid that pyunlearn has, in alphabetical order."""
    return names_in(files(__name__) / "grids")


def read_grid(name: str) -> str:
    """The file of a grid. Raises ValueError naming the nearest."""
    check_known("grid", name, grids())
    return (files(__name__) / "grids" / f"{name}.yaml").read_text(encoding="utf-8")
