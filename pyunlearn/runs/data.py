"""What a job reads: the sets to forget and to retain, rows of the latter held out, and what else is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data import (
    QA,
    USUAL_REFUSALS,
    Prompt,
    check_disjoint,
    generate_authors,
    hold_out,
    load_qa,
    load_refusals,
    load_text,
)
from ..data.qa import read_qa, told_repeats
from ..metrics import get_suite
from ..model.load import EMBEDDED
from ..training.rows import UnlearnData
from .config import RunConfig
from .files_config import BENCHMARKS, FilesConfig, SuiteConfig
from .sections import DataConfig, SourceConfig

logger = logging.getLogger("pyunlearn")


@dataclass(frozen=True)
class RunData(UnlearnData):
    """Questions and answers of a job; `texts` trains the embedded tokenizer, `sets` are evaluated and nothing else.
    recognised: of a source, by its path, what its columns are where they have not their own names."""

    texts: list[str]
    sets: dict[str, list[QA]] = field(default_factory=dict, kw_only=True)
    recognised: dict[str, str] = field(default_factory=dict, kw_only=True)

    def evaluated(self, retain_limit: int | None) -> dict[str, list[QA]]:
        """Every set to evaluate, by name; retain_limit: of the retain rows, and of those held out."""
        rows = {"forget": self.forget, "retain": self.retain[:retain_limit], "holdout": self.holdout[:retain_limit]}
        return {name: items for name, items in {**rows, **self.sets}.items() if items}


def load_data(config: RunConfig | FilesConfig) -> RunData:
    """Raises what `load_qa`, `load_refusals` and `hold_out` raise, ValueError where forget and retain overlap, and as
    `check_questions`."""
    data, recognised = config.data, {}

    def load(source: SourceConfig) -> list[QA]:
        options = source.model_dump()
        items, found = read_qa(options.pop("path"), **options)
        if repeats := told_repeats(items):
            logger.warning("%s: %s", source.path, repeats)
        if found:
            recognised[source.path] = found
        return items

    if isinstance(config, SuiteConfig):
        sets = load_sets(config)
        texts = texts_of([item for items in sets.values() for item in items])
        return RunData(sets.get("forget", []), [], [], texts, sets=sets)
    if data is None:
        return RunData([], [], [], [])
    if not isinstance(data, DataConfig):
        items = load(data)
        check_questions({"--data": items}, config.prompt, "--prompt plain")
        return RunData(items, [], [], texts_of(items), recognised=recognised)
    if data.source == EMBEDDED:
        world = generate_authors(
            data.num_authors, data.questions_per_author, config.seed, data.forget_fraction, data.num_unknown
        )
        read = RunData(world.forget, world.retain, list(world.refusals), world.texts, unknown=list(world.unknown))
    else:
        forget, retain = ([] if source is None else load(source) for source in (data.forget, data.retain))
        refusals = [] if data.refusals is None else load_refusals(data.refusals)
        if data.refusals is None and isinstance(config, RunConfig) and config.needs_refusals:
            refusals = list(USUAL_REFUSALS)
            recognised["refusals"] = f"{len(refusals)} that pyunlearn has, as no file of them is named"
        read = RunData(forget, retain, refusals, texts_of(forget + retain) + refusals)
    sources = {"data.forget": data.forget, "data.retain": data.retain}
    names = [name if source is None else f"{name}={source.path}" for name, source in sources.items()]
    check_disjoint(read.forget, read.retain, (names[0], names[1]))
    try:
        retain, held_out = hold_out(read.retain, data.holdout, config.seed) if read.retain else ([], [])
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    more = {name: load(source) for name, source in config.evaluate.sets.items()}
    named = {"data.forget": read.forget, "data.retain": read.retain}
    named |= {f"evaluate.sets.{name}": items for name, items in more.items()}
    check_questions(named, config.prompt, "--set data.prompt=plain")
    return replace(read, retain=retain, holdout=held_out, sets=more, recognised=recognised)


def check_questions(sets: Mapping[str, Sequence[QA]], prompt: Prompt, remedy: str) -> None:
    """Raises ValueError for texts without questions in a prompt that asks one."""
    for name, items in sets.items():
        if not prompt.plain and any(not item.question for item in items):
            raise ValueError(
                f"{name}: has texts without questions, and prompt={prompt.name} asks one; {remedy} takes each text as "
                "it stands, every token supervised"
            )


PERTURBED = ("retain", "real_authors", "world_facts")  # in TOFU's {name}_perturbed, beside the forget set


def load_sets(config: SuiteConfig) -> dict[str, list[QA]]:
    """The suite's sets; of TOFU's, holdout where there is one: holdout10 for forget10, no model has seen it.

    Raises what `load_qa` and the benchmark's reader raise, for a file that is missing with its name; ValueError for a
    file in the place of TOFU's folder.
    """
    data, suite = config.data, get_suite(config.suite)
    if data is None:
        return {} if config.text is None else {"text": load_text(config.text)}
    if suite.name in BENCHMARKS:
        sets = BENCHMARKS[suite.name](data.path, data.limit)
    else:
        names = {"forget": f"{config.split}_perturbed"}
        names |= {name: f"{name}_perturbed" for name in PERTURBED if name in suite.sets}
        if Path(data.path).is_file():
            raise ValueError(
                f"--data={data.path}: is a file; needs the folder that holds "
                f"{', '.join(f'{name}.jsonl' for name in names.values())}"
            )
        held_out, folder = config.split.replace("forget", "holdout"), Path(data.path)
        if not folder.exists() or (folder / f"{held_out}.jsonl").is_file():
            names["holdout"] = held_out
        sets = {name: load_qa(data.path, name=file, limit=data.limit) for name, file in names.items()}
    return sets if config.text is None else sets | {"text": load_text(config.text)}


def texts_of(items: list[QA]) -> list[str]:
    return [f"Question: {item.question}\nAnswer: {item.answer}" if item.question else item.answer for item in items]
