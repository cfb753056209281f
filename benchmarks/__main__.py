"""`python -m benchmarks [part ...]`: measure by every implementation on this machine, store JSON, write the report.

Parts: cpu (pytest-benchmark), logits, linear, weights, step (GPU; on a CPU only to try them), report (tables and
figures of what is stored), evidence (what is known of the GPU kernels without one), evaluation (the TOFU suite against
a plain loop; needs a model and data, see benchmarks/scale/evaluation.py), tofu_step (training steps on TOFU's rows,
lever by lever, against plain ones; the same, see benchmarks/scale/tofu_step.py). Default: all parts of kernels that
this machine has.
Results go to benchmarks/results/<device>/: a JSON file a part (one record a measurement, raw samples included), ops.md
and figures. A part that ends early goes on where it ended when it is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pyunlearn._hints import hint

from .kernels import cpu, evidence, report
from .kernels.run import PLANS, Chosen, Session, run
from .measure import machine
from .results import RESULTS

GPU_PARTS = (*PLANS, "step")
PARTS = ("cpu", *GPU_PARTS, "report", "evidence", "evaluation", "tofu_step")


def main(words: Sequence[str] | None = None, command: str = "python -m benchmarks") -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=command, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", metavar="part", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "-k", metavar="EXPR", default="", help='cpu: only cases that match, as in pytest -k, e.g. "NLL and bfloat16"'
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="cpu: samples, three times as many where short (default 9)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="cpu: torch threads (default: torch's own)"
    )
    for name, what in (
        ("impl", 'implementations, in full or by the first word: "cuda,triton,liger"'),
        ("case", 'cases, by a part of the name: "entropy,at once"'),
        ("shape", 'shapes, N x V or N x V x H: "8192x128256,4096x131072x4096"'),
        ("dtype", 'dtypes: "bfloat16"'),
    ):
        parser.add_argument(f"--{name}", default="", help=f"GPU parts: only these {what}")
    parser.add_argument("--seconds", type=float, default=420, help="GPU parts: time each may take (default 420)")
    parser.add_argument("--fresh", action="store_true", help="GPU parts: measure again what is stored")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="of the GPU parts")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default {RESULTS}/<device>)")
    args = parser.parse_args(words)
    parts = args.parts or ["cpu", *(GPU_PARTS if gpu else ())]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"part={unknown[0]!r}: {hint(unknown[0], PARTS)}")

    for part in parts:
        if part == "evidence":
            evidence.write(args.out or RESULTS)
            continue
        if part in ("evaluation", "tofu_step"):
            from .scale import evaluation, tofu_step  # need transformers

            where = [] if args.out is None else ["--out", str(args.out)]
            main_of = evaluation.main if part == "evaluation" else tofu_step.main
            main_of(["--device", args.device, *where, *(["--toy"] if args.small else [])])
            continue
        device = "cpu" if part == "cpu" else args.device
        out = args.out or RESULTS / machine(device)["folder"]
        if part == "cpu":
            status = cpu.run(out, args.k, args.rounds, args.small, args.threads)
        elif part == "report":
            status = 0
        else:
            session = Session(part, device, out, args.seconds, args.small, args.fresh)
            asked = (args.impl, args.case, args.shape, args.dtype)
            chosen = Chosen(*([*filter(None, given.split(","))] for given in asked))
            if part == "step":
                from .scale import step  # needs transformers

                status = step.run(session, chosen)
            else:
                status = run(part, session, chosen)
        if status != 0:
            return status
        report.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
