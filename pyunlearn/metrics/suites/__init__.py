"""Suites: the numbers that a paper's table, or a benchmark, has of one model, each a line: a metric on a set.

A `Measure` is a metric of samples and how they become one number; an `Aggregate` is made of other numbers, and of the
logs of reference models. Names are those of OpenUnlearning's logs where it has them.

The sets of `tofu` are forget, retain, real_authors, world_facts, and holdout for attacks (questions of the forget set's
kind that no model has seen); "forget:paraphrased" is a set with its paraphrased questions. Those of `benchmarks` are
what `pyunlearn.data.benchmarks` reads, and text, a text of its own. A line whose tool, metric or optional set is not
there has no value, and says why.
"""

from ..._hints import check_known
from .benchmarks import BENCHMARK_SUITES
from .parts import PAIRED, Aggregate, Form, Logs, Measure, Outcome, Suite, Unavailable
from .tofu import TOFU_SUITES

__all__ = [
    "PAIRED",
    "SUITES",
    "Aggregate",
    "Form",
    "Logs",
    "Measure",
    "Outcome",
    "Suite",
    "Unavailable",
    "get_suite",
]

SUITES: dict[str, Suite] = {suite.name: suite for suite in (*TOFU_SUITES, *BENCHMARK_SUITES)}


def get_suite(name: str) -> Suite:
    """Raises ValueError that names the nearest known ones."""
    check_known("suite", name, list(SUITES))
    return SUITES[name]
