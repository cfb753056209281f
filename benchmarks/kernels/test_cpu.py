"""Run by `python -m benchmarks cpu` under pytest-benchmark: every case by every implementation, same process."""

from __future__ import annotations

import itertools
import os
import time

import pytest
import torch

from ..measure import error_of, keep_freed_memory, peak_bytes
from .cases import Case
from .impls import KEPT, implementations
from .plans import cpu_cases

CASES = cpu_cases(small=bool(os.environ.get("PYUNLEARN_BENCH_SMALL")))
PAIRS = [(case, impl) for case in CASES for impl in implementations(case)]
PAIRS.sort(key=lambda pair: pair[1].endswith(KEPT))  # there is no way back to fresh memory


def label(value: object) -> str:
    return value if isinstance(value, str) else f"{value.op}-{value.name}-{str(value.dtype)[6:]}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("case", "impl"), PAIRS, ids=label)
def test_case(benchmark, case: Case, impl: str) -> None:  # type: ignore[no-untyped-def]
    run, _, exact, traffic = implementations(case)[impl]
    error = error_of(case.sample(run(case, case.fresh())), case.answer) if exact else None
    t = case.fresh()
    start = time.perf_counter()
    peak = peak_bytes(lambda: run(case, t), "cpu")
    # A first touch of fresh memory can take ten times a short run: a median needs more of those.
    share = 3 if time.perf_counter() - start < 1 else 1
    rounds, counter = share * int(os.environ.get("PYUNLEARN_BENCH_ROUNDS", "9")), itertools.count(1)
    if impl.endswith(KEPT):
        keep_freed_memory()
    benchmark.pedantic(run, setup=lambda: ((case, case.fresh(next(counter))), {}), rounds=rounds, warmup_rounds=1)
    case.done()
    benchmark.extra_info.update(
        op=case.op, case=case.name, impl=impl, device="cpu", dtype=str(case.dtype)[6:], N=case.n, V=case.v, H=case.h,
        bytes=traffic or case.bytes, peak_bytes=peak, error_vs_fp64=error, threads=torch.get_num_threads(),
    )  # fmt: skip
