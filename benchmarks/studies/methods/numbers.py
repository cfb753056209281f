"""From a sweep's folders to numbers: of each model and seed, then over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from pyunlearn._files import read_json
from pyunlearn.metrics import Interval
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.data import load_data
from pyunlearn.runs.evaluate import read_records
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.grid import Cell as Run

from ..closer_look.cells import Cell
from ..closer_look.numbers import LEVEL, World

BEFORE, RETRAINED, UWC, CRU = "before", "retrained", " + UWC", " + CRU"
# As the tutorial's table has them: what nothing keeps in place, and what CRU of that is held against.
GROUPS = {
    "npo-retain-none": ("npo", "npo_gd", "flat", "tnpo", "wtnpo", "altpo"),
    "ga": ("ga_kl", *(f"ga_kl-coefficient-{share}" for share in (1.0, 10.0, 20.0)), "wga", "satimp"),
}
FEWEST = 3  # models that a correlation needs
SETS = ("forget", "retain", "holdout")
REMEDY = "delete it, and the same command makes it again"
SHOWN = 2  # questions whose answers are kept


@dataclass(frozen=True)
class Study:
    """runs: of every method, by its name, one a seed. worlds: one a seed, of `closer_look`. refused: of every method,
    the share of held-out questions that it answers by one of the refusals, word for word, one a seed. mixed: of those
    that UWC calibrates, how much of the unlearning it keeps (a), one a seed. layered: of those that CRU does, which
    layers of how many. reliability: Pearson's r and its interval, as `pyunlearn reliability` writes them."""

    runs: dict[str, list[RunConfig]]
    worlds: list[World]
    refused: dict[str, list[float]]
    mixed: dict[str, list[float]] = field(default_factory=dict)
    layered: dict[str, list[str]] = field(default_factory=dict)
    reliability: list[dict[str, Any]] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        return list(self.runs)

    @property
    def models(self) -> list[str]:
        calibrated = [name + UWC for name in self.changed] + [name + CRU for name in self.layered]
        return [BEFORE, RETRAINED, *self.methods, *calibrated]

    @property
    def changed(self) -> list[str]:
        """The methods that calibration changes, of some seed."""
        return [name for name, own in self.mixed.items() if min(own) < 1]

    @property
    def config(self) -> RunConfig:
        return self.runs[self.methods[0]][0]

    def over_seeds(self, own: Sequence[Interval | float]) -> Interval:
        """Of one number a seed: the mean and its 95 % interval over seeds (Student's t); of one seed its own interval,
        over samples, where it has one."""
        values = [each.mean if isinstance(each, Interval) else each for each in own]
        if len(own) == 1:
            return own[0] if isinstance(own[0], Interval) else Interval(own[0], None, None, 1)
        half = student.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        mean = statistics.fmean(values)
        return Interval(mean, mean - float(half), mean + float(half), len(values))


@dataclass(frozen=True)
class Number:
    """better: +1 where higher is, -1 where lower is."""

    name: str
    better: int
    of: Callable[[World, str], Interval | float]

    def value(self, world: World, model: str) -> float:
        found = self.of(world, model)
        return found.mean if isinstance(found, Interval) else found

    def get(self, study: Study, model: str) -> Interval:
        return study.over_seeds([self.of(world, model) for world in study.worlds])

    def order(self, study: Study, methods: Sequence[str]) -> list[str]:
        """The best first."""
        return sorted(methods, key=lambda method: -self.better * self.get(study, method).mean)


def mean_of(name: str, metric: str) -> Callable[[World, str], Interval]:
    return lambda world, model: world.mean(model, name, metric)


def average(world: World, model: str) -> float:
    return (world.efficacy(model).mean + world.utility(model).mean) / 2


NUMBERS = (
    Number("forget probability", -1, mean_of("forget", "probability")),
    Number("forget ROUGE-L", -1, mean_of("forget", "rouge_l")),
    Number("forget extraction strength", -1, mean_of("forget", "extraction_strength")),
    Number("forget paraphrase probability", -1, mean_of("forget", "paraphrase_probability")),
    Number("forget fluency", 1, mean_of("forget", "fluency")),
    Number("forget quality, ln p", 1, World.quality),
    Number("held-out probability", 1, mean_of("holdout", "probability")),
    Number("held-out ROUGE-L", 1, mean_of("holdout", "rouge_l")),
    Number("held-out extraction strength", 1, mean_of("holdout", "extraction_strength")),
    Number("retain probability", 1, mean_of("retain", "probability")),
    Number("forget efficacy", 1, lambda world, model: world.efficacy(model)),
    Number("model utility", 1, lambda world, model: world.utility(model)),
    Number("mean of both", 1, average),
)
BY_NAME = {number.name: number for number in NUMBERS}


def read_study(
    cells: Sequence[Run], mixed: Sequence[Run] = (), layered: Sequence[Run] = (), reliability: Path | None = None
) -> Study:
    """Of finished runs, of what UWC and CRU made of some of them, and of a folder of `pyunlearn reliability`.

    Raises what `read_records` and `load_data` raise.
    """
    runs: dict[str, list[RunConfig]] = {}
    for cell in cells:
        runs.setdefault(cell.name, []).append(cell.config)
    refused: dict[str, list[float]] = {}
    worlds = []
    shares = by_name(mixed, lambda run: told_of(run, "uwc")["a"])
    chosen = by_name(layered, layers_of)
    chosen = {name: own for name, own in chosen.items() if len(own) == len(runs[name])}  # of every seed
    for place, first in enumerate(next(iter(runs.values()))):
        own = {BEFORE: read_cell(first, "before"), RETRAINED: read_cell(first, "retrained")}
        own |= {name: read_cell(configs[place], "after") for name, configs in runs.items()}
        own |= {name + UWC: read_cell(runs[name][place], "after", "uwc") for name in shares}
        own |= {name + CRU: read_cell(runs[name][place], "after", "cru") for name in chosen}
        known = {name: RunFolder(configs[place].folder) for name, configs in runs.items()}
        refusals = set().union(*(load_data(configs[place]).refusals for configs in runs.values()))
        for name, folder in known.items():
            written = [row["generated"] for row in read_records(folder, "after", ["holdout"])["holdout"]]
            refused.setdefault(name, []).append(statistics.fmean(text in refusals for text in written))
        asked = [row["question"] for row in read_records(known[next(iter(known))], "before", ["forget"])["forget"]]
        worlds.append(World(first.name, {name: [cell] for name, cell in own.items()}, asked[:SHOWN]))
    file = None if reliability is None else reliability / "reliability.json"
    correlations = read_json(file, REMEDY)["correlations"] if file is not None and file.is_file() else []
    return Study(runs, worlds, refused, shares, chosen, correlations)


def by_name(cells: Sequence[Run], of: Callable[[Run], Any]) -> dict[str, list[Any]]:
    """One a seed."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        found.setdefault(cell.name, []).append(of(cell))
    return found


def layers_of(run: Run) -> str:
    own = told_of(run, "cru")
    return f"{own['k']} of {own['of']} ({', '.join(own['chosen'])})"


def told_of(run: Run, method: str) -> dict[str, Any]:
    return dict(read_json(run.config.folder / method / f"{method}.json", REMEDY))


def read_cell(config: RunConfig, moment: str, calibration: str = "") -> Cell:
    records = read_records(RunFolder(config.folder / calibration), moment, SETS)
    values: dict[str, dict[str, list[Any]]] = {
        name: {metric: [row.get(metric) for row in rows] for metric in config.evaluate.metrics}
        for name, rows in records.items()
    }
    return Cell(values, [row["generated"] for row in records["forget"][:SHOWN]], {})


def as_dict(study: Study) -> dict[str, Any]:
    """All numbers, as JSON: over the seeds, and of each."""

    def told(number: Number, model: str) -> dict[str, Any]:
        found = number.get(study, model)
        values = [number.value(world, model) for world in study.worlds]
        return {"mean": found.mean, "low": found.low, "high": found.high, "seeds": values}

    return {
        "numbers": {model: {each.name: told(each, model) for each in NUMBERS} for model in study.models},
        "held-out questions refused": study.refused,
        "a of UWC": study.mixed,
        "components of CRU": study.layered,
        "reliability": study.reliability,
        "said": {model: [world.cells[model][0].said for world in study.worlds] for model in study.models},
    }
