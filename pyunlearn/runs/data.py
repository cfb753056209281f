"""What a job reads: the sets to forget and to retain, rows of the latter held out, and what else is evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..data import QA, check_disjoint, generate_authors, hold_out, load_qa, load_refusals
from ..model.load import EMBEDDED
from ..training.unlearn import UnlearnData
from .config import FilesConfig, RunConfig
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
    if not isinstance(data, DataConfig):
        items = load_source(data)
        return RunData(items, [], [], texts_of(items))
    if data.source == EMBEDDED:
        world = generate_authors(
            data.num_authors, data.questions_per_author, config.seed, data.forget_fraction, data.num_unknown
        )
        sets = RunData(world.forget, world.retain, list(world.refusals), world.texts, unknown=list(world.unknown))
    else:
        forget, retain = (load_source(source) for source in (data.forget, data.retain) if source is not None)
        refusals = [] if data.refusals is None else load_refusals(data.refusals)
        sets = RunData(forget, retain, refusals, texts_of(forget + retain) + refusals)
    check_disjoint(sets.forget, sets.retain)
    try:
        retain, held_out = hold_out(sets.retain, data.holdout, config.seed)
    except ValueError as error:
        raise ValueError(f"data.{error}") from None
    more = {name: load_source(source) for name, source in config.evaluate.sets.items()}
    return replace(sets, retain=retain, holdout=held_out, sets=more)


def load_source(source: SourceConfig) -> list[QA]:
    return load_qa(source.path, name=source.name, split=source.split, limit=source.limit)


def texts_of(items: list[QA]) -> list[str]:
    return [f"Question: {item.question}\nAnswer: {item.answer}" for item in items]
