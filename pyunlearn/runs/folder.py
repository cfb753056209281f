"""The run folder: what is where, and whether an existing folder is this run's.

config.yaml        the configuration as resolved, with versions
memorised/         model and tokenizer after memorising (if the run does)
evaluation/        {before,after}-{forget,retain,holdout}.jsonl, one line a sample; {before,after}.json, the means;
                   the same of step-N on the way, and of the models it is held against (retrained, random)
unlearning.json    mean absolute change of a weight; with sampling also each sample's updates, MRD, and when forgotten
reinforced/        a model that was trained further on the forget set (with unlearn.reinforce)
retrained/         a model that was trained as memorised/ was, but without the forget set (with --retrain)
checkpoint/        the unlearned model and tokenizer
geffect/           what `pyunlearn geffect` measures, beside the reference of its samples
uwc/, cru/         what `pyunlearn calibrate` makes of the models before and after, see `runs.pair`
provenance.json    of each attempt that computed something: when, how long, on what, by which code
table.json, table.md, report.html
and what the trainings keep: see `pyunlearn.training.folder`
.lock              while a job works here: which process it is
.pyunlearn         the mark of a run folder, and fingerprints of what the run reads: no other is taken up or removed
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._files import read_json, remove_orphans, write_json, write_text
from ..store import differences
from ..training.folder import TrainingFolder
from .config import RunConfig, as_meant

# What does not change what a run computes; anchors are measured beside it, and goals checked, whenever they are asked.
NOT_COMPARED = {"output", "num_threads", "versions", "cache", "anchors", "report_to", "goal"}
MARK, LOCK = ".pyunlearn", ".lock"
OLD, MOVING = ".pyunlearn-old", ".pyunlearn-moving"  # what is being overwritten: whole, and on its way there or back
BEGUN = {MARK, LOCK, "config.yaml", OLD, MOVING}  # what a run has before it computes anything
RUN_FILES = BEGUN | {
    "memorised", "evaluation", "unlearning.json", "checkpoint", "geffect", "table.json", "table.md", "report.html",
    "retrained", "reinforced", "texts", "training", "metrics.jsonl", "reference", "checkpoints", "trackers",
    "provenance.json", "uwc", "cru",
}  # fmt: skip
SCORE_FILES = {f"scores{suffix}" for suffix in (".jsonl", ".json", ".html", ".state")}
LEFT_BY_A_KILL = re.compile(r"\..*\.(tmp|old|lock)")  # see `_files`
WAYS_OUT = "choose --out FOLDER or --overwrite"


class RunFolder(TrainingFolder):
    """Paths of a run."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self.config = self.path / "config.yaml"
        self.memorised = self.path / "memorised"
        self.unlearning = self.path / "unlearning.json"
        self.checkpoint = self.path / "checkpoint"
        self.retrained = self.path / "retrained"
        self.reinforced = self.path / "reinforced"
        self.report = self.path / "report.html"
        self.provenance = self.path / "provenance.json"
        self.lock = self.path / LOCK

    def open(
        self,
        config: RunConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        reads: Mapping[str, str] | None = None,
        ways: str = WAYS_OUT,
    ) -> None:
        """Makes the folder, or takes up an existing one of the same run.

        reads: `fingerprints` of what the run reads; what was computed from other data or another model is not taken up.
        overwrite: what is there is moved aside until the new run is known to begin: `settle` removes it, `recover`
        puts it back. ways: out of a folder of another run, in the words of the command that asks.

        Raises ValueError for a place that is not a run's own, FileNotFoundError for no run to resume, FileExistsError
        if the folder holds something else, another configuration, results of other data or of another model, or this
        run without `resume`.
        """
        self.check_place()
        self.recover()
        if resume and not self.marked:
            raise FileNotFoundError(f"--resume: there is no run in {self.path}; leave --resume out, and it begins")
        if self.marked:
            if overwrite:
                self._check_overwrite(config)
                self._move_aside()
            elif self.computed:
                self._compare(config, reads, resume, ways)
        remove_orphans(self.path)
        write_json(self.path / MARK, {"folder": "a run of pyunlearn", "reads": None if reads is None else dict(reads)})
        write_text(self.config, config_text(config))

    @property
    def marked(self) -> bool:
        """Whether it is a run folder."""
        return (self.path / MARK).is_file()

    @property
    def computed(self) -> bool:
        """Whether anything has been computed here; a run that failed before does not block the folder."""
        return any(path.name not in BEGUN and not is_unfinished(path.name) for path in self.path.iterdir())

    @property
    def stopped(self) -> str:
        """At which stage a run is that has no checkpoint."""
        if self.read_config().get("memorise") is not None and not self.memorised.is_dir():
            return "before it had memorised"
        return "while unlearning" if self.evaluation("before.json").is_file() else "before unlearning"

    def settle(self) -> None:
        """The new run has loaded its model: what it overwrites goes."""
        shutil.rmtree(self.path / OLD, ignore_errors=True)

    def recover(self) -> None:
        """Puts back what a run was to overwrite that failed, or was killed, before `settle`."""
        old, moving = self.path / OLD, self.path / MOVING
        if old.is_dir() and self.computed:
            self.settle()
        elif old.is_dir():
            os.replace(old, moving)
        if moving.is_dir():
            for path in sorted(moving.iterdir(), key=lambda path: path.name != MARK):
                os.replace(path, self.path / path.name)
            moving.rmdir()

    def discard(self) -> None:
        """Takes back what `open` has written, where nothing was computed."""
        if not self.computed:
            for path in (self.path / MARK, self.config):
                path.unlink(missing_ok=True)

    def _move_aside(self) -> None:
        moving = self.path / MOVING
        moving.mkdir()
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == MARK):  # it is marked all the time
            if path not in (moving, self.lock):
                os.replace(path, moving / path.name)
        os.replace(moving, self.path / OLD)

    def check_place(self) -> None:
        """Raises ValueError for the working directory and the home directory, and what they are in; FileExistsError for
        a file, and for a folder that holds anything and is not a run's.
        """
        place = self.path.resolve()
        for name, taken in (("working", Path.cwd()), ("home", Path.home().resolve())):
            if place == taken or place in taken.parents:
                where = f"is the {name} directory" if place == taken else f"holds the {name} directory"
                raise ValueError(f"output={str(self.path)!r}: needs a folder of the run's own, this {where} {taken}")
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        filled = {name for name in names if not is_unfinished(name)} - {LOCK, OLD, MOVING}
        if (filled and not self.marked) or self.path.is_file():
            raise FileExistsError(
                f"{self.path} exists and is not a run folder (no {MARK}); it is left alone: choose --out FOLDER"
            )

    def _check_overwrite(self, config: RunConfig) -> None:
        """Raises FileExistsError if there are other files than a run's, or some that the new run reads."""
        others = sorted(path.name for path in self.path.iterdir() if not is_run_file(path.name))
        if others:
            raise FileExistsError(
                f"--overwrite: {self.path} also holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}, no "
                "files of a run; move them away or choose --out FOLDER"
            )
        place = self.path.resolve()
        for key, path in config.paths():
            if place in (path.resolve(), *path.resolve().parents):
                raise FileExistsError(f"--overwrite: {key}={path} is in {self.path}; choose --out FOLDER")

    def _compare(self, config: RunConfig, reads: Mapping[str, str] | None, resume: bool, ways: str) -> None:
        written = self.read_config()
        changed = differences(compared(with_defaults(written)), compared(config.to_dict()))
        data = written.get("data")
        if changed and config.data.holdout and isinstance(data, Mapping) and "holdout" not in data:
            raise FileExistsError(
                f"{self.path} holds a run from before there was data.holdout; go on with it by --set data.holdout=0, "
                f"or {ways}"
            )
        if changed:
            raise FileExistsError(
                f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}); {ways}"
            )
        self.check_reads(reads, ways)
        if not resume:
            state = "a finished run" if self.report.is_file() else "an unfinished run"
            raise FileExistsError(f"{self.path} holds {state}; choose --resume, --overwrite or --out FOLDER")

    def check_reads(self, reads: Mapping[str, str] | None, ways: str = WAYS_OUT) -> None:
        """Raises FileExistsError if what the run reads (`fingerprints`) is not what it was when the run began."""
        mark = read_json(self.path / MARK, f"delete {self.path}, or {ways}")
        known = mark.get("reads") if isinstance(mark, dict) else None
        both = (known or {}).keys() & (reads or {}).keys()  # what one of them lacks is another configuration's
        if known and reads and (other := [key for key in reads if key in both and known[key] != reads[key]]):
            raise FileExistsError(
                f"{self.path} holds results of other content: {', '.join(other)} changed since the run began; bring it "
                f"back, {ways}"
            )

    def read_config(self) -> dict[str, Any]:
        why = "it holds no keys"
        try:
            values = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            values, why = None, " ".join(str(error).split())
        if not isinstance(values, dict):
            raise ValueError(f"{self.config}: cannot be read ({why}); choose --overwrite or --out FOLDER")
        return values

    def result(self, stage: str) -> Path:
        """Where the model goes that a stage leaves."""
        made = {"memorise": self.memorised, "reinforce": self.reinforced, "retrain": self.retrained}
        return {**made, "unlearn": self.checkpoint}[stage]

    def evaluation(self, name: str) -> Path:
        return self.path / "evaluation" / name

    def evaluated_steps(self) -> list[int]:
        """The optimiser steps of the unlearning after which the model was evaluated."""
        found = (re.fullmatch(r"step-(\d+)\.json", path.name) for path in self.path.glob("evaluation/step-*.json"))
        return sorted(int(name[1]) for name in found if name)


def with_defaults(written: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run folder's configuration with the keys that came later; as it is written where it has others than today's."""
    try:
        return RunConfig.model_validate(as_meant(written)).to_dict()
    except ValueError:
        return written


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run's results depend on, of every section."""
    kept = {key: value for key, value in settings.items() if key not in NOT_COMPARED}
    return {key: compared(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def is_run_file(name: str) -> bool:
    """Whether a name at the top of a run folder is one that a run, a score or a G-effect gives there."""
    return name in RUN_FILES | SCORE_FILES or LEFT_BY_A_KILL.fullmatch(name) is not None


def is_unfinished(name: str) -> bool:
    """Whether it is what a kill has left of a file or folder that was being written."""
    return name.startswith(".") and name.endswith(".tmp")


def config_text(config: RunConfig) -> str:
    return yaml.safe_dump({**config.to_dict(), "versions": versions()}, sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    import torch
    import transformers

    from .. import __version__

    return {
        "pyunlearn": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "platform": platform.platform(terse=True),
    }
