"""How a result came about: by which command, from which model and data, when, on what machine, and what it took."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .._files import read_json, write_json
from ..data import Prompt
from ..model.load import EMBEDDED
from ..training.settings import TrainingConfig
from .config import RunConfig
from .data import RunData
from .files_config import FilesConfig
from .folder import RunFolder, versions
from .sections import DataConfig, ModelConfig, SourceConfig

Record = dict[str, Any]


class Attempt:
    """A command at work, from here on."""

    def __init__(self, command: str):
        self.command, self.began, self.start = command, datetime.now().astimezone(), time.monotonic()
        self.versions = {**versions(), **commit()}  # of now: a checkout may change while it works
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def record(self, data: RunData, processes: int = 1) -> Record:
        """What it took until now: command, began (ISO 8601), seconds, peak_memory of this process (bytes, by memory),
        processes, machine, versions, data (pairs of each set), columns (what was recognised, by file)."""
        return {
            "command": self.command,
            "began": self.began.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.start, 2),
            "peak_memory": peak_memory(),
            "processes": processes,
            "machine": machine(),
            "versions": self.versions,
            "data": count_pairs(data),
            "columns": data.recognised,
        }


def read_attempts(folder: RunFolder) -> list[Record]:
    """Those of a run that computed something, in their order; none of a run from before they were kept."""
    if not folder.provenance.is_file():
        return []
    return list(read_json(folder.provenance, f"delete {folder.provenance}"))


def keep_attempt(folder: RunFolder, record: Record) -> None:
    write_json(folder.provenance, [*read_attempts(folder), record])


def peak_memory() -> dict[str, int]:
    """Bytes: of this process since it began where the system tells it, and of its GPU since `Attempt`."""
    peaks = {}
    with suppress(ImportError):  # there is none on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["main memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peaks["GPU memory"] = torch.cuda.max_memory_allocated()
    return peaks


def machine() -> dict[str, Any]:
    """cpu: what the system calls it; cores: those that this process may use; gpus: their names."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text(errors="replace")) if info.is_file() else None
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = os.cpu_count() if affinity is None else len(affinity(0))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": named[1].strip() if named else platform.machine(), "cores": cores, "gpus": gpus}


@cache
def commit() -> dict[str, str]:
    """The commit of a checkout of this package, with "+" where files of it have changed; {} elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # it may be installed inside of another project's checkout
        return {}
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": told[0].strip() + ("+" if told[1].strip() else "")}


def count_pairs(data: RunData) -> dict[str, int]:
    rows = {name: getattr(data, name) for name in ("forget", "retain", "holdout", "unknown")}
    return {name: len(items) for name, items in {**rows, **data.sets}.items() if items}


def describe(
    config: RunConfig | FilesConfig, attempts: Sequence[Record], more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What a page tells of it, by what it is called there. attempts: of one result, as `Attempt.record` gives them;
    none are known of older ones. more: what this kind of job tells of its settings."""
    prompt = {} if config.prompt == Prompt() else {"prompt": config.prompt.name}
    told = {"model": name_model(config), **prompt, "seed": str(config.seed), **(more or {})}
    if not attempts:
        return told
    first, last = attempts[0], attempts[-1]
    pairs = ", ".join(f"{count} {name}" for name, count in last["data"].items())
    seconds = sum(attempt["seconds"] for attempt in attempts)
    peaks: dict[str, int] = {}
    for attempt in attempts:
        peaks |= {name: max(value, peaks.get(name, 0)) for name, value in attempt["peak_memory"].items()}
    columns = "; ".join(f"{path}: {found}" for path, found in last.get("columns", {}).items())
    known = {} if config.data is None else {"data": f"{name_data(config.data)}; {pairs}"}
    known |= {"columns": columns} if columns else {}
    took = {
        "began": first["began"].replace("T", " "),
        "wall time": duration(seconds) + (f" in {len(attempts)} attempts" if len(attempts) > 1 else ""),
        "peak memory": ", ".join(f"{value / 1e9:.2f} GB {name}" for name, value in peaks.items()),
        "machine": name_machine(last),
        "versions": ", ".join(f"{name} {version}" for name, version in last["versions"].items()),
    }
    commands = dict.fromkeys(attempt["command"] for attempt in attempts)
    return {"command": " && ".join(commands), **known, **told, **{name: text for name, text in took.items() if text}}


def name_model(config: RunConfig | FilesConfig) -> str:
    model: ModelConfig = config.model
    name = "embedded, a small Llama built here" if model.embedded else model.name_or_path
    if model.gguf_file is not None and model.name_or_path == EMBEDDED:  # a path of its own
        name = Path(model.gguf_file).stem
    options = [f"{key}={value}" for key, value in model.options.items()]
    options += [] if model.gguf_file is None else [model.gguf_file]
    memorised = [] if config.memorise is None else [f"memorised over {length(config.memorise)}"]
    return ", ".join([name, *options, model.dtype, *memorised])


def length(training: TrainingConfig) -> str:
    """Of a training: its steps where these end it."""
    return f"{training.epochs:g} epochs" if training.max_steps is None else f"{training.max_steps} steps"


def name_data(data: DataConfig | SourceConfig) -> str:
    if isinstance(data, SourceConfig):
        return name_source(data)
    if data.forget is None:
        return f"embedded, {data.num_authors} authors made up here"
    return ", ".join(name_source(source) for source in (data.forget, data.retain) if source is not None)


def name_source(source: SourceConfig) -> str:
    parts = [source.path, source.name, source.split, None if source.limit is None else f"the first {source.limit}"]
    return " ".join(part for part in parts if part is not None)


def name_machine(record: Record) -> str:
    machine, processes = record["machine"], record["processes"]
    gpus = [f"{machine['gpus'].count(name)} x {name}" for name in dict.fromkeys(machine["gpus"])]
    more = [f"{processes} processes"] if processes > 1 else []
    return ", ".join([machine["cpu"], f"{machine['cores']} cores", *gpus, *more])


def duration(seconds: float) -> str:
    """
    >>> duration(4.25), duration(65), duration(7265)
    ('4.2 s', '1 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
