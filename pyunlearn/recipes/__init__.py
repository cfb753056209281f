"""Unlearning methods by the names papers give them: a file NAME.yaml each, with a summary, its source, and settings of
`unlearn` in the words of a run's configuration, which are laid under what the user sets.

Any of them, followed by +mrd, draws its forget samples by Memory Removal Difficulty (arXiv:2504.06658, Section 3.4).
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

from .._hints import hint

SUFFIX = "+mrd"
FILE = re.compile(r"([a-z0-9][a-z0-9_.-]*)\.yaml")


class Recipe(NamedTuple):
    """One file."""

    summary: str
    source: str
    unlearn: dict[str, Any]


@cache
def names() -> tuple[str, ...]:
    """Every recipe, in alphabetical order."""
    return tuple(sorted(match[1] for file in files(__name__).iterdir() if (match := FILE.fullmatch(file.name))))


def read(name: str) -> Recipe:
    """The file of a recipe, anew. Raises FileNotFoundError, and ValueError for other keys than it needs, or no YAML."""
    file = files(__name__).joinpath(f"{name}.yaml")
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(keys, dict) or keys.keys() != set(Recipe._fields) or not isinstance(keys["unlearn"], dict):
        raise ValueError(f"{file}: needs the keys {', '.join(Recipe._fields)}, the last a section, got {keys!r}")
    return Recipe(**keys)


def recipe(name: str) -> dict[str, Any]:
    """Settings of `unlearn` by the name of a recipe, e.g. "cga" or "NPO+MRD"; case does not matter.

    Raises ValueError naming the nearest recipes.
    """
    base = name.lower().removesuffix(SUFFIX)
    if base not in names():
        known = [*names(), *(each + SUFFIX for each in names())]
        raise ValueError(f"unlearn.recipe={name!r}: {hint(name, known)}")
    settings = read(base).unlearn
    return settings | {"sampling": {"by": "mrd"}} if name.lower().endswith(SUFFIX) else settings
