"""Runs cases by implementations on a GPU (or, to try the code, on a CPU) within a time, and resumes where it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..measure import commit, copy_gbps, error_of, machine, peak_bytes, release, spread, timed, versions
from ..results import Record, Records
from .cases import MEMORY_BOUND, Impl
from .impls import implementations
from .plans import gpu_linear, gpu_logits, gpu_weights

PLANS: dict[str, Any] = {"logits": gpu_logits, "linear": gpu_linear, "weights": gpu_weights}
DEVICE_LOST = 75  # exit status: a kernel broke the CUDA context; a new process goes on from here


class Session:
    """What every record of one run shares: the device, its copy bandwidth, the commit, the versions, the deadline."""

    def __init__(self, part: str, device: str, out: Path, seconds: float, small: bool = False, fresh: bool = False):
        self.device, self.small, self.end = device, small, time.monotonic() + seconds
        self.records = Records(out / f"{part}.json", commit(), versions(device), fresh)
        self.copy_gbps = copy_gbps(device, 16 if small else 256 if device == "cpu" else 4096)
        self.name = machine(device)["name"]

    def late(self) -> bool:
        return time.monotonic() > self.end

    def blank(self, case: Any, impl: str) -> Record:
        """The record of a measurement that is yet to be made."""
        threads = {"threads": torch.get_num_threads()} if self.device == "cpu" else {}
        return {
            "op": case.op, "case": case.name, "impl": impl, "device": self.name, "dtype": str(case.dtype)[6:],
            "N": case.n, "V": case.v, "H": case.h, "time_ms": None, "bytes": case.bytes,
            "copy_gbps": round(self.copy_gbps, 1), "percent_of_copy": None, "peak_bytes": None, "error_vs_fp64": None,
            "commit": self.records.commit, "versions": self.records.versions, **threads,
        }  # fmt: skip


class Chosen(NamedTuple):
    """What of a plan is run; nothing given: all of it."""

    impls: Sequence[str] = ()  # in full, or the first word: "cuda" and "cuda in place"
    cases: Sequence[str] = ()  # parts of their names
    shapes: Sequence[str] = ()  # "8192x128256" (N x V) or "4096x131072x4096" (N x V x H)
    dtypes: Sequence[str] = ()

    def case(self, case: Any) -> bool:
        shape = "x".join(str(size) for size in (case.n, case.v, case.h) if size)
        return (
            (not self.cases or any(part in case.name for part in self.cases))
            and (not self.shapes or shape in self.shapes)
            and (not self.dtypes or str(case.dtype)[6:] in self.dtypes)
        )

    def impl(self, name: str) -> bool:
        return not self.impls or name in self.impls or name.split()[0] in self.impls


def run(part: str, session: Session, chosen: Chosen = Chosen()) -> int:  # noqa: B008
    """Measures what of `part` is chosen and not in the file yet. Returns an exit status."""
    left = measured = 0
    for case, compiled in filter(lambda pair: chosen.case(pair[0]), PLANS[part](session.device, session.small)):
        torch.cuda.empty_cache()  # the default budget of linear_token_stats is a share of what is free
        for name, impl in implementations(case).items():
            record = session.blank(case, name)
            if (name == "compile") != compiled or not chosen.impl(name) or session.records.has(record):
                continue
            if session.late():
                left += 1
                continue
            record |= measure(session, case, impl)
            session.records.add(record)
            measured += 1
            print(line(record), flush=True)
            if "failed" in record:
                release()
            if lost(session.device):
                print("the CUDA context is lost: the next process goes on after this measurement")
                return DEVICE_LOST
    print(f"{part}: {measured} measured, {left} left for the next run")
    return 0


def measure(session: Session, case: Any, impl: Impl) -> Record:
    """Error, peak memory and time of one case by one implementation; a failure is a result too, with its text."""
    figures: Record = {"bytes": impl.bytes or case.bytes}
    try:
        if impl.exact:
            results = case.sample(impl.run(case, case.fresh()))
            answer = case.answer_of(impl.loss) if impl.loss is not None else case.answer
            figures["error_vs_fp64"] = float(f"{error_of(results, answer):.3g}")
            del results, answer
        figures["peak_bytes"] = peak_bytes(partial(impl.run, case, case.fresh()), session.device)
        samples = timed(case.fresh, partial(impl.run, case), session.device, 0.02 if session.small else 0.2)
        figures["time_ms"] = spread(samples)
    except Exception as error:  # a peer may fail in any way
        figures["failed"] = f"{type(error).__name__}: {error}"[:300]
    else:
        if case.op in MEMORY_BOUND:
            percent = 100 * figures["bytes"] / 1e6 / figures["time_ms"]["median"] / session.copy_gbps
            figures["percent_of_copy"] = round(percent, 2)
    finally:
        case.done()
    return figures


def lost(device: str) -> bool:
    """Whether a kernel left the CUDA context unusable (an illegal address is reported by every later call)."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def line(record: Record) -> str:
    shape = f"N={record['N']} V={record['V']}" + (f" H={record['H']}" if record["H"] else "")
    head = f"{record['case']}, {record['dtype']}, {shape}: {record['impl']}"
    if "failed" in record:
        return f"{head}: failed: {record['failed'].splitlines()[0][:120]}"
    percent = record["percent_of_copy"]
    return f"{head}: {record['time_ms']['median']:.4g} ms" + ("" if percent is None else f", {percent:.0f} % of copy")
