"""From cells to numbers: means over samples with intervals, and the single numbers that papers rank methods by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyunlearn.metrics import Interval, forget_quality, harmonic_mean, mean_interval
from pyunlearn.metrics.utility import closer_to_1_worse, memorization, true_better

from .cells import METHODS, MODELS, Cell

RESAMPLES = 1999
LEVEL = 0.95
EFFICACY = ("probability", "rouge_l", "truth_ratio", "cosine_similarity")  # of forget efficacy, those measured here
UTILITY = (*EFFICACY, "token_entropy")
KEPT = ("retain", "holdout")  # sets that model utility is of
Values = list[float]


@dataclass(frozen=True)
class World:
    """What was measured on one base: by model the cells, one a seed. asked: the questions whose answers they keep."""

    name: str
    cells: Mapping[str, Sequence[Cell]]
    asked: Sequence[str]

    @property
    def sets(self) -> list[str]:
        return list(self.cells["before"][0].values)

    @property
    def metrics(self) -> list[str]:
        return list(self.cells["before"][0].values["forget"])

    def values(self, model: str, name: str, metric: str, seed: int | None = None) -> Values:
        """Over all seeds, or of one; a truth ratio as closer-look has it, in [0, 1] (`REDUCTIONS`)."""
        cells = self.cells[model] if seed is None else [self.cells[model][seed]]
        found = [value for cell in cells for value in cell.values[name][metric] if value is not None]
        if metric != "truth_ratio":
            return found
        return [(closer_to_1_worse if name == "forget" else true_better)([value]) for value in found]

    def ratios(self, model: str) -> Values:
        """Truth ratios of the forget set as TOFU has them."""
        return [v for cell in self.cells[model] for v in cell.values["forget"]["truth_ratio"] if v is not None]

    def mean(self, model: str, name: str, metric: str, seed: int | None = None) -> Interval:
        return mean_interval(self.values(model, name, metric, seed), level=LEVEL, num_resamples=RESAMPLES)

    def point(self, model: str, name: str, metric: str) -> float:
        """The mean alone."""
        return statistics.fmean(self.values(model, name, metric))

    # ---- single numbers ----------------------------------------------------------------------------------------------

    def efficacy(self, model: str, seed: int | None = None) -> Interval:
        """1 - mean over EFFICACY on the forget set: a mean over samples, as each has all of them."""
        columns = [self.values(model, "forget", metric, seed) for metric in EFFICACY if metric in self.metrics]
        own = [1 - statistics.fmean(row) for row in zip(*columns, strict=True)]
        return mean_interval(own, level=LEVEL, num_resamples=RESAMPLES)

    def utility(self, model: str, seed: int | None = None) -> Interval:
        """Harmonic mean over UTILITY on KEPT; its interval by percentiles, each set's samples drawn anew together."""
        tables = [
            np.array([self.values(model, name, metric, seed) for metric in UTILITY if metric in self.metrics])
            for name in KEPT
        ]
        rng = np.random.default_rng(0)
        counts = [table.shape[1] for table in tables]
        rows = [rng.integers(0, count, (RESAMPLES, count)) for count in counts]
        means = np.concatenate([table[:, own].mean(2) for table, own in zip(tables, rows, strict=True)])
        drawn = [harmonic_mean(column) for column in means.T.tolist()]
        low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        point = harmonic_mean([value for table in tables for value in table.mean(1).tolist()])
        return Interval(point, float(low), float(high), sum(counts))

    def memorised(self, model: str) -> float:
        """Mem: harmonic mean of 1 - extraction strength, exact memorisation, paraphrase probability, truth ratio."""
        names = ("extraction_strength", "memorization_accuracy", "paraphrase_probability")
        strength, accuracy, paraphrase = (self.point(model, "forget", name) for name in names)
        ratios = self.ratios(model)  # p_wrong / p, of which prob_mean is p / (p + p_wrong)
        return memorization(strength, accuracy, paraphrase, statistics.fmean(1 / (1 + ratio) for ratio in ratios))

    def quality(self, model: str) -> float:
        """ln p of forget quality: could its truth ratios be those of the retrained model?"""
        return forget_quality(self.ratios(model), self.ratios("retrained")).ln_p

    def distance(self, model: str) -> float:
        """Mean over the metrics of the forget set of |mean - the retrained model's|."""
        return statistics.fmean(
            abs(self.point(model, "forget", metric) - self.point("retrained", "forget", metric))
            for metric in self.metrics
        )


@dataclass(frozen=True)
class Single:
    """One number a model may be judged by. better: +1 where higher is, -1 where lower is."""

    name: str
    better: int
    of: Callable[[World, str], float]

    def ranks(self, world: World) -> dict[str, int]:
        """Of the methods, 1 the best; equal up to the third digit, equal ranks."""
        values = {name: self.better * round(self.of(world, name), 3) for name in METHODS}
        return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}

    def best(self, world: World) -> str:
        return next(name for name, rank in self.ranks(world).items() if rank == 1)


def mean_of(name: str, metric: str) -> Callable[[World, str], float]:
    return lambda world, model: world.point(model, name, metric)


def average(world: World, model: str) -> float:
    return (world.efficacy(model).mean + world.utility(model).mean) / 2


SINGLES = (
    Single("forget probability", -1, mean_of("forget", "probability")),
    Single("forget ROUGE-L", -1, mean_of("forget", "rouge_l")),
    Single("forget efficacy", 1, lambda world, model: world.efficacy(model).mean),
    Single("Mem", 1, World.memorised),
    Single("forget quality, ln p", 1, World.quality),
    Single("distance to retrained", -1, World.distance),
    Single("forget fluency", 1, mean_of("forget", "fluency")),
    Single("retain probability", 1, mean_of("retain", "probability")),
    Single("held-out probability", 1, mean_of("holdout", "probability")),
    Single("model utility", 1, lambda world, model: world.utility(model).mean),
    Single("mean of efficacy and utility", 1, average),
)
BY_NAME = {single.name: single for single in SINGLES}


def as_dict(world: World) -> dict[str, object]:
    """All numbers of a world, as JSON: means with intervals, and single numbers."""

    def told(interval: Interval) -> dict[str, object]:
        return {"mean": interval.mean, "low": interval.low, "high": interval.high, "samples": interval.num_samples}

    return {
        "means": [
            {"model": model, "set": name, "metric": metric, **told(world.mean(model, name, metric))}
            for model in MODELS
            for name in world.sets
            for metric in world.metrics
        ],
        "singles": {model: {each.name: each.of(world, model) for each in SINGLES} for model in MODELS},
        "efficacy": {model: told(world.efficacy(model)) for model in MODELS},
        "utility": {model: told(world.utility(model)) for model in MODELS},
        "said": {model: world.cells[model][0].said for model in MODELS},
        "seconds": {model: [cell.seconds for cell in world.cells[model]] for model in MODELS},
    }
