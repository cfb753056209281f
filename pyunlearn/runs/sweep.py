"""All runs of a grid in one folder, then a comparison. What is finished stays, and the same command goes on.

job.json             whose folder it is: a grid's, by name
starts/NAME/         what runs of equal model, data, evaluation and seed begin with, made once: memorised, evaluated
                     before, the models that are held against; a run folder that has not unlearned
references/          what frozen references say, by content, of all runs
runs/NAME/seedN/     a run folder for each; what is of its start is there by hard links
failed/NAME-seedN.txt    what went wrong in a run, until the same command has it finished
compare.html, compare.csv, compare.json, compare.tex     of the runs that are finished
worker-N.log         what worker processes wrote to their terminal
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .._files import check_writable, read_json, write_file, write_folder, write_json, write_text
from .._terminal import print_table, shown, visible
from ..metrics.utility import utility_set
from ..model.load import EMBEDDED
from ..report.compare import Comparison
from ..store import differences, digest_json, own
from ..training.stage import Interrupted
from .anchors import ANCHORS
from .compare import AGGREGATE, FILES, compare
from .config import RunConfig
from .folder import LOCK, MARK, RunFolder, compared, config_text, with_defaults
from .grid import Cell, Grid
from .lock import held
from .run import prepare, run, unmeasured
from .table import rows_of_sets
from .workers import FAILED, FINISHED, STOPPED, Here, Outcome, Processes, Ray, Task, Workers

FORMAT = "pyunlearn-sweep-1"
NOT_SHARED = {MARK, LOCK, "config.yaml"}  # of a start's folder: a run has its own
GROWS = {"metrics.jsonl"}  # written on in place
NEW, UNFINISHED, DONE, WRONG = "to run", "to go on with", "finished", "failed"
MEASURED = (("forget", "probability"), ("forget", "rouge_l"), ("forget", "fluency"))


@dataclass(frozen=True)
class SweepResult:
    """failed: what went wrong, by run."""

    folder: Path
    cells: list[Cell]
    failed: dict[str, str]
    comparison: Comparison | None


@dataclass
class Sweep:
    """A grid's runs and where they go."""

    grid: Grid
    cells: list[Cell]
    folder: Path
    command: str = "pyunlearn sweep"
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def references(self) -> Path:
        return self.folder / "references"

    def error_file(self, cell: Cell) -> Path:
        return self.folder / "failed" / f"{cell.name}-seed{cell.seed}.txt"

    def state(self, cell: Cell) -> str:
        if is_finished(cell.config):
            return DONE
        if self.error_file(cell).is_file():
            return WRONG
        return UNFINISHED if RunFolder(cell.config.folder).marked else NEW

    def start(self, cell: Cell) -> RunConfig:
        """What the cell begins with, as a run of its own."""
        config = start_of(cell.config)
        name = f"seed{config.seed}-{digest_json(compared(config.to_dict()))[:12]}"
        return config.model_copy(update={"output": str(self.folder / "starts" / name)})

    def task(self, cell: Cell, start: Path, place: Path) -> Task:
        return Task(str(cell), partial(finish_cell, cell, start, self.references), place)

    def own(self) -> None:
        """Raises ValueError for a folder of another grid or of other files."""
        own(self.folder, {"format": FORMAT, "grid": self.grid.name}, "--out")

    def check(self) -> None:
        """Raises ValueError as `own`, and for a run that is there with other settings than the grid's."""
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            self.own()
        for cell in self.cells:
            folder = RunFolder(cell.config.folder)
            if not folder.marked:
                continue
            there = compared(with_defaults(folder.read_config()))
            if changed := differences(there, compared(cell.config.to_dict())):
                raise ValueError(
                    f"{cell}: {folder.path} was begun with other settings ({changed[0]}); values, seeds and sections "
                    "of axes may be added to a grid, or left out; for other settings choose --out FOLDER"
                )


def start_of(config: RunConfig) -> RunConfig:
    """As far as runs are alike before they unlearn: no adapter, no objectives; but for those that read refusals of our
    own, as the embedded model's tokenizer is made of all texts."""
    values = config.to_dict()
    values["model"]["lora"] = values["model"]["lora"] if config.model.quantize else None
    values["evaluate"] |= {"every": None, "pick": None, "goal": None}
    refusals = config.needs_refusals and config.data.source != EMBEDDED and config.data.refusals is None
    unlearn: dict[str, Any] = {"forget": "idk" if refusals else "ga", "retain": []}
    return RunConfig.model_validate({**values, "name": "start", "unlearn": unlearn, "geffect": None})


def is_finished(config: RunConfig) -> bool:
    folder = RunFolder(config.folder)
    wanted = ("before", "after", *config.evaluate.anchors)
    return (folder.path / "table.json").is_file() and not unmeasured(folder, wanted)


def begin(start: RunFolder, config: RunConfig) -> None:
    """The run's folder with all that its start has, there whole or not at all."""

    def fill(temporary: Path) -> None:
        for path in start.path.rglob("*"):
            inside = path.relative_to(start.path)
            if inside.parts[0] in NOT_SHARED or inside.parts[0].startswith("."):
                continue
            if path.is_dir():
                (temporary / inside).mkdir(parents=True, exist_ok=True)
                continue
            (temporary / inside).parent.mkdir(parents=True, exist_ok=True)
            link(path, temporary / inside)
        mark = read_json(start.path / MARK, f"delete {start.path}, and it is made again")
        write_json(temporary / MARK, mark)  # of the same data and model
        write_text(temporary / "config.yaml", config_text(config))

    write_folder(config.folder, fill)


def link(path: Path, place: Path) -> None:
    if path.name not in GROWS:
        with suppress(OSError):  # not every file system has links
            os.link(path, place)
            return
    write_file(place, lambda temporary: shutil.copyfile(path, temporary))


def catch_up(start: RunFolder, folder: RunFolder) -> None:
    """What models say that the run is held against since it was begun."""
    for name in unmeasured(folder, ANCHORS):
        own = start.path.glob(f"evaluation/{name}*")
        for path in sorted(own, key=lambda path: path.suffix == ".json"):  # the means, which say that it is whole, last
            place = folder.evaluation(path.name)
            place.unlink(missing_ok=True)
            link(path, place)


def finish_cell(cell: Cell, start: Path, references: Path) -> list[dict[str, Any]]:
    """The run to its end, from where it is; its table."""
    folder = RunFolder(cell.config.folder)
    if folder.marked:
        catch_up(RunFolder(start), folder)
    else:
        begin(RunFolder(start), cell.config)
    command = f"pyunlearn run {shlex.quote(str(folder.path))}"
    return run(cell.config, resume=True, command=command, references=references).table


def sweep(
    grid: Grid,
    cells: Sequence[Cell],
    out: str | Path,
    *,
    workers: int = 1,
    ray: bool = False,
    console: Console | None = None,
    command: str = "pyunlearn sweep",
) -> SweepResult:
    """Every run of a grid (`grid.make_cells`) that is not finished in `out`, and a comparison of all.

    workers: processes, each with its share of the cores; 1 is this one. Results do not depend on it, but for the number
    of threads where a configuration sets none. ray: on Ray, where `workers` 1 leaves to it how many at once.

    A run that fails is told and kept, and the others go on. Raises ValueError as `Sweep.check`, InUse where another
    sweep works there, Interrupted after Ctrl-C, with what is under way resumable.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep: is one process that starts others; needs no torchrun")
    job = Sweep(grid, list(cells), Path(out), command)
    console = console or Console(quiet=True)
    job.check()
    check_writable(job.folder / LOCK, f"--out {job.folder}")
    job.own()
    with held(job.folder / LOCK, job.folder):
        todo = [cell for cell in job.cells if not is_finished(cell.config)]
        if todo:
            hired: Workers
            if ray:
                hired = Ray(workers if workers > 1 else None)
            else:
                hired = Here() if workers == 1 else Processes(workers, job.folder)
            with hired:
                work(job, todo, hired, console)
        return finish(job, console)


@dataclass(frozen=True)
class Unit:
    """What a worker is given: a start (cell is None), or a run from it."""

    task: Task
    start: Path
    cell: Cell | None = None


def work(job: Sweep, todo: Sequence[Cell], workers: Workers, console: Console) -> None:
    """The starts first; each then has its runs follow."""
    place = Path.cwd()
    waiting: dict[Path, list[Cell]] = {}  # by their start
    ready: deque[Unit] = deque()
    for cell in todo:
        start = job.start(cell)
        if start.folder not in waiting:
            task = Task(f"{start.folder.name} begins", partial(prepare, start, command=job.command), place)
            ready.append(Unit(task, start.folder))
        waiting.setdefault(start.folder, []).append(cell)
    done = len(job.cells) - len(todo)
    console.print(
        f"[bold]sweep[/] {shown(job.grid.name)}: {len(job.cells)} runs, {done} of them finished, {len(ready)} "
        f"start{'s' if len(ready) > 1 else ''}; in {shown(job.folder)}",
        soft_wrap=True,
    )
    under_way: dict[str, Unit] = {}  # by the task's name
    with bar_of(console) as bar:
        row = bar.add_task("", total=len(job.cells), completed=done)

        def take(task: Task, outcome: Outcome) -> None:
            unit = under_way.pop(task.name)
            if outcome.state == STOPPED:
                return
            cells = waiting.pop(unit.start) if unit.cell is None else [unit.cell]
            if unit.cell is None and outcome.state == FINISHED:
                ready.extend(Unit(job.task(cell, unit.start, place), unit.start, cell) for cell in cells)
                return
            for cell in cells:
                tell_ended(job, cell, outcome, console)
                bar.advance(row)

        try:
            while ready or under_way:
                while ready and workers.free:
                    unit = ready.popleft()
                    under_way[unit.task.name] = unit
                    if unit.cell is None and unmeasured(RunFolder(unit.start), ("before",)):
                        tell_begun(unit.start.name, [str(cell) for cell in waiting[unit.start]], console)
                    workers.submit(unit.task)
                bar.update(row, description=told_names(list(under_way)))
                for task, outcome in workers.wait():
                    take(task, outcome)
                    if outcome.state == STOPPED:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            bar.update(row, description="stopping")
            for task, outcome in workers.stop():
                take(task, outcome)
            finished = sum(is_finished(cell.config) for cell in job.cells)
            raise Interrupted(
                f"stopped; {finished} of {len(job.cells)} runs are finished, and what was under way is kept\n"
                f"resume with: {job.command}"
            ) from None


def told_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return visible(f"{names[0]}{more}") if names else ""


def bar_of(console: Console) -> Progress:
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    return Progress(*columns, console=console, transient=not console.is_terminal, disable=console.quiet)


def tell_begun(name: str, runs: Sequence[str], console: Console) -> None:
    """Of a start, which takes a while and has no line of its own."""
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    text = f"begins {shown(name)}: what {count} will start from ({shown(told_names(runs))})"
    console.print(text, highlight=False, soft_wrap=True)


def tell_ended(job: Sweep, cell: Cell, outcome: Outcome, console: Console) -> None:
    file = job.error_file(cell)
    if outcome.state == FAILED:
        job.failed[str(cell)] = outcome.text
        write_text(file, f"{cell}\n{outcome.text}\n\n{outcome.trace}")
        console.print(f"[bold red]failed[/] {shown(cell)}: {shown(outcome.text)}", highlight=False, soft_wrap=True)
        return
    file.unlink(missing_ok=True)
    values = {(line["set"], line["metric"]): line for line in outcome.value}
    kept = utility_set(rows_of_sets(outcome.value))
    wanted = [("forget", "probability")] + ([] if kept is None else [(kept, "probability")])
    told = [f"{name} probability {values[name, metric]['before']:.3f} -> {values[name, metric]['after']:.3f}"
            for name, metric in wanted if (name, metric) in values]  # fmt: skip
    console.print(f"[green]done[/] {shown(cell)}: {', '.join(told)}", highlight=False, soft_wrap=True)


def finish(job: Sweep, console: Console) -> SweepResult:
    """Compares what is finished, and tells how it went."""
    folders = [cell.config.folder for cell in job.cells if is_finished(cell.config)]
    comparison = None
    if folders:
        comparison = compare(folders, out=job.folder)
        for note in comparison.warnings:
            console.print(f"[bold yellow]note[/] {shown(note)}", highlight=False)
        print_table(console, summary(comparison))
        for note in comparison.remarks:
            console.print(visible(note), highlight=False, markup=False)
    lines = [f"failed  {name}: {text}" for name, text in job.failed.items()]
    if job.failed:
        lines.append(f"what went wrong is in {job.folder / 'failed'}; the same command tries again: {job.command}")
    if comparison is not None:
        lines += [f"{what:8}{job.folder / name}" for what, name in FILES.items()]
        every = f"{shlex.quote(str(folders[0].parent.parent))}/*/seed*"
        beside = shlex.quote(f"{job.folder}-reliability")
        lines += [
            "",
            "try next",
            f'  for run in {every}; do pyunlearn calibrate uwc "$run"; done   # so that all keep as much',
            f"  pyunlearn reliability {every} --out {beside}   # which metrics to trust",
        ]
    console.print(visible("\n".join(lines)), highlight=False, soft_wrap=True, markup=False)
    return SweepResult(job.folder, job.cells, job.failed, comparison)


def summary(comparison: Comparison) -> Table:
    """A line a method, as a grid has many: what a screen has room for; intervals over samples are in the page."""
    wanted = [(AGGREGATE, "both"), *MEASURED, *((comparison.utility, metric) for metric in ("probability", "rouge_l"))]
    columns = [column for column in wanted if column in comparison.columns]
    title = "after unlearning; ± half of the 95 % interval of the mean over seeds (Student's t): wide with few of them"
    table = Table("method", "seeds", "verdict", title=title, title_justify="left", collapse_padding=True)
    for name, metric in columns:
        words = [*([] if name == AGGREGATE else [name]), *metric.replace("probability", "prob.").split("_")]
        table.add_column("\n".join(words), justify="right")
    before = (comparison.before(column).partition(" [")[0] for column in columns)
    table.add_row("before", "", "", *before, end_section=True)
    for group in comparison.groups:
        after = (comparison.text(group, column, intervals=False) for column in columns)
        table.add_row(shown(group.name), str(len(group.seeds)), group.verdict, *after)
    return table


def plan_table(job: Sweep) -> Table:
    """A line a method: its seeds by their state."""
    table = Table("run", "seeds", "state")
    by_name: dict[str, list[Cell]] = {}
    for cell in job.cells:
        by_name.setdefault(cell.name, []).append(cell)
    for name, cells in by_name.items():
        states = [job.state(cell) for cell in cells]
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        table.add_row(shown(name), " ".join(str(cell.seed) for cell in cells), told)
    return table


def told_plan(job: Sweep) -> str:
    """All of it in a line."""
    states = [job.state(cell) for cell in job.cells]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (DONE, UNFINISHED, WRONG, NEW) if state in states)
    starts = {job.start(cell).folder for cell in job.cells}
    begin = f"{len(starts)} start{'s' if len(starts) > 1 else ''}"
    return visible(f"{job.grid.name}: {len(job.cells)} runs from {begin}; {counts}; in {job.folder}")
