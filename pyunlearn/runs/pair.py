"""The model before and after a finished run, and the folder in the run where something made of both goes.

uwc/ or cru/, which is read as a finished run is, by `pyunlearn compare` and `export`:

points/            what was measured on the way, a unit a model: nothing is measured twice
checkpoint/        the calibrated model and tokenizer
evaluation/        after-{set}.jsonl, after.json: of the calibrated model, on all of the run's sets
config.yaml        the run's, with a section `calibration` that says what was done
table.json, table.md, report.html, unlearning.json, provenance.json
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .._files import write_json, write_text
from .._terminal import print_table, shown, visible
from ..calibration import Tensors, write_tensors
from ..data import QA
from ..metrics import EvaluationResult, Kept
from ..metrics.utility import FEW, mean, utility_set
from ..model.combined import find_combined
from ..model.lora import find_adapter
from ..store import Store
from ..training.folder import write_model
from .config import RunConfig
from .evaluate import evaluate_items, evaluate_sets, read_records, texts_before
from .fingerprint import digest_pairs, fingerprints, model_fingerprints
from .folder import RunFolder, versions
from .job import Job, check_as_written, loaded, starting_model
from .lock import A_COPY
from .overrides import load_config
from .provenance import Attempt, Record, read_attempts
from .run import load_result
from .sections import ModelConfig
from .table import make_table, table_markdown, with_interval
from .tools import load_tools
from .verdict import check_goals, reach_verdict

METRICS = ("probability", "memorization_accuracy", "extraction_strength")  # of one teacher-forced pass
COLUMNS = ("before", "unlearned", "calibrated")
READING = {"variant", "options", "rouge_samples", "max_new_tokens"}  # of an evaluation's settings: what decides numbers
Records = Mapping[str, Sequence[Mapping[str, Any]]]
Means = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Pair:
    """A finished run at work again. place: where its results go."""

    job: Job[RunConfig]
    place: RunFolder
    attempt: Attempt

    @property
    def before(self) -> ModelConfig:
        config, memorised = self.job.config, self.job.folder.memorised
        if config.memorise is None:
            return config.model
        return ModelConfig(name_or_path=str(memorised), dtype=config.model.dtype)

    @property
    def after(self) -> ModelConfig:
        return self.model_in(self.job.folder.checkpoint)

    def model_in(self, folder: Path) -> ModelConfig:
        kind: Any = {"dtype": self.job.config.model.dtype, "quantize": self.job.config.model.quantize}
        return ModelConfig(name_or_path=str(folder), **kind)

    @property
    def work(self) -> Path:
        """What is needed meanwhile, and removed."""
        return self.place.path / "work"

    @property
    def adapter(self) -> Path | None:
        """The run's checkpoint, where it is an adapter."""
        return find_adapter(str(self.job.folder.checkpoint))

    def store(self) -> Store:
        return Store(self.place.path / "points")

    def identity(self, sets: Mapping[str, Sequence[QA]]) -> dict[str, Any]:
        """Of all that is measured: both models, the rows and how they are read."""
        config = self.job.config
        return {
            "before": {**model_fingerprints(self.before), "seed": config.seed, "options": config.model.options},
            "after": model_fingerprints(self.after),
            "rows": {name: digest_pairs(items) for name, items in sets.items()},
            "reading": config.evaluate.model_dump(mode="json", include=READING),
            "dtype": config.model.dtype,
            "prompt": config.to_dict()["data"]["prompt"],
            "max_length": config.max_length,
        }

    def load_before(self) -> tuple[Any, Any]:
        return starting_model(self.job)

    def tensors(self) -> tuple[Any, Any, Tensors, Tensors]:
        """The model before, its tokenizer, and the tensors of both models: of their own files where these hold what the
        model has, else (GGUF, the Hub, adapters, files that are converted) of copies in `work`. One model in memory.

        Raises ValueError for a quantised model, whose weights are packed, and models of different shapes.
        """
        if self.job.config.model.quantize is not None:
            raise ValueError(
                f"model.quantize={self.job.config.model.quantize}: packed weights are not mixed; needs a run "
                "whose model is loaded as it is"
            )
        model, tokenizer = self.load_before()
        own = Tensors(self.before.name_or_path)
        before = own if own.hold(model) and find_adapter(self.before.name_or_path) is None else None
        if before is None:
            before = write_tensors(model, self.work / "before")
        after = Tensors(self.after.name_or_path)
        if self.adapter is not None or not after.hold(model):
            del model
            after = write_tensors(loaded(self.job, self.after)[0], self.work / "after")
            model, _ = self.load_before()
        after.check(model)
        return model, tokenizer, before, after

    def kept_set(self, asked: str | None) -> str:
        """Whose answers have to stay: as asked, or as `metrics.utility.utility_set` says.

        Raises ValueError for a run without rows to retain, or a set of it that there is not.
        """
        rows = {name: len(items) for name, items in self.sets().items()}
        if (own := utility_set(rows)) is None:
            raise ValueError(f"{self.job.folder.path}: has no rows to retain, by which a model could be calibrated")
        known = [name for name in ("holdout", "retain") if name in rows]
        if asked is not None and asked not in known:
            raise ValueError(f"--on={asked}: the run has no such rows; needs one of {', '.join(known)}")
        return asked or own

    def sets(self) -> dict[str, list[QA]]:
        return self.job.data.evaluated(self.job.config.evaluate.retain_limit)

    def means(self, model: Any, tokenizer: Any, sets: Mapping[str, Sequence[QA]]) -> Means:
        """Of each set, the means of METRICS."""
        found = examine(self.job, model, tokenizer, sets, dict.fromkeys(sets, METRICS))
        return {
            name: {metric: v for metric, v in own.summary.items() if math.isfinite(v)} for name, own in found.items()
        }

    # ---- what comes out ----------------------------------------------------------------------------------------------

    @property
    def attempts(self) -> list[Record]:
        """Those of the run, and this one."""
        return [*read_attempts(self.job.folder), self.attempt.record(self.job.data)]

    def begin_result(self) -> None:
        """What was finished before is no longer: the model is about to be another."""
        (self.place.path / "table.json").unlink(missing_ok=True)

    def write_checkpoint(self, model: Any, tokenizer: Any) -> None:
        write_model(self.place.checkpoint, model, tokenizer)

    def evaluate(
        self, model: Any, tokenizer: Any, left_out: Mapping[str, Collection[int]] | None = None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
        """Evaluates the calibrated model as the run was, all of its metrics and sets.

        left_out: rows of each set, by their index, that are not in the tables. Returns the tables of before and
        calibrated, and of before and unlearned, and how many rows of each set they are made of.
        """
        job, sets = self.job, self.sets()
        stage = job.stage(model, tokenizer)
        before = partial(texts_before, job.folder)
        tools = load_tools(
            job.config.evaluate, job.data.texts, job.processes.device, stage.progress, before, job.endpoints
        )
        evaluate_sets(stage, job.config.evaluate, self.place, "after", sets, model, tokenizer, tools)

        def rows_in(folder: RunFolder, moment: str) -> Records:
            return {
                name: [row for row in own if row["index"] not in (left_out or {}).get(name, ())]
                for name, own in read_records(folder, moment, sets).items()
            }

        first, unlearned, now = (
            rows_in(job.folder, "before"), rows_in(job.folder, "after"), rows_in(self.place, "after"),
        )  # fmt: skip
        tables = [
            make_table({m: means_of(r, job) for m, r in moments.items()}, moments)
            for moments in ({"before": first, "after": now}, {"before": first, "after": unlearned})
        ]
        return tables[0], tables[1], {name: len(own) for name, own in now.items()}

    def judge(
        self, table: Sequence[Mapping[str, Any]], counts: Mapping[str, int]
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The run's goals, of what came out, and its verdict; none where the run asks for nothing."""
        goal = self.job.config.evaluate.goal
        if goal is None:
            return [], None
        before, after = (summaries(table, moment) for moment in ("before", "after"))
        goals = check_goals(before, after, goal, counts)
        return goals, reach_verdict(before, goal, goals).as_dict()

    def write(self, calibration: Mapping[str, Any], table: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
        """All that makes the folder one of a finished run; table.json last."""
        job, place = self.job, self.place
        config = {**job.config.to_dict(), "name": f"{job.config.name}-{calibration['method']}", "output": None}
        text = yaml.safe_dump(
            {**config, "calibration": dict(calibration), "versions": versions()}, sort_keys=False, allow_unicode=True
        )
        write_text(place.config, text)
        shutil.copyfile(job.folder.unlearning, place.unlearning)
        write_json(place.provenance, self.attempts)
        goals, verdict = self.judge(table, counts)
        write_text(place.path / "table.md", table_markdown(table))
        write_json(place.path / "table.json", {"table": table, "goals": goals, "verdict": verdict})


@contextmanager
def opened(path: str | Path, method: str, console: Console | None, command: str) -> Iterator[Pair]:
    """The pair of a finished run, its folder this job's alone meanwhile, and what its work needs removed afterwards.

    Raises FileNotFoundError for no finished run, or one whose models are gone; ValueError for a damaged one, one whose
    data or models are others than when it ran, one whose model is two combined, or several processes; InUse;
    Interrupted after Ctrl-C.
    """
    path = load_result(path).folder
    if not RunFolder(path).marked:
        raise ValueError(
            f"RUN={str(path)!r}: is no run folder, or what a run was calibrated to; needs a run's own folder"
        )
    config = load_config(RunFolder(path).config).model_copy(update={"output": str(path)})
    job = Job.start(config, console, command)
    if job.processes.count > 1:
        raise ValueError(f"{method} works in one process, got {job.processes.count}; start it without torchrun")
    pair = Pair(job, RunFolder(path / method), Attempt(command))
    if find_combined(str(job.folder.checkpoint)) is not None:
        raise ValueError(
            f"RUN={str(path)!r}: its model is two whose logits are combined, and {method} mixes the weights of one; "
            "for another strength of it set unlearn.reinforce.strength, of a run of its own"
        )
    job.folder.check_reads(fingerprints(config, job.data))
    for folder in (job.folder.checkpoint, *([job.folder.memorised] if config.memorise is not None else [])):
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: {folder.name}/, a model of the run, is gone")
        check_as_written(folder)  # tensors are read from files, past all that loads a model
    with job.interruptible(), job.locked(job.folder.lock, job.folder.path, A_COPY):
        shutil.rmtree(pair.work, ignore_errors=True)
        try:
            yield pair
        finally:
            shutil.rmtree(pair.work, ignore_errors=True)


def examine(
    job: Job[RunConfig],
    model: Any,
    tokenizer: Any,
    sets: Mapping[str, Sequence[QA]],
    metrics: Mapping[str, Sequence[str]],
) -> dict[str, EvaluationResult]:
    """Of each set, its metrics, as the run's evaluation has them; nothing is kept, and no bar is shown."""
    stage, kept, found = job.stage(model, tokenizer), Kept(None, model), {}
    quiet = replace(stage, console=Console(quiet=True))
    for name, items in sets.items():
        options = {each: own for each, own in job.config.evaluate.options.items() if each in metrics[name]}
        settings = job.config.evaluate.model_copy(update={"metrics": [*metrics[name]], "options": options})
        found[name] = evaluate_items(quiet, settings, items, model, tokenizer, {"texts": tuple(job.data.texts)}, kept)
    return found


def means_of(records: Records, job: Job[RunConfig]) -> Means:
    """Of every set and metric that a record has. A value that JSON does not have is null there: its mean is none."""
    names = job.config.evaluate.metrics
    values = {
        (name, metric): [math.nan if row[metric] is None else row[metric] for row in rows if metric in row]
        for name, rows in records.items()
        for metric in names
    }
    means: Means = {name: {} for name in records}
    for (name, metric), own in values.items():
        if own and math.isfinite(mean(own)):
            means[name][metric] = mean(own)
    return means


def summaries(table: Sequence[Mapping[str, Any]], moment: str) -> Means:
    means: Means = {}
    for row in table:
        means.setdefault(row["set"], {})[row["metric"]] = row[moment]
    return means


def three_columns(
    calibrated: Sequence[Mapping[str, Any]], unlearned: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of text, {"set", "metric", "before", "unlearned", "calibrated", "samples"}, with intervals."""
    others = {(row["set"], row["metric"]): row for row in unlearned}
    return [
        {
            "set": row["set"],
            "metric": row["metric"],
            "before": with_interval(row, "before", 3),
            "unlearned": with_interval(others[row["set"], row["metric"]], "after", 3),
            "calibrated": with_interval(row, "after", 3),
            "samples": row["samples"],
        }
        for row in calibrated
        if (row["set"], row["metric"]) in others
    ]


def tell_table(console: Console, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Table("set", "metric", title=title, title_justify="left", collapse_padding=True)
    for column in (*COLUMNS, "samples"):
        table.add_column(column, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or following["set"] != row["set"]
        cells = (str(row[column]) for column in (*COLUMNS, "samples"))
        table.add_row(shown(row["set"]), row["metric"], *cells, end_section=last)
    print_table(console, table)


def tell_next(pair: Pair, verdict: Mapping[str, Any] | None) -> None:
    """The verdict on what came out, which keeping as much does not decide, and where it is."""
    if verdict is not None:
        style = "green" if verdict["clean"] else "red"
        told = f"[bold {style}]verdict: {verdict['name']}[/] ({shown(verdict['reason'])})"
        pair.job.console.print(told, highlight=False)
    place, run = shlex.quote(str(pair.place.path)), shlex.quote(str(pair.job.folder.path))
    lines = [
        f"report  {pair.place.report}",
        f"model   {pair.place.checkpoint}",
        "",
        "try next",
        f"  pyunlearn compare {run} {place}   # side by side; with other runs that are calibrated alike, too",
        f"  pyunlearn export {place} --out FOLDER   # to give it away",
    ]
    pair.job.console.print("\n" + visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)


def few(counts: Mapping[str, int]) -> list[str]:
    """What to tell of sets that are too small to decide by."""
    return [
        f"{n} {name} row{'s' if n > 1 else ''}: too few to decide much by, one answer moves a mean by {1 / n:.0%}"
        for name, n in counts.items()
        if n < FEW
    ]
