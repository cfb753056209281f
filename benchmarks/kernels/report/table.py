"""Records -> Markdown tables: one a case, or, where many shapes were measured, one for all shapes of a case."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch

from ...results import Record, is_ours
from ..cases import LINEAR_KINDS, MEMORY_BOUND, NORMS, Linear, Norms
from ..impls import KEPT
from ..peers import NOTES
from ..targets import CPU_TARGETS, goal, logits_bytes, share_beyond_results, with_limits

CASE = ("op", "case", "dtype", "N", "V", "H")


def heading(records: list[Record]) -> list[str]:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    threads = f"; {first['threads']} threads" if "threads" in first else ""
    commits = ", ".join(dict.fromkeys(r["commit"] for r in records))
    copies = [r["copy_gbps"] for r in records]
    copy = f"{min(copies)}" if min(copies) == max(copies) else f"{min(copies)} to {max(copies)}"
    samples = [len(r["time_ms"]["samples"]) for r in records if r["time_ms"]] or [0]
    counts = f"{min(samples)}" if min(samples) == max(samples) else f"{min(samples)} to {max(samples)}"
    gpu = "" if threads else " Times by CUDA events, all caches overwritten before each run, launches queued meanwhile."
    return [
        f"# Kernels on {first['device']}",
        "",
        f"Commit {commits}; {versions}{threads}. A large copy runs at {copy} GB/s (read + written). "
        f"Medians of {counts} samples; the range is in brackets. "
        "% of copy: the least traffic the case needs, over the time, over that rate. "
        "Peak memory is what a run takes beyond its inputs, results included. Error is max |x - fp64| / max |fp64|."
        f"{gpu}",
    ]


def by_case(records: list[Record]) -> list[str]:
    """A table a case, a line an implementation."""
    lines: list[str] = []
    ceilings = [teraflops(r) for r in records if r["op"] == "gemm" and r["time_ms"]]
    for key, group in groupby(sorted(records, key=first_seen(records, CASE)), key=lambda r: tuple(r[k] for k in CASE)):
        (op, case, dtype, n, v, h), rows = key, list(group)
        times = medians(rows)
        shape = f"N={n}, H={h}, V={v}" if h else f"N={n}, V={v}"
        if op in ("perturbed", "segment_dot"):
            shape = f"{n / 1e6:g} million elements, {v} tensor{'s' if v > 1 else ''}"
        of_product = ("% of a plain product",) if ceilings else ()
        rate = ("% of copy", "GB/s") if op in MEMORY_BOUND else ("TFLOP/s", *of_product)
        lines += ["", f"## {op}: {case}, {dtype}, {shape}", ""]
        lines += [
            f"| implementation | ms | x eager | {' | '.join(rate)} | peak MB | error | target |",
            "|---|---|---|" + "---|" * (len(rate) + 3),
        ]
        for r in rows:
            t, impl = r["time_ms"], r["impl"]
            if t is None:
                lines.append(f"| {impl} | {failure(r)} |" + " |" * (len(rate) + 4))
                continue
            others = with_limits(times, r)
            goals = [goal(others, impl, *target) for target in CPU_TARGETS.get((case, dtype, impl), [])]
            if case.endswith("beyond the budget") and is_ours(impl):
                bound = 8 if impl == "cpu" else 10
                share = share_beyond_results(r)
                goals.append(f"peak beyond results below 1/{bound} of the logits: 1/{1 / share:.1f}")
            cells = [
                impl,
                f"{figures(t['median'])} [{figures(t['min'])}, {figures(t['max'])}]",
                f"{times['eager'] / t['median']:.2f}" if "eager" in times and not impl.endswith(KEPT) else "",
                *rates(r, max(ceilings, default=None)),
                f"{r['peak_bytes'] / 1e6:.0f}",
                "" if r["error_vs_fp64"] is None else f"{r['error_vs_fp64']:.1e}",
                "; ".join(goals),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_shape(records: list[Record]) -> list[str]:
    """A table a case and dtype: a line a shape, a column an implementation; then what holds for all shapes."""
    lines: list[str] = []
    for case, dtype in dict.fromkeys((r["case"], r["dtype"]) for r in records):
        rows = [r for r in records if (r["case"], r["dtype"]) == (case, dtype)]
        impls = list(dict.fromkeys(r["impl"] for r in rows))
        records_at = {(r["N"], r["V"], r["impl"]): r for r in rows}
        lines += ["", f"## {case}, {dtype}", "", "ms (% of copy); bold: the fastest.", ""]
        lines += [f"| N | V | {' | '.join(impls)} |", "|---|---|" + "---|" * len(impls)]
        for n, v in sorted({(r["N"], r["V"]) for r in rows}):
            times = medians(r for r in rows if (r["N"], r["V"]) == (n, v))
            cells = [cell(records_at.get((n, v, impl)), min(times.values(), default=0.0)) for impl in impls]
            lines.append(f"| {n} | {v} | {' | '.join(cells)} |")
        lines += ["", "| implementation | largest error | peak memory / logits | failed |", "|---|---|---|---|"]
        for impl in impls:
            own = [r for r in rows if r["impl"] == impl]
            errors = [r["error_vs_fp64"] for r in own if r["error_vs_fp64"] is not None]
            shares = [r["peak_bytes"] / logits_bytes(r) for r in own if r["peak_bytes"] is not None]
            failed = dict.fromkeys(failure(r) for r in own if r["time_ms"] is None)
            cells = [
                impl,
                f"{max(errors):.1e}" if errors else "",
                f"{min(shares):.2f} to {max(shares):.2f}" if shares else "",
                "; ".join(failed),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def steps(records: list[Record]) -> list[str]:
    """Whole training steps; their memory is the whole of what is allocated."""
    lines: list[str] = []
    for case in dict.fromkeys(r["case"] for r in records):
        rows = [r for r in records if r["case"] == case]
        plain = next((r for r in rows if r["impl"] == "eager" and r["time_ms"]), None)
        lines += ["", f"## step: {case}", "", f"{rows[0]['N']} tokens a step; eager: the plain Hugging Face step.", ""]
        lines += ["| implementation | ms | x eager | peak GB | of eager's |", "|---|---|---|---|---|"]
        for r in rows:
            t = r["time_ms"]
            if t is None:
                lines.append(f"| {r['impl']} | {failure(r)} | | | |")
                continue
            cells = [r["impl"], f"{figures(t['median'])} [{figures(t['min'])}, {figures(t['max'])}]"]
            cells += [f"{plain['time_ms']['median'] / t['median']:.2f}" if plain else ""]
            cells += [f"{r['peak_bytes'] / 1e9:.1f}", f"{r['peak_bytes'] / plain['peak_bytes']:.2f}" if plain else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(records: list[Record]) -> list[str]:
    """What the peers compute where that is not the whole case."""
    named = [name for name in dict.fromkeys(r["impl"] for r in records) if name in NOTES]
    return ["", "## What the peers compute", "", *(f"- {name}: {NOTES[name]}" for name in named)] if named else []


def cell(record: Record | None, best: float) -> str:
    if record is None:
        return ""
    if record["time_ms"] is None:
        return "failed"
    median = record["time_ms"]["median"]
    text = f"{figures(median)} ({record['percent_of_copy']:.0f})"
    return f"**{text}**" if median == best else text


def rates(record: Record, ceiling: float | None) -> list[str]:
    if record["op"] in MEMORY_BOUND:
        percent = record["percent_of_copy"]
        return [f"{percent:.0f}", f"{record['bytes'] / record['time_ms']['median'] / 1e6:.1f}"]
    reached = teraflops(record)
    of_product = [f"{100 * reached / ceiling:.0f}" if reached else ""] if ceiling else []
    return [f"{reached:.3g}" if reached else "", *of_product]


def teraflops(record: Record) -> float:
    """Of the products the case cannot avoid; 0 where they are not counted."""
    n, v, h = record["N"], record["V"], record["H"]
    flops = 2 * n * v * h if record["op"] == "gemm" else 0
    if record["case"] in LINEAR_KINDS:
        flops = Linear(record["case"], getattr(torch, record["dtype"]), n, v, h).flops
    if record["case"] in NORMS:
        flops = Norms(record["case"], getattr(torch, record["dtype"]), v, h).flops
    return flops / record["time_ms"]["median"] / 1e9


def medians(records: Iterable[Record]) -> dict[str, float]:
    return {r["impl"]: r["time_ms"]["median"] for r in records if r["time_ms"]}


def failure(record: Record) -> str:
    return "failed: " + " ".join(record["failed"].split())[:160].replace("|", "/")


def figures(ms: float) -> str:
    """Milliseconds: one decimal from 10 ms, three below 1."""
    return f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def first_seen(records: list[Record], names: tuple[str, ...]) -> Any:
    order = {key: i for i, key in enumerate(dict.fromkeys(tuple(r[k] for k in names) for r in records))}
    return lambda r: order[tuple(r[k] for k in names)]
