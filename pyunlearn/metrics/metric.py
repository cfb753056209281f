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
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from .._hints import check_known, hint

MATERIALS = ("item", "answer", "paraphrase", "wrong", "written")
READ = ("answer", "paraphrase", "wrong")
ALWAYS = ("tokenizer", "texts", "examination")  # tools that no one has to bring
F = TypeVar("F", bound=Callable[..., Any])


Together = Callable[[Mapping[str, Any]], str | None]


class Domain(NamedTuple):
    """What an option may be, as it is told and as it is checked. names: where it is one of them."""

    text: str
    holds: Callable[[Any], bool]
    names: tuple[Any, ...] = ()

    def needs(self, value: Any) -> str:
        return hint(value, self.names) if self.names else f"needs {self.text}"


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


KINDS = {
    bool: Domain("true or false", lambda value: isinstance(value, bool)),
    int: Domain("a whole number", is_whole),
    float: Domain("a finite number", is_number),
    str: Domain("a text", lambda value: isinstance(value, str)),
    type(None): Domain("None", lambda value: value is None),
}
# Annotations of options, for ranges.
Share = Annotated[float, Domain("a share, above 0 and 1 at most", lambda value: is_number(value) and 0 < value <= 1)]
Part = Annotated[float, Domain("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)]
NonNegative = Annotated[float, Domain("a finite number >= 0", lambda value: is_number(value) and value >= 0)]
Count = Annotated[int, Domain("a whole number >= 1", lambda value: is_whole(value) and value >= 1)]
Several = Annotated[int, Domain("a whole number >= 2", lambda value: is_whole(value) and value >= 2)]


def domains_of(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> dict[str, Domain]:
    """Of those parameters whose annotation says what they may be."""
    found: dict[str, Domain] = {}
    for each in parameters:
        annotation = each.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, getattr(function, "__globals__", {}))
            except (NameError, AttributeError, TypeError, SyntaxError):  # of type checkers alone
                continue
        if (domain := domain_of(annotation)) is not None:
            found[each.name] = domain
    return found


def domain_of(annotation: Any) -> Domain | None:
    if own := next((extra for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, Domain)), None):
        return own
    if get_origin(annotation) is Literal:
        names = get_args(annotation)
        return Domain("", lambda value: value in names, names)
    if get_origin(annotation) in (Union, UnionType):
        parts = [domain_of(part) for part in get_args(annotation)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return Domain(" or ".join(part.text for part in known), lambda value: any(part.holds(value) for part in known))
    return KINDS.get(annotation) if isinstance(annotation, type) else None


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
    keyword -> default; outputs: of `token_stats`, beside logp and greedy, that its readings have to hold; domains: of
    options, what they may be, as they are annotated; together: what is wrong with values beside each other, or None."""

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...]
    tools: tuple[str, ...]
    optional_tools: tuple[str, ...]
    options: Mapping[str, Any]
    outputs: tuple[str, ...] = ()
    batched: bool = False
    domains: Mapping[str, Domain] = field(default_factory=dict)
    together: Together | None = None

    @property
    def required_tools(self) -> tuple[str, ...]:
        """Those that someone has to bring."""
        return tuple(name for name in self.tools if name not in (*self.optional_tools, *ALWAYS))

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").split("\n\n")[0].split())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for an option that it does not have, a value that it cannot be, or values that do not go
        together."""
        for name, value in options.items():
            check_known(f"option of {self.name}", name, list(self.options))
            if (domain := self.domains.get(name)) is not None and not domain.holds(value):
                raise ValueError(f"option of {self.name}: {name}={value!r}: {domain.needs(value)}")
        if self.together is not None and (wrong := self.together({**self.options, **options})):
            raise ValueError(f"option of {self.name}: {wrong}")


METRICS: dict[str, Metric] = {}


def metric(
    name: str | None = None,
    *,
    outputs: tuple[str, ...] = (),
    batched: bool = False,
    together: Together | None = None,
) -> Callable[[F], F]:
    """Registers a function as the metric of its own name, or of `name`. Raises ValueError for one that is taken.

    Values of options are held to their annotations: bool, int, float, str, a Literal, each or None; Annotated with a
    `Domain`, what that says; of any other annotation, or none, anything.
    """

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
            domains=domains_of(function, [each for each in parameters if each.kind is each.KEYWORD_ONLY]),
            together=together,
        )
        return function

    return register


def check_tools(tools: Iterable[str]) -> None:
    """Raises ValueError for a tool that no metric has."""
    known = dict.fromkeys([*(tool for each in METRICS.values() for tool in each.tools), *ALWAYS])
    for name in tools:
        check_known("tools", name, known)


def get_metric(name: str) -> Metric:
    """Raises ValueError that names the nearest known ones."""
    check_known("metric", name, list(METRICS))
    return METRICS[name]
