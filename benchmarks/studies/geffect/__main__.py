"""python -m benchmarks.studies.geffect [FIGURE ...]: figures of the G-effect paper, on the embedded model.

Each figure is drawn from the records of its runs (in runs.json beside it); a run without one is computed first, in a
folder under --work. After Ctrl-C the same command goes on. Without a figure: all of them, and the page that says which
of the paper's observations hold. Another model and data: --base FILE.yaml (see `pyunlearn run`) and --set, e.g.

    make model
    python -m benchmarks.studies.geffect fig09 --base benchmarks/studies/geffect/smollm2_tofu.yaml \\
        --out OUT --set data.forget.path=TOFU/forget01.jsonl --set data.retain.path=TOFU/retain99.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pyunlearn._hints import hint
from pyunlearn.runs import load_config

from ...measure import machine
from ...results import RESULTS
from . import page
from .figures import FIGURES, write
from .runs import RUNS, Record, measure

HERE = Path(__file__).parent


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.geffect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", metavar="FIGURE", nargs="*", help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--base", type=Path, default=HERE / "embedded.yaml", help="the run that all others vary")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the base")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>/geffect)")
    parser.add_argument("--work", type=Path, help="where the runs go on (default runs/geffect-<name of the base>)")
    args = parser.parse_args(words)
    if unknown := [name for name in args.figures if name not in FIGURES]:
        parser.error(f"figure={unknown[0]!r}: {hint(unknown[0], FIGURES)}")
    base, out = load_config(args.base, args.set), args.out or RESULTS / machine()["folder"] / "geffect"
    work, console = args.work or Path("runs") / f"geffect-{base.name}", Console(stderr=True)
    records: dict[str, Record] = {}
    for name in args.figures or FIGURES:
        for run in FIGURES[name].runs:
            records[run] = records.get(run) or measure(base, run, out, work, console)
        console.print(write(name, {run: records[run] for run in FIGURES[name].runs}, out))
    if not args.figures:
        console.print(page.write({run: records[run] for run in RUNS}, out))


if __name__ == "__main__":
    main()
