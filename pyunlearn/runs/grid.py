"""A grid of runs: what all of them share, and axes of settings of which every combination is one, with every seed.

    name: mine                            # of the folder, runs/mine
    run:                                  # a run's configuration, as far as all are alike
      model: {name_or_path: MODEL}
      data: {forget: forget.jsonl, retain: retain.jsonl}
    axes:                                 # by keys as of --set; a list has the values of an axis
      unlearn.recipe: [npo_kl, "wga*"]
      unlearn.learning_rate: [1.0e-5, 5.0e-5]
    seeds: 3                              # so many, from 0 on, or a list of them

`axes` may be a list of such sections, whose combinations come one after the other. A recipe with a * stands for all of
such names. A setting that is a list itself needs brackets of its own, [[gd, kl]].
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .._hints import hint
from ..recipes import matching, read_grid
from ..store import digest_json
from .config import ConfigError, RunConfig
from .fits import check_fits
from .folder import compared
from .overrides import UNREADABLE, check_order, load_config, put
from .request import KEYS, check_whole, check_words

GRID = "grid:"
RECIPE = "unlearn.recipe"
OWN = {"name": "name, beside run", "output": "--out", "seed": "seeds"}  # what a grid has in the place of a run's
LONGEST = 200  # bytes of a run's name: file systems have 255
TOLD = 5  # problems of a grid that are told at once
MANY = 1000  # more seeds than these are one that was meant by its name


@dataclass(frozen=True)
class Grid:
    """A file. axes: sections, each key -> one value, or the list of an axis."""

    name: str
    axes: list[dict[str, Any]]
    run: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    summary: str = ""
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One run. name: what it is in its grid, the same for all seeds."""

    name: str
    config: RunConfig

    @property
    def seed(self) -> int:
        return self.config.seed

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def load_grid(source: str) -> Grid:
    """A grid from a YAML file, or grid:NAME of those that pyunlearn has.

    Raises FileNotFoundError for no file, ConfigError that names what is wrong in it.
    """
    if source.startswith(GRID):
        text, stem = read_grid(source.removeprefix(GRID)), source.removeprefix(GRID)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file; needs a grid, a YAML file with axes, or {GRID}NAME")
        text, stem = path.read_text(encoding="utf-8", errors="replace"), path.stem
    try:
        values = yaml.safe_load(text)
    except UNREADABLE as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    return make_grid(values, source, stem)


def make_grid(values: Any, source: str = "grid", name: str = "sweep") -> Grid:
    """source: what errors call it. name: of a grid that has none. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: needs sections run, axes and seeds, got {type(values).__name__}")
    for key in values:
        if key not in Grid.__dataclass_fields__:
            meant = f"; did you mean axes: {{{key}: ...}}?" if "." in str(key) else ""
            raise ConfigError(f"{source}: {key}: unknown key; {hint(key, Grid.__dataclass_fields__)}{meant}")
    run = values.get("run") or {}
    if not isinstance(run, Mapping):
        raise ConfigError(f"{source}: run: needs sections of a run's configuration, got {run!r}")
    for key, place in OWN.items():
        if key in run:
            raise ConfigError(f"{source}: run.{key}: is told by {place}, for all runs of the grid")
    name = str(name if values.get("name") is None else values["name"])
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ConfigError(f"{source}: name: needs letters, digits, _, - and, but first, . alone, got {name!r}")
    return Grid(
        name,
        as_axes(values.get("axes"), source),
        dict(run),
        as_seeds(values.get("seeds", 1), source),
        str(values.get("summary", "")),
        str(values.get("source", "")),
    )


def as_axes(axes: Any, source: str) -> list[dict[str, Any]]:
    sections = [axes] if isinstance(axes, Mapping) else axes
    if not isinstance(sections, list) or not sections or not all(isinstance(one, Mapping) and one for one in sections):
        needed = "needs keys of settings with lists of values, or a list of these"
        raise ConfigError(f"{source}: axes: {needed}, got {axes!r}")
    for section in sections:
        for key, value in section.items():
            if not all(part.strip() for part in str(key).split(".")) or "=" in str(key):
                raise ConfigError(f"{source}: axes: {str(key)!r}: needs a setting's key, e.g. unlearn.learning_rate")
            if value == []:
                raise ConfigError(f"{source}: axes: {key}: has no value; a setting that is an empty list is [[]]")
            if str(key).partition(".")[0] in OWN:
                raise ConfigError(f"{source}: axes: {key}: is told by {OWN[str(key).partition('.')[0]]}")
    return [{str(key): value for key, value in section.items()} for section in sections]


def as_seeds(seeds: Any, source: str) -> list[int]:
    if isinstance(seeds, int) and seeds > MANY:
        raise ConfigError(f"{source}: seeds: needs how many, {MANY} at most, got {seeds}; that seed alone is [{seeds}]")
    listed = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
    whole = isinstance(listed, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in listed)
    if not whole or not listed or len(set(listed)) < len(listed):
        raise ConfigError(f"{source}: seeds: needs how many, 1 at least, or a list without any twice, got {seeds!r}")
    return listed


def make_cells(
    grid: Grid, out: str | Path, overrides: Sequence[str] = (), words: Mapping[str, str | None] | None = None
) -> list[Cell]:
    """Every run of the grid, its configuration checked and that all it names is there (`fits`), in folders below `out`;
    seed after seed of each.

    overrides: key=value, of all runs. words: of `request.KEYS`, the model and files of all runs.
    Raises ConfigError with the first problems, each with its run, and for two runs that are the same.
    """
    base, given = copy.deepcopy(grid.run), {name: value for name, value in (words or {}).items() if value is not None}
    check_words(given, overrides)
    check_order(overrides)
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in OWN:
            raise ConfigError(f"--set {override}: is told by {OWN[key]}, for all runs of the grid")
    if not base.get("model") and not base.get("data"):
        check_whole(given, overrides, "sweep GRID")
    for name, value in given.items():
        put(base, KEYS[name].split("."), value, f"--{name}={value}")
    cells: list[Cell] = []
    problems: dict[str, list[str]] = {}  # what is wrong -> in which runs
    for axes in grid.axes:
        for key in axes:
            if twice := [override for override in overrides if override.partition("=")[0].strip() == key]:
                raise ConfigError(f"--set {twice[0]}: {key} is an axis of the grid; change it there")
        for name, settings in combinations(axes, grid.name):
            for seed in grid.seeds:
                own = {"name": name, "seed": seed, "output": str(Path(out) / "runs" / name / f"seed{seed}")}
                asked = [f"{key}={as_yaml(value)}" for key, value in settings.items()]
                try:
                    cells.append(Cell(name, load_config(None, [*overrides, *asked], given=own, under=base)))
                    check_fits(cells[-1].config)
                except (ValueError, OSError, ImportError) as error:
                    text = str(error)
                    for key, override in zip(settings, asked, strict=True):  # which nobody has typed
                        text = text.replace(f"--set {override!r}", f"axes: {key}")
                    for problem in text.splitlines():
                        problems.setdefault(problem, []).append(f"{name}, seed {seed}")
    if problems:
        others = {what: f" and {len(runs) - 1} more" if runs[1:] else "" for what, runs in problems.items()}
        told = [f"{runs[0]}{others[what]}: {what}" for what, runs in problems.items()]
        more = [f"... and {len(told) - TOLD} more"] if len(told) > TOLD else []
        raise ConfigError("\n".join([*told[:TOLD], *more]))
    check_different(cells)
    return cells


def combinations(axes: Mapping[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each; name: of one in which nothing is told apart."""
    listed = {key: value if isinstance(value, list) else [value] for key, value in axes.items()}
    if RECIPE in listed:
        try:
            listed[RECIPE] = matching([str(each).lower() for each in listed[RECIPE]])
        except ValueError as error:
            raise ConfigError(f"axes: {RECIPE}: {error}") from None
    told = [key for key in axes if isinstance(axes[key], list) or key == RECIPE]
    lasts = [key.rpartition(".")[2] for key in told]
    for values in itertools.product(*listed.values()):
        settings = dict(zip(listed, values, strict=True))
        parts = []
        for key, last in zip(told, lasts, strict=True):
            called = "" if key == RECIPE else key if lasts.count(last) > 1 else last
            parts.append(f"{called}-{as_text(settings[key])}" if called else as_text(settings[key]))
        yield folder_name("-".join(parts), settings) or name, settings


def folder_name(text: str, settings: Mapping[str, Any]) -> str:
    """What a file system takes; of a long one the beginning, and a digest that tells it from others."""
    name = re.sub(r"[^\w.-]+", "_", text).strip("_")
    if len(name.encode()) <= LONGEST:
        return name
    digest = digest_json({key: as_text(value) for key, value in settings.items()})[:8]
    return f"{name.encode()[: LONGEST - 9].decode(errors='ignore')}-{digest}"


def as_text(value: Any) -> str:
    """In a run's name."""
    if isinstance(value, list):
        return "-".join(map(as_text, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_yaml(value: Any) -> str:
    """On one line, as the value of an override."""
    return yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]


def check_different(cells: Sequence[Cell]) -> None:
    """Raises ConfigError for two runs of one name, or of the same settings under two names."""
    places: dict[Path, Cell] = {}
    kinds: dict[str, Cell] = {}
    for cell in cells:
        settings = compared(cell.config.to_dict()) | {"name": ""}
        kind = json.dumps(settings, sort_keys=True)
        for other in (places.get(cell.config.folder), kinds.get(kind)):
            if other is not None:
                what = "are the same run" if other is kinds.get(kind) else "have one name"
                raise ConfigError(f"axes: {other} and {cell} {what}; leave one out")
        places[cell.config.folder] = kinds[kind] = cell
