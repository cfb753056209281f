"""Where results may go that --out names: nowhere that the job reads, and over no files but its own earlier ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .._files import check_writable
from ..store import belongs
from .config import RunConfig
from .files_config import FilesConfig, SuiteConfig
from .folder import SCORE_FILES, RunFolder, is_run_file

NUMBERS = "numbers.json"  # of an evaluation by a suite, which is known by it
SCORES = "pyunlearn-mrd"  # how the identity of a score's finished draws begins


def score_files(out: Path) -> dict[str, Path]:
    """What `score` writes, by what it is."""
    beside = {"diagnostics": ".json", "report": ".html", "finished draws": ".state"}
    return {"scores": out, **{what: out.with_suffix(suffix) for what, suffix in beside.items()}}


def check_score_files(config: RunConfig | FilesConfig, out: Path) -> None:
    """Raises ValueError or OSError if scores cannot go to `out`, FileExistsError for files that no score wrote."""
    files = score_files(out)
    check_places(config, files)
    state = files["finished draws"]
    ours = belongs(state, SCORES)
    if not ours and state.exists() and (not state.is_dir() or any(state.iterdir())):
        raise FileExistsError(f"--out {out}: {state} holds other files than a score's; choose another name")
    for what, path in files.items():
        foreign = what == "scores" and "mrd" not in first_record(path)
        if path != state and is_filled(path) and (not ours or foreign):
            raise FileExistsError(f"--out {out}: no earlier score wrote {path}; move it away or choose another name")


def check_records_file(config: FilesConfig, out: Path) -> None:
    """Raises ValueError or OSError if an evaluation's records cannot go to `out`, FileExistsError for other files."""
    check_places(config, {"records": out})
    record = first_record(out)
    if is_filled(out) and (not {"index", "question", "answer"} <= record.keys() or "mrd" in record):
        raise FileExistsError(f"--out {out}: no earlier evaluation wrote it; move it away or choose another name")


def suite_files(out: Path, log_name: str) -> dict[str, Path]:
    """What an evaluation by a suite writes into its folder, by what it is."""
    return {"log": out / f"{log_name}_EVAL.json", "summary": out / f"{log_name}_SUMMARY.json", "numbers": out / NUMBERS}


def check_suite_files(config: SuiteConfig, out: Path, log_name: str) -> None:
    """Raises ValueError or OSError if a suite's files cannot go to the folder `out`, FileExistsError for others'."""
    files = suite_files(out, log_name)
    if out.is_file():
        raise FileExistsError(f"--out {out}: is a file, needs a folder")
    for name, log in config.logs.items():  # one log a folder, whatever it is called
        if out.is_dir() and Path(log).is_dir() and out.samefile(log):
            raise ValueError(f"--out {out}: its log would replace that of --{name}-log={log}; choose another folder")
    check_places(config, files)
    for path in files.values():
        if path.exists() and not files["numbers"].exists():
            raise FileExistsError(f"--out {out}: no earlier evaluation wrote {path}; choose another folder")


def check_places(config: RunConfig | FilesConfig, files: Mapping[str, Path]) -> None:
    """Of all that a job writes, the first is --out: each has a name of its own, is not read, not a run's, writable."""
    out = next(iter(files.values()))
    seen: dict[Path, str] = {}
    for what, path in files.items():
        if (place := path.resolve()) in seen:
            raise ValueError(f"--out {out}: its {seen[place]} and its {what} would both be {path}; end it in .jsonl")
        seen[place] = what
        for key, read in config.paths():
            if place == read.resolve() or (path.exists() and path.samefile(read)):
                raise ValueError(f"--out {out}: its {what}, {path}, would replace {key}={read}; choose another name")
        check_no_runs(config, out, place)
    for path in files.values():
        check_writable(path, f"--out {out}")


def check_no_runs(config: RunConfig | FilesConfig, out: Path, place: Path) -> None:
    """Raises ValueError for a name that a run has in its folder; a run's own scores are the run's."""
    own = config.folder.resolve() if isinstance(config, RunConfig) else None
    for folder in place.parents:
        if folder == own or RunFolder(folder).marked:
            name = place.relative_to(folder).parts[0]
            if is_run_file(name) and not (folder == own and name in SCORE_FILES):
                raise ValueError(f"--out {out}: {place} is among the results of the run in {folder}; choose another")


def is_filled(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def first_record(path: Path) -> dict[str, object]:
    """Of a file of JSON lines; {} for any other file, and for none."""
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        try:
            record = json.loads(lines.readline(1 << 20))
        except (ValueError, RecursionError):
            return {}
    return record if isinstance(record, dict) else {}
