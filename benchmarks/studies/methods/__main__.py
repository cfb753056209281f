"""Every method on one world, beside a model that never saw what they forget, on rows that they never rehearsed.

    python -m benchmarks.studies.methods embedded         every recipe, a world and a model a seed (grid:embedded)
    python -m benchmarks.studies.methods smollm2_tofu     the main ones on SmolLM2-135M and TOFU (make model)
    python -m benchmarks.studies.methods --small          a few, on a world that takes seconds, to see the form

Each writes methods/<world>.md and .json into --out. It is a sweep in --work, whose runs are then calibrated by UWC, the
plain ones by CRU too, and those of the first seed attacked, to see which metrics say the same then: what is finished
stays, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from pyunlearn._files import write_json, write_text
from pyunlearn._hints import hint
from pyunlearn._terminal import make_console
from pyunlearn.metrics import get_metric
from pyunlearn.runs.cru import calibrate_cru
from pyunlearn.runs.grid import Cell, Grid, load_grid, make_cells
from pyunlearn.runs.reliability import METRICS, Settings, measure_reliability
from pyunlearn.runs.sweep import sweep
from pyunlearn.runs.uwc import calibrate_uwc
from pyunlearn.runs.workers import FINISHED, Here, Outcome, Processes, Task, Workers
from pyunlearn.training.stage import Interrupted

from ...measure import machine
from ...results import RESULTS
from ..closer_look.__main__ import TOY
from .numbers import FEWEST, GROUPS, Study, as_dict, read_study
from .page import page

WORLDS = {"embedded": "grid:embedded", "smollm2_tofu": str(Path(__file__).parent / "smollm2_tofu.yaml")}
SETTINGS = Settings(samples=40)  # of the attacks; SmolLM2 takes minutes to write
NOTHING = "has forgotten nothing"  # in what CRU says then
FEW = ("ga", "graddiff", "me_gd", "idk_gd", "idk_ap", "wga_kl")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("worlds", nargs="*", metavar="WORLD", help=f"of {', '.join(WORLDS)} (default: embedded)")
    parser.add_argument("--seeds", type=int, help="of the grid's (default: all of them)")
    parser.add_argument("--tofu", type=Path, default=Path("tofu"), help="folder with TOFU's JSON lines (default tofu)")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the GGUF file (default models)")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes every run")
    parser.add_argument(
        "--runs-alone", action="store_true", help="no calibration and no attacks, which take as long again"
    )
    parser.add_argument("--small", action="store_true", help="a few methods on a tiny embedded world")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="where runs are kept")
    args = parser.parse_args(words)
    if unknown := [name for name in args.worlds if name not in WORLDS]:
        parser.error(f"world={unknown[0]!r}: {hint(unknown[0], WORLDS)}")
    out = (args.out or RESULTS / machine()["folder"]) / "methods"
    out.mkdir(parents=True, exist_ok=True)
    for name in args.worlds or ["embedded"]:
        study = measure(name, args)
        write_json(out / f"{name}.json", as_dict(study))
        write_text(out / f"{name}.md", page(study, name))


def measure(name: str, args: argparse.Namespace) -> Study:
    """Raises SystemExit after Ctrl-C, and where a run failed: a page is of all of them."""
    grid, changes = load_grid(WORLDS[name]), list(args.set)
    if args.small:
        grid = replace(grid, axes=[{"unlearn.recipe": list(FEW)}], seeds=[0, 1])
        changes = [*(f"{key}={value}" for key, value in TOY.items()), *changes]
    grid = replace(grid, seeds=grid.seeds[: args.seeds])
    work = args.work / (f"{name}-small" if args.small else name)
    cells = make_cells(placed(grid, args) if name == "smollm2_tofu" else grid, work, changes)
    try:
        command = f"python -m benchmarks.studies.methods {name}"
        result = sweep(grid, cells, work, workers=args.workers, console=make_console(), command=command)
    except Interrupted as interrupt:
        print(interrupt)
        raise SystemExit(interrupt.exit_code) from None
    if result.failed:
        raise SystemExit(1)
    if args.runs_alone:
        return read_study(result.cells)
    mixed = [cell for cell in result.cells if not combines(cell)]
    calibrate("uwc", mixed, args.workers, work)
    layered = calibrate("cru", [cell for cell in mixed if cell.name in GROUPS], args.workers, work)
    attacked = [cell.config.folder for cell in mixed if cell.seed == grid.seeds[0]]
    reliable = work / "reliability"
    if len(attacked) >= FEWEST:
        metrics = [metric for metric in METRICS if name == "embedded" or "written" not in get_metric(metric).needs]
        measure_reliability(
            attacked, out=reliable, metrics=metrics, settings=SETTINGS, console=make_console(), command=command
        )
    return read_study(result.cells, mixed, layered, reliable)


def calibrate(method: str, cells: Sequence[Cell], workers: int, work: Path) -> list[Cell]:
    """Those that are calibrated, now or before: without what has forgotten nothing, of which CRU cannot choose layers.

    Raises SystemExit where one fails otherwise.
    """
    todo = [cell for cell in cells if not (cell.config.folder / method / "table.json").is_file()]
    done = [cell for cell in cells if cell not in todo]
    with Here() if workers == 1 else Processes(workers, work / method) as hired:
        by_name = {str(cell): cell for cell in todo}
        for task, outcome in finish([task_of(method, cell) for cell in todo], hired):
            print(f"{method} of {task.name}: {outcome.text or 'done'}", flush=True)
            if outcome.state == FINISHED:
                done.append(by_name[task.name])
            elif NOTHING not in outcome.text:
                raise SystemExit(1)
    return [cell for cell in cells if cell in done]


def combines(cell: Cell) -> bool:
    """Whether what a run leaves is two models side by side."""
    reinforce = cell.config.unlearn.reinforce
    return reinforce is not None and reinforce.into == "logits"


def task_of(method: str, cell: Cell) -> Task:
    # by probabilities, as truth ratios of what collapses may be no nearer to the retrained model's
    by: Callable[[Path], object] = calibrate_uwc if method == "uwc" else partial(calibrate_cru, forgetting="forgotten")
    return Task(str(cell), partial(by, cell.config.folder), Path.cwd())


def finish(tasks: Sequence[Task], workers: Workers) -> Iterator[tuple[Task, Outcome]]:
    waiting, under_way = list(tasks), 0
    while waiting or under_way:
        while waiting and workers.free:
            workers.submit(waiting.pop(0))
            under_way += 1
        for ended in workers.wait():
            under_way -= 1
            yield ended


def placed(grid: Grid, args: argparse.Namespace) -> Grid:
    """With the folders of this machine."""
    run = copy.deepcopy(grid.run)
    run["model"]["name_or_path"] = str(args.models)
    for role in ("forget", "retain"):
        run["data"][role]["path"] = os.path.join(args.tofu, Path(run["data"][role]["path"]).name)
    run["data"]["refusals"] = os.path.join(args.tofu, Path(run["data"]["refusals"]).name)
    return replace(grid, run=run)


if __name__ == "__main__":
    main()
