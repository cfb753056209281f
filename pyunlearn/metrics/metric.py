"""What a metric is: a function of what a model makes of one sample, registered by its name.

Its positional parameters name what it needs, and it is given nothing else:

    item        the question, its answer and what else the row holds (`pyunlearn.data.QA`)
    answer      the `Reading` of the true answer
    paraphrase  that of the paraphrased answer; of the answer itself where a row has no paraphrase, as in TOFU's
                real_authors and world_facts
    wrong       those of the perturbed answers, a tuple
    written     what the model writes when it is asked, greedily, as stripped text

Any other one is a tool (an embedding model, a judge, ...), which the caller has to bring; but for `examination`, the
`Examination` at work, which is there for metrics that need the model itself. Keyword-only ones are options, where
sources disagree. A metric returns a float, or None for a sample that has no value.

    @metric()
    def surprise(answer: Reading) -> float:
        return float(answer.nll) / answer.num_tokens

One that works on all samples at once, as models do, is `batched`: it gets a list for each thing but its tools, and
returns a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .._hints import check_known

MATERIALS = ("item", "answer", "paraphrase", "wrong", "written")
READ = ("answer", "paraphrase", "wrong")
F = TypeVar("F", bound=Callable[..., Any])


class CannotMeasure(ValueError):
    """A metric that this model, or what was given beside it, does not allow: a tool is missing, a layer has no rule."""


@dataclass(frozen=True)
class Metric:
    """See the module. needs: of MATERIALS; tools: other positional parameters; options: keyword -> default; outputs: of
    `token_stats`, beside logp and greedy, that its readings have to hold."""

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    tools: tuple[str, ...]
    options: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    batched: bool = False

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").split("\n\n")[0].split())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for an option that it does not have."""
        for name in options:
            check_known(f"option of {self.name}", name, list(self.options))


METRICS: dict[str, Metric] = {}


def metric(name: str | None = None, *, outputs: tuple[str, ...] = (), batched: bool = False) -> Callable[[F], F]:
    """Registers a function as the metric of its own name, or of `name`. Raises ValueError for one that is taken."""

    def register(function: F) -> F:
        known = name or function.__name__
        if known in METRICS:
            raise ValueError(f"metric {known!r} is there already, of {METRICS[known].function.__module__}")
        parameters = inspect.signature(function).parameters.values()
        positional = [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]
        METRICS[known] = Metric(
            known,
            function,
            needs=tuple(each for each in positional if each in MATERIALS),
            tools=tuple(each for each in positional if each not in MATERIALS),
            options={each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY},
            outputs=outputs,
            batched=batched,
        )
        return function

    return register


def get_metric(name: str) -> Metric:
    """Raises ValueError that names the nearest known ones."""
    check_known("metric", name, list(METRICS))
    return METRICS[name]
