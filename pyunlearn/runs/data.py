"""What a job reads: the sets to forget and to retain, rows of the latter held out, and what else is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data import QA, check_disjoint, generate_authors, hold_out, load_qa, load_refusals, load_text
from ..metrics import get_suite
from ..model.load import EMBEDDED
from ..training.unlearn import UnlearnData
from .config import BENCHMARKS, FilesConfig, RunConfig, SuiteConfig
from .sections import DataConfig, SourceConfig


@dataclass(frozen=True)
class RunData(UnlearnData):
    """Questions and answers of a job; `texts` trains the embedded tokenizer, `sets` are evaluated and nothing else."""

    texts: list[str]
    sets: dict[str, list[QA]] = field(default_factory=dict, kw_only=True)

    def evaluated(self, retain_limit: int | None) -> dict[str, list[QA]]:
        """Every set to evaluate, by name; retain_limit: of the retain rows, and of those held out."""
        rows = {"forget": self.forget, "retain": self.retain[:retain_limit], "holdout": self.holdout[:retain_limit]}
        return {name: items for name, items in {**rows, **self.sets}.items() if items}


def load_data(config: RunConfig | FilesConfig) -> RunData:
    """Raises what `load_qa`, `load_refusals` and `hold_out` raise, and ValueError where forget and retain overlap."""
    data = config.data
    if isinstance(config, SuiteConfig):
        sets = load_sets(config)
        texts = texts_of([item for items in sets.values() for item in items])
        return RunData(sets.get("forget", []), [], [], texts, sets=sets)
    if not isinstance(data, DataConfig):
        items = load_source(data)
        return RunData(items, [], [], texts_of(items))
    if data.source == EMBEDDED:
        world = generate_authors(
            data.num_authors, data.questions_per_author, config.seed, data.forget_fraction, data.num_unknown
        )
        read = RunData(world.forget, world.retain, list(world.refusals), world.texts, unknown=list(world.unknown))
    else:
        forget, retain = (load_source(source) for source in (data.forget, data.retain) if source is not None)
        refusals = [] if data.refusals is None else load_refusals(data.refusals)
        read = RunData(forget, retain, refusals, texts_of(forget + retain) + refusals)
    check_disjoint(read.forget, read.retain)
    try:
        retain, held_out = hold_out(read.retain, data.holdout, config.seed)
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    more = {name: load_source(source) for name, source in config.evaluate.sets.items()}
    return replace(read, retain=retain, holdout=held_out, sets=more)


PERTURBED = ("retain", "real_authors", "world_facts")  # in TOFU's {name}_perturbed, beside the forget set


def load_sets(config: SuiteConfig) -> dict[str, list[QA]]:
    """The suite's sets; of TOFU's, holdout where there is one: holdout10 for forget10, no model has seen it.

    Raises what `load_qa` and the benchmark's reader raise, for a file that is missing with its name; ValueError for a
    file in the place of TOFU's folder.
    """
    data, suite = config.data, get_suite(config.suite)
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


def load_source(source: SourceConfig) -> list[QA]:
    return load_qa(source.path, name=source.name, split=source.split, limit=source.limit)


def texts_of(items: list[QA]) -> list[str]:
    return [f"Question: {item.question}\nAnswer: {item.answer}" for item in items]
