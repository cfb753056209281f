"""The experiments of the MRD paper (arXiv:2504.06658) over again, one command a figure; results as JSON and SVG.

    python -m benchmarks.studies.mrd difficulty        MRD against updates to forget a sample (Figures 3, 4)
    python -m benchmarks.studies.mrd efficiency        SGA against CGA: updates until all samples are forgotten
    python -m benchmarks.studies.mrd methods           GradDiff, NPO, PO with and without MRD (Table 1)
    python -m benchmarks.studies.mrd sensitivity       MRD against sigma and number of draws (Figure 5)
    python -m benchmarks.studies.mrd choice            GradDiff against NPO on other forget samples (Figure 2)
    python -m benchmarks.studies.mrd characteristics   what samples of high and of low MRD are like (Table 7)
    python -m benchmarks.studies.mrd                   all of them

By default on the embedded world: its model learns 400 pairs by heart, one world and model a seed. Smaller, for a
machine with two cores, a pretrained model that knows both files already (`pyunlearn run examples/smollm2_tofu.yaml`
leaves one in runs/smollm2_tofu/memorised):

    python -m benchmarks.studies.mrd difficulty sensitivity --samples 8 --seeds 2 --steps 20 \\
        --name mrd_study_smollm2 --model runs/smollm2_tofu/memorised --forget tofu/forget01.jsonl \\
        --retain tofu/retain99.jsonl --retain-limit 40 --threads 2

(methods and efficiency with --samples 4, choice with --samples 5 --steps 10).

Every unlearning is kept in --work as soon as it is done: the same command goes on where it stopped. Intervals are 95 %:
Student's t over seeds, Fisher's z with the variance of Bonett and Wright for rank correlations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from pyunlearn._files import write_text
from pyunlearn._hints import hint
from pyunlearn.report.figures import STYLE
from pyunlearn.training.stage import Interrupted

from ...measure import commit, machine, versions
from ...results import RESULTS
from .figures import FIGURES
from .study import Study


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.mrd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="*", metavar="figure", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--model", help="folder or GGUF file of a model that knows --forget and --retain")
    parser.add_argument("--forget", help="JSON lines with question and answer")
    parser.add_argument("--retain", help="the same")
    parser.add_argument("--retain-limit", type=int, default=160, help="only the first samples of --retain")
    parser.add_argument("--samples", type=int, help="a small study: of so many samples, with fewer draws and sets")
    parser.add_argument("--seeds", type=int, default=5, help="of efficiency and methods")
    parser.add_argument("--steps", type=int, default=200, help="most updates to forget a sample")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate on one sample an update")
    parser.add_argument("--batch-rate", type=float, default=2e-4, help="learning rate on batches of 4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/mrd_study"), help="where finished runs are kept")
    parser.add_argument("--name", default="mrd_study", help="of the files written")
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/<device>)")
    args = parser.parse_args(words)
    if unknown := [name for name in args.figures if name not in FIGURES]:
        parser.error(f"figure={unknown[0]!r}: {hint(unknown[0], FIGURES)}")
    if (args.model is None) != (args.forget is None) or (args.model is None) != (args.retain is None):
        parser.error("--model, --forget and --retain belong together")
    torch.set_num_threads(args.threads)
    out = args.out or RESULTS / machine()["folder"]
    out.mkdir(parents=True, exist_ok=True)
    try:
        draw(Study(args), args.figures or list(FIGURES), out)
    except Interrupted as interrupt:
        print("stopped; the same command goes on with the unlearning that was under way", file=sys.stderr)
        raise SystemExit(interrupt.exit_code) from None


def draw(study: Study, names: list[str], out: Path) -> None:
    """Each figure with its record, and the page of all that are there."""
    args = study.args
    for name in names:
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
            result, text, figure = FIGURES[name](study)
            figure.savefig(out / f"{args.name}_{name}.svg", metadata={"Date": None})
        record = {"figure": name, "data": args.forget and Path(args.forget).name, "text": text, "result": result,
                  "device": machine()["name"], "threads": args.threads, "versions": versions(),
                  "commit": commit()}  # fmt: skip
        write_text(out / f"{args.name}_{name}.json", json.dumps(without_nan(record)) + "\n")
        print(f"\n## {name}\n\n{text}\n", flush=True)
        write_tables(out, args.name)


def write_tables(out: Path, study: str) -> None:
    """The tables of all figures that are there."""
    stored = [json.loads(path.read_text()) for name in FIGURES if (path := out / f"{study}_{name}.json").is_file()]
    parts = [f"## {one['figure'].capitalize()}\n\n{one['text']}\n\n![{one['figure']}]({study}_{one['figure']}.svg)"
             for one in stored]  # fmt: skip
    source = stored[0]["data"] or "the embedded world"
    title = f"# Memory Removal Difficulty on {source}\n\n{stored[0]['device']}"
    write_text(out / f"{study}.md", "\n\n".join([title, *parts]) + "\n")


def without_nan(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
