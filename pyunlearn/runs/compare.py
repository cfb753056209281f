"""Finished runs side by side: one row for runs that differ in their seed alone, and what else they differ in."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from .._files import check_writable, read_json, write_json, write_text
from .._terminal import print_table, shown, visible
from ..metrics.utility import harmonic_mean, utility_set
from ..report.compare import LEVEL, Column, Comparison, Group, as_text, render_comparison
from .anchors import ANCHORS
from .evaluate import read_summaries
from .folder import RunFolder, compared
from .run import load_result
from .table import rows_of_sets
from .verdict import NOTHING

FILES = {"page": "compare.html", "table": "compare.csv", "records": "compare.json", "LaTeX": "compare.tex"}
MOMENTS = ("before", "after", *ANCHORS)
AGGREGATE = "aggregate"  # in the place of a set's name
FORGOTTEN = ("probability", "paraphrase_probability", "memorization_accuracy", "extraction_strength")
KEPT = ("probability", "rouge_l", "memorization_accuracy", "extraction_strength")
FEWEST = 3  # runs by which metrics can be judged
NAMES = ("name", "seed")  # of a run's settings: what tells runs of one kind apart


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Reads finished run folders.

    Raises ValueError for none, or one that is named twice; FileNotFoundError for a folder without a finished run;
    ValueError that names a damaged file.
    """
    if not folders:
        raise ValueError("RUN: needs one finished run folder at least")
    paths = [Path(folder) for folder in folders]
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise ValueError(f"RUN={str(path)!r}: is named twice")
    kinds: dict[str, list[Path]] = {}
    settings: dict[Path, dict[str, Any]] = {}
    tables: dict[Path, list[dict[str, Any]]] = {}
    verdicts: dict[Path, str] = {}
    for path in paths:
        result = load_result(path)
        tables[path] = result.table
        if isinstance(result.verdict, Mapping) and "name" in result.verdict:  # a run need not have one
            verdicts[path] = str(result.verdict["name"])
        settings[path] = with_rate(compared(RunFolder(path).read_config()), RunFolder(path))
        if missing := [key for key in NAMES if key not in settings[path]]:
            raise ValueError(f"{RunFolder(path).config}: is damaged, it has no {' and no '.join(missing)}")
        kind = {key: value for key, value in settings[path].items() if key not in NAMES}
        kinds.setdefault(json.dumps(kind, sort_keys=True), []).append(path)
    rows = fewest_rows(tables)
    unknowing = [path for path, verdict in verdicts.items() if verdict == NOTHING]
    made, note = aggregates(tables, utility_set(rows), unknowing)
    for path, lines in made.items():
        tables[path] = [*tables[path], *lines]
    groups = told_apart([make_group(members, settings, tables, verdicts) for members in kinds.values()])
    columns = list(dict.fromkeys(column for group in groups for column in group.values))
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    values = {key: [group.settings.get(key) for group in groups] for key in keys}
    differences = {key: own for key, own in values.items() if any(value != own[0] for value in own)}
    return Comparison(groups, columns, differences, rows, note)


def with_rate(settings: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """The learning rate that was used, where none was chosen: it is the model's then, and others take another."""
    unlearn = settings.get("unlearn")
    if not isinstance(unlearn, Mapping) or unlearn.get("learning_rate") is not None or not folder.unlearning.is_file():
        return settings
    told = read_json(folder.unlearning, "--resume of the run makes it again")
    rate = told.get("learning_rate") if isinstance(told, Mapping) else None  # runs of earlier versions do not tell
    return settings if rate is None else {**settings, "unlearn": {**unlearn, "learning_rate": rate}}


def fewest_rows(tables: Mapping[Path, list[dict[str, Any]]]) -> dict[str, int]:
    """How many rows each set has in the run that has the fewest: of sets that all runs have or, where none of these has
    to stay, of all sets."""
    counts: dict[str, list[int]] = {}
    for table in tables.values():
        for name, own in rows_of_sets(table).items():
            counts.setdefault(name, []).append(own)
    shared = {name: min(own) for name, own in counts.items() if len(own) == len(tables)}
    return shared if utility_set(shared) else {name: min(own) for name, own in counts.items()}


def aggregates(
    tables: Mapping[Path, list[dict[str, Any]]], kept_of: str | None, unknowing: Collection[Path] = ()
) -> tuple[dict[Path, list[dict[str, Any]]], str]:
    """Rows of one number each for forgetting, keeping and both, of the metrics that all of the runs have; and of which.

    forgotten: harmonic mean of 1 - each of FORGOTTEN on the forget set; kept: of KEPT on the set `kept_of`, and of the
    forget set's fluency; both: of these two. As Mem, Util and Agg of Dorna et al. (2025) are made, which have other
    metrics and sets. No row where the runs share none of either. unknowing: runs that had nothing to forget, of which
    only kept is a number.
    """
    own = {path: {(row["set"], row["metric"]): row for row in rows} for path, rows in tables.items()}
    shared = set.intersection(*(set(rows) for rows in own.values()))
    forgotten = [column for name in FORGOTTEN if (column := ("forget", name)) in shared]
    kept = [column for column in [*((str(kept_of), name) for name in KEPT), ("forget", "fluency")] if column in shared]
    if not forgotten or not any(name == kept_of for name, _ in kept):
        return {}, ""
    made = {}
    for path, rows in own.items():
        moments = dict.fromkeys(key for column in (*forgotten, *kept) for key in rows[column] if key in MOMENTS)
        values: dict[str, dict[str, float]] = {"forgotten": {}, "kept": {}, "both": {}}
        for moment in moments:
            of = [[share(rows[column].get(moment)) for column in columns] for columns in (forgotten, kept)]
            if not any(math.isnan(value) for each in of for value in each):
                pair = harmonic_mean(1 - value for value in of[0]), harmonic_mean(of[1])
                values["forgotten"][moment], values["kept"][moment], values["both"][moment] = *pair, harmonic_mean(pair)
        if path in unknowing:
            values = {"kept": values["kept"]}
        made[path] = [{"set": AGGREGATE, "metric": name, **each} for name, each in values.items()]
    of_forgotten, of_kept = (", ".join(f"{a} {b}".replace("_", " ") for a, b in each) for each in (forgotten, kept))
    return made, (
        f"{AGGREGATE}: forgotten is the harmonic mean of 1 - each of {of_forgotten}; kept that of {of_kept}; both that "
        "of these two"
    )


def share(value: Any) -> float:
    """A number in [0, 1]; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else math.nan


def told_apart(groups: list[Group]) -> list[Group]:
    """Those of one name by their folders."""
    names = [group.name for group in groups]
    return [replace(group, name=group.folders[0].name) if names.count(group.name) > 1 else group for group in groups]


def make_group(
    folders: list[Path],
    settings: Mapping[Path, dict[str, Any]],
    tables: Mapping[Path, list[dict[str, Any]]],
    verdicts: Mapping[Path, str],
) -> Group:
    values: dict[Column, dict[str, list[float]]] = {}
    intervals: dict[Column, dict[str, list[list[float] | None]]] = {}
    for folder in folders:
        for row in tables[folder]:
            column = row["set"], row["metric"]
            for moment, value in row.items():
                if isinstance(value, int | float) and moment not in ("change", "samples"):
                    values.setdefault(column, {}).setdefault(moment, []).append(float(value))
                    own = row.get("intervals", {}).get(moment)  # runs of earlier versions have none
                    intervals.setdefault(column, {}).setdefault(moment, []).append(own)
    own = settings[folders[0]]
    flat = flatten({key: value for key, value in own.items() if key not in NAMES})
    name = str(own["name"]) if len({settings[folder]["name"] for folder in folders}) == 1 else folders[0].name
    seeds = [settings[folder]["seed"] for folder in folders]
    steps = [read_steps(folder, tables[folder]) for folder in folders]
    told = [verdicts[folder] for folder in folders if folder in verdicts]
    return Group(name, folders, seeds, flat, values, steps, intervals, told)


def read_steps(path: Path, table: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """The means of evaluations on a run's way, by its optimiser step. Raises ValueError for a damaged file."""
    folder, sets = RunFolder(path), dict.fromkeys(row["set"] for row in table if row["set"] != AGGREGATE)
    return {step: read_summaries(folder, f"step-{step}", sets) for step in folder.evaluated_steps()}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections by dotted keys; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_csv(comparison: Comparison) -> str:
    """One line a group, set, metric and moment: the mean, its interval (of several runs half the width, over seeds; of
    one the bounds, over samples), and each run's value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "set", "metric", "moment", "mean", "half_width_95", "low_95", "high_95", "runs", "values"])
    for group in comparison.as_dict()["groups"]:
        for row in group["values"]:
            spread = [row["half_width_95"], *(row["interval_95"] or [None, None])]
            numbers = [row["mean"], *("" if each is None else each for each in spread), len(row["values"])]
            values = " ".join(map(repr, row["values"]))
            writer.writerow([group["name"], row["set"], row["metric"], row["moment"], *numbers, values])
    return out.getvalue()


LATEX = {"±": r"$\pm$", "→": r"$\to$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def as_latex(comparison: Comparison) -> str:
    r"""A `tabular` for booktabs: a line for the values before unlearning, then one a group."""

    def escaped(text: str) -> str:
        return "".join(LATEX.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)

    columns = comparison.columns
    head = [" & ".join(["", *(escaped(f"{name} {metric}".replace("_", " ")) for name, metric in columns)])]
    lines = [" & ".join(["before", *(escaped(comparison.before(column)) for column in columns)])]
    for group in comparison.groups:
        cells = [comparison.text(group, column) for column in columns]
        lines.append(" & ".join(map(escaped, [group.name, *cells])))
    rows = [r"\toprule", head[0] + r" \\", r"\midrule", *(line + r" \\" for line in lines), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", *rows, r"\end{tabular}", ""])


def compare(
    folders: Sequence[str | Path], *, out: str | Path | None = None, console: Console | None = None
) -> Comparison:
    """Prints the runs side by side and, with `out`, writes a page, a CSV file, JSON and a LaTeX table there.

    Raises what `compare_runs` raises, FileExistsError where `out` is a run folder or holds other files of those names,
    OSError where nothing can be written.
    """
    comparison = compare_runs(folders)
    console = console or Console(quiet=True)
    files = {} if out is None else {what: Path(out) / name for what, name in FILES.items()}
    for path in files.values():
        if RunFolder(path.parent).marked:
            raise FileExistsError(f"--out {out}: is a run folder; choose a folder of its own")
        check_writable(path, f"--out {out}")
    tell(comparison, console)
    if files:
        links = {
            str(f): quote(os.path.relpath(f / "report.html", Path(out or "")))
            for g in comparison.groups
            for f in g.folders
        }
        write_text(files["page"], render_comparison(comparison, links))
        write_text(files["table"], as_csv(comparison))
        write_json(files["records"], comparison.as_dict())
        write_text(files["LaTeX"], as_latex(comparison))
    tell_next(comparison, files, console)
    return comparison


def tell_next(comparison: Comparison, files: Mapping[str, Path], console: Console) -> None:
    groups = comparison.groups
    runs = [shlex.quote(str(folder)) for group in groups for folder in group.folders]
    every = " ".join(runs)
    calibrated = any(key.startswith("calibration.") for group in groups for key in group.settings)
    ways = []
    if not files:
        ways.append(f"pyunlearn compare {every} --out FOLDER   # as a page with figures, CSV, JSON and LaTeX")
    if len(groups) > 1 and not calibrated:
        ways.append(f'for run in {every}; do pyunlearn calibrate uwc "$run"; done   # so that all keep as much')
    if len(runs) >= FEWEST and not calibrated:
        ways.append(f"pyunlearn reliability {every} --out FOLDER   # which metrics to trust")
    lines = [f"{what:8}{path}" for what, path in files.items()]
    if ways:
        lines += ["", "try next", *(f"  {way}" for way in ways)]
    console.print("\n" + visible("\n".join(lines).lstrip("\n")), highlight=False, soft_wrap=True, markup=False)


def tell(comparison: Comparison, console: Console) -> None:
    """Groups as columns: a screen has room for few of them, and for any number of metrics."""
    groups = comparison.groups
    for note in comparison.warnings:
        console.print(f"[bold yellow]note[/] {shown(note)}", highlight=False)
    table = Table("set", "metric", title="after unlearning", title_justify="left", collapse_padding=True)
    table.add_column("before", justify="right")
    for group in groups:
        runs = f" ({len(group.folders)} seeds)" if len(group.folders) > 1 else ""
        table.add_column(shown(group.name + runs), justify="right")
    table.add_row("verdict", "", "", *(group.verdict for group in groups), end_section=True)
    for i, column in enumerate(comparison.columns):
        last = i + 1 == len(comparison.columns)
        cells = [comparison.before(column), *(comparison.text(group, column) for group in groups)]
        table.add_row(column[0], column[1].replace("_", " "), *cells, end_section=last)
    print_table(console, table)
    if comparison.differences:
        names = [shown(group.name) for group in groups]
        settings = Table("setting", *names, title="what they differ in", title_justify="left", show_lines=True)
        for key, values in comparison.differences.items():
            settings.add_row(shown(key), *(shown(as_text(value)) for value in values))
        print_table(console, settings)
    for note in comparison.remarks:
        console.print(visible(note), highlight=False, markup=False)
    if any(len(group.folders) > 1 for group in groups):
        console.print(
            f"± half of the {LEVEL:.0%} interval of the mean over seeds (Student's t): with few of them it is wide",
            highlight=False,
        )
    if any(group.interval(column) for group in groups for column in comparison.columns):
        console.print(
            f"[] the {LEVEL:.0%} interval of a run's mean over such samples (bootstrap)", highlight=False, markup=False
        )
