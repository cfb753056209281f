"""What was set out to be reached on a CPU and on an H200, held against the records: met, missed or not measured yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from ..results import Record, is_ours
from .cases import (
    AT_ONCE,
    BEYOND,
    ENTROPY,
    KL,
    LINEAR_KINDS,
    MANY_PAIRS,
    MANY_TENSORS,
    MEAN,
    NLL,
    NORMS,
    ONE_PAIR,
    ONE_TENSOR,
    STATISTICS,
    TOKENS_ENTROPY,
)
from .impls import KEPT, WRITE

COPY = "a copy of as many bytes"
IN_PLACE_AND_WRITE = f"cpu in place and {WRITE}"  # out of place there is one stream more, and memory is fresh
# (case, dtype, impl) -> on a CPU: at least so many times as fast as another implementation, as COPY or as
# IN_PLACE_AND_WRITE, or, below 1, at most 1/ratio of its time.
CPU_TARGETS: dict[tuple[str, str, str], list[tuple[str, float]]] = {
    (NLL, "float32", "cpu"): [("eager", 3.0), (IN_PLACE_AND_WRITE, 1 / 1.1)],
    (NLL, "float32", "cpu in place"): [("eager", 5.0)],
    (NLL, "bfloat16", "cpu"): [("eager", 6.0), ("compile", 3.0), (IN_PLACE_AND_WRITE, 1 / 1.1)],
    (ENTROPY, "float32", "cpu"): [("eager", 6.0), (IN_PLACE_AND_WRITE, 1 / 1.1)],
    (ENTROPY, "bfloat16", "cpu"): [("eager", 6.0), (IN_PLACE_AND_WRITE, 1 / 1.1), (COPY, 0.65)],
    **{(KL, dtype, "cpu"): [(IN_PLACE_AND_WRITE, 1 / 1.1)] for dtype in ("float32", "bfloat16")},
    **{
        (case, dtype, f"cpu, {KEPT}"): [(f"{IN_PLACE_AND_WRITE}, {KEPT}", 1 / 1.1)]
        for case in (NLL, ENTROPY, KL)
        for dtype in ("float32", "bfloat16")
    },
    (MEAN, "float32", "cpu"): [
        ("three GEMMs alone", 1 / 1.1),
        ("torch linear_cross_entropy", 1.0),
    ],
    (BEYOND, "float32", "cpu"): [("eager", 1 / 1.5)],
    **{(case, "float32", "cpu overlay"): [("randn_like + add_", 5.0)] for case in (ONE_TENSOR, MANY_TENSORS)},
    **{(case, "float32", "cpu"): [("torch.dot", 0.9)] for case in (ONE_PAIR, MANY_PAIRS)},
    **{(case, "bfloat16", "cpu"): [("torch.dot", 8.0)] for case in (ONE_PAIR, MANY_PAIRS)},
}
TARGET_SHAPE = (4096, 131072, 4096)  # N, V, H
LARGE = 1 << 28  # N * V


class Reached(NamedTuple):
    """One shape's figure: `value` is better the larger it is, and reaches the target at `needed`."""

    value: float
    needed: float
    text: str
    where: str


class Target(NamedTuple):
    text: str
    figures: Callable[[list[Record]], Iterator[Reached]]


def percent(cases: tuple[str, ...], needed: float, where: Callable[[Record], bool]) -> Callable:
    """Of the copy bandwidth, by the best of ours, shape by shape."""

    def figures(records: list[Record]) -> Iterator[Reached]:
        chosen = [r for r in records if r["case"] in cases and where(r)]
        for group in by_shape(chosen):
            ours = [r["percent_of_copy"] for r in group if is_ours(r["impl"])]
            if ours:
                yield Reached(max(ours), needed, f"{max(ours):.0f} %", place(group[0]))

    return figures


def ratio(
    cases: tuple[str, ...], needed: float, other: Callable[[str], bool], where: Callable[[Record], bool] | None = None
) -> Callable:
    """The fastest other implementation's time over the fastest of ours, shape by shape."""

    def figures(records: list[Record]) -> Iterator[Reached]:
        for group in by_shape(r for r in records if r["case"] in cases and (where is None or where(r))):
            ours = [median(r) for r in group if is_ours(r["impl"])]
            others = {median(r): r["impl"] for r in group if other(r["impl"])}
            if ours and others:
                best = min(others)
                text = f"{best / min(ours):.2f}x {others[best]}"
                yield Reached(best / min(ours), needed, text, place(group[0]))

    return figures


def linear_time(records: list[Record]) -> Iterator[Reached]:
    for r in records:
        if r["case"] == TOKENS_ENTROPY and (r["N"], r["V"], r["H"]) == TARGET_SHAPE and is_ours(r["impl"]):
            yield Reached(-median(r), -22.0, f"{median(r):.1f} ms by {r['impl']}", place(r))


def beyond_budget(records: list[Record]) -> Iterator[Reached]:
    for r in records:
        if r["case"] == BEYOND and is_ours(r["impl"]):
            share = share_beyond_results(r)
            yield Reached(-share, -1 / 10, f"1/{1 / share:.1f} by {r['impl']}", place(r))


def step_time(records: list[Record]) -> Iterator[Reached]:
    yield from steps(records, lambda ours, plain: median(plain) / median(ours), 1.3, "{:.2f}x")


def step_memory(records: list[Record]) -> Iterator[Reached]:
    yield from steps(records, lambda ours, plain: -ours["peak_bytes"] / plain["peak_bytes"], -0.6, "{:.2f}x")


def steps(
    records: list[Record], value: Callable[[Record, Record], float], needed: float, form: str
) -> Iterator[Reached]:
    for group in by_shape(r for r in records if r["op"] == "step" and "1B" in r["case"]):
        plain = next((r for r in group if r["impl"] == "eager"), None)
        for r in group:
            if plain and is_ours(r["impl"]):
                got = value(r, plain)
                yield Reached(got, needed, f"{form.format(abs(got))} by {r['impl']}", r["case"])


def is_peer(impl: str) -> bool:
    return not is_ours(impl) and impl not in ("eager", "compile") and "GEMMs" not in impl


def makes_logits(impl: str) -> bool:
    return is_peer(impl) and impl != "quack scaled exp"


def any_other(impl: str) -> bool:
    return not is_ours(impl) and "GEMMs" not in impl


def is_large(r: Record) -> bool:
    return r["N"] * r["V"] >= LARGE


FORWARD_BACKWARD = (NLL, ENTROPY)
GPU_TARGETS = (
    Target("forward + backward >= 90 % of copy (3 NV), N*V >= 2^28", percent(FORWARD_BACKWARD, 90, is_large)),
    Target(
        "forward + backward >= 80 % of copy (3 NV), N=8192, V=32000",
        percent(FORWARD_BACKWARD, 80, lambda r: (r["N"], r["V"]) == (8192, 32000)),
    ),
    Target("with a reference >= 88 % of copy (5 NV), N*V >= 2^28", percent((KL,), 88, is_large)),
    Target("statistics without gradient >= 90 % of copy (NV), N*V >= 2^28", percent((STATISTICS,), 90, is_large)),
    Target("value and gradient at once >= 85 % of copy (2 NV), N*V >= 2^28", percent((AT_ONCE,), 85, is_large)),
    Target(
        "every shape at least as fast as the best other implementation",
        ratio((NLL, ENTROPY, STATISTICS, KL, AT_ONCE), 1.0, any_other),
    ),
    Target(
        "V <= 50304: >= 1.2x the best peer",
        ratio((NLL, ENTROPY, STATISTICS, KL, AT_ONCE), 1.2, is_peer, lambda r: r["V"] <= 50304),
    ),
    Target("logp + entropy >= 4x eager", ratio((ENTROPY,), 4.0, lambda impl: impl == "eager")),
    Target("logp + entropy >= 3x torch.compile", ratio((ENTROPY,), 3.0, lambda impl: impl == "compile")),
    Target("weighted NLL + entropy from hidden states, 4096 x 4096 x 131072: <= 22 ms", linear_time),
    # A first GEMM that leaves powers of e behind spares the pass that writes d(logits): 10 to 19 % less time than three
    # GEMMs with logits in between can take, for one number. Statistics of each token need the logits: what can be had
    # is a tie with the best of those who make them.
    Target("mean NLL from hidden states <= 1.03x the peers that make logits", ratio((MEAN,), 1 / 1.03, makes_logits)),
    Target("beyond the budget: peak beyond results <= 1/10 of the logits", beyond_budget),
    Target(
        "perturbing float32 weights >= 90 % of copy",
        percent((ONE_TENSOR, MANY_TENSORS), 90, lambda r: r["dtype"] == "float32"),
    ),
    Target(
        "perturbing bfloat16 weights into float32 >= 70 % of copy",
        percent((MANY_TENSORS,), 70, lambda r: r["dtype"] == "bfloat16"),
    ),
    Target("perturbing >= 3x MeZO's way", ratio((ONE_TENSOR, MANY_TENSORS), 3.0, lambda impl: impl == "MeZO")),
    Target(
        "three dots >= 90 % of the rate of reading alone",
        ratio((ONE_PAIR, MANY_PAIRS), 0.9, lambda impl: impl == "reading alone"),
    ),
    Target("squared norms at least as fast as the best other way", ratio(tuple(NORMS), 1.0, any_other)),
    Target("whole step at 1B >= 1.3x the plain step", step_time),
    Target("whole step at 1B <= 0.6x the plain step's peak memory", step_memory),
)


def with_limits(times: dict[str, float], record: Record) -> dict[str, float]:
    """With what else a CPU's target can name."""
    if record["percent_of_copy"] is not None:
        times = times | {COPY: median(record) * record["percent_of_copy"] / 100}
    for kept in ("", f", {KEPT}"):
        if (write := times.get(f"{WRITE}{kept}")) and (in_place := times.get("cpu in place")):
            times = times | {f"{IN_PLACE_AND_WRITE}{kept}": in_place + write}
    return times


def goal(times: dict[str, float], impl: str, other: str, ratio: float) -> str:
    """The cell of a target on a CPU: what was to be reached, and what was."""
    wanted = f"{ratio:g}x {other}" if ratio >= 1 else f"at most {1 / ratio:g}x the time of {other}"
    if other not in times:
        return f"{wanted}: not measured"
    got = times[other] / times[impl]
    value = f"{got:.2f}x" if ratio >= 1 else f"{1 / got:.2f}x"
    return f"{wanted}: {value}{'' if got >= ratio else ' (missed)'}"


def markdown(records: list[Record]) -> list[str]:
    """A table: every target, its worst figure, where that is, and whether it is met."""
    done = [r for r in records if r["time_ms"]]
    lines = ["", "## Targets", "", "| target | worst | where | |", "|---|---|---|---|"]
    for target in GPU_TARGETS:
        figures = sorted(target.figures(done), key=lambda figure: figure.value)
        if not figures:
            lines.append(f"| {target.text} | | | not measured |")
            continue
        worst, met = figures[0], sum(figure.value >= figure.needed for figure in figures)
        verdict = "met" if met == len(figures) else f"missed at {len(figures) - met} of {len(figures)}"
        lines.append(f"| {target.text} | {worst.text} | {worst.where} | {verdict} |")
    return lines


def share_beyond_results(record: Record) -> float:
    """Peak memory beyond d(hidden) and d(weight), over the bytes of the logits."""
    size = getattr(torch, record["dtype"]).itemsize
    results = (record["V"] + record["N"]) * record["H"] * size
    return max(record["peak_bytes"] - results, 1) / logits_bytes(record)


def logits_bytes(record: Record) -> int:
    return record["N"] * record["V"] * getattr(torch, record["dtype"]).itemsize


def median(record: Record) -> float:
    return record["time_ms"]["median"]


def by_shape(records: Iterable[Record]) -> list[list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for r in records:
        groups.setdefault((r["case"], r["dtype"], r["N"], r["V"], r["H"]), []).append(r)
    return list(groups.values())


def place(record: Record) -> str:
    short = record["case"] if record["case"] in LINEAR_KINDS else record["case"].split(",")[0]
    shape = f"N={record['N']}, V={record['V']}" + (f", H={record['H']}" if record["H"] else "")
    return f"{short}, {record['dtype']}, {shape}"
