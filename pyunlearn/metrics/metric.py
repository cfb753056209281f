"""What a metric is: a function of what a model makes of one sample, registered by its name.

Its positional parameters name what it needs, and it is given nothing else:

    item        the question, its answer and what else the row holds (`pyunlearn.data.QA`)
    answer      the `Reading` of the true answer
    paraphrase  that of the paraphrased answer; of the answer itself where a row has no paraphrase, as in TOFU's
                real_authors and world_facts
    wrong       those of the perturbed answers, a tuple
    written     what the model writes when it is asked, greedily, as stripped text

Any other one is a tool (an embedding model, a judge, ...), which the caller has to bring unless it has a default.
Always there are the `tokenizer`, `texts`, those of all items, also of the ones that were not asked, and `examination`,
the `Examination` at work, for metrics that need the model itself. Keyword-only ones are options, where sources
disagree. A metric returns a float, None for a sample that has no value, or `Told`, which holds more for the sample's
record.

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
ALWAYS = ("tokenizer", "texts", "examination")  # tools that no one has to bring
F = TypeVar("F", bound=Callable[..., Any])


class CannotMeasure(ValueError):
    """A metric that this model, or what was given beside it, does not allow: a tool is missing, a layer has no rule."""


@dataclass(frozen=True)
class Told:
    """The value of a metric, None where there is none, and what else the sample's record holds, by its key."""

    value: float | None
    more: Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """See the module. needs: of MATERIALS; tools: other positional parameters, and those that may be left out; options:
    keyword -> default; outputs: of `token_stats`, beside logp and greedy, that its readings have to hold."""

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    tools: tuple[str, ...]
    optional_tools: tuple[str, ...]
    options: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    batched: bool = False

    @property
    def required_tools(self) -> tuple[str, ...]:
        """Those that someone has to bring."""
        return tuple(name for name in self.tools if name not in (*self.optional_tools, *ALWAYS))

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
        positional = {each.name: each.default for each in parameters if each.kind is not each.KEYWORD_ONLY}
        tools = {each: default for each, default in positional.items() if each not in MATERIALS}
        METRICS[known] = Metric(
            known,
            function,
            needs=tuple(each for each in positional if each in MATERIALS),
            tools=tuple(tools),
            optional_tools=tuple(each for each, default in tools.items() if default is not inspect.Parameter.empty),
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
