"""Records -> a Markdown table: time, ratio to eager, percent of the copy bandwidth, peak memory, error, target."""

from __future__ import annotations

from itertools import groupby

# (case, dtype, impl) -> what was set out to be reached: at least so many times as fast as another implementation,
# or, below 1, at most 1/ratio of its time.
TARGETS = {
    ("weighted NLL, forward + backward", "float32", "cpu"): [("eager", 3.0)],
    ("weighted NLL, forward + backward", "float32", "cpu in place"): [("eager", 5.0)],
    ("weighted NLL, forward + backward", "bfloat16", "cpu"): [("eager", 6.0), ("compile", 3.0)],
    ("logp + entropy, forward + backward", "float32", "cpu"): [("eager", 6.0)],
    ("logp + entropy, forward + backward", "bfloat16", "cpu"): [("eager", 6.0)],
    ("NLL from hidden states, within the budget", "float32", "cpu"): [
        ("three GEMMs alone", 1 / 1.1),
        ("torch linear_cross_entropy", 1.0),
    ],
    ("NLL from hidden states, beyond the budget", "float32", "cpu"): [("eager", 1 / 1.5)],
}


def markdown(records: list[dict]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"# Token statistics on {first['device']}",
        "",
        f"Commit {first['commit']}; {versions}; {first['threads']} threads. A copy of 256 MB runs at "
        f"{first['copy_gbps']} GB/s (read + written). Medians of {len(first['time_ms']['samples'])} samples; "
        "the range is in brackets. % of copy: the least traffic the case needs, over the time, over that rate. "
        "Peak memory is what a run takes beyond its inputs, results included. Error is max |x - fp64| / max |fp64|.",
    ]
    for (op, case, dtype, n, v, h), group in groupby(records, key=lambda r: tuple(r[k] for k in KEYS)):
        rows = list(group)
        times = {r["impl"]: r["time_ms"]["median"] for r in rows}
        shape = f"N={n}, H={h}, V={v}" if h else f"N={n}, V={v}"
        lines += ["", f"## {op}: {case}, {dtype}, {shape}", ""]
        lines += [
            "| implementation | ms | x eager | % of copy | GB/s | peak MB | error | target |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            t, percent, error = r["time_ms"], r["percent_of_copy"], r["error_vs_fp64"]
            goals = [goal(times, r["impl"], *g) for g in TARGETS.get((case, dtype, r["impl"]), []) if g[0] in times]
            if case.endswith("beyond the budget") and r["impl"] == "cpu":
                results = (r["V"] + r["N"]) * r["H"] * 4  # d(weight) and d(hidden)
                share = (r["peak_bytes"] - results) / (r["N"] * r["V"] * 4)
                goals.append(f"peak beyond results below 1/8 of the logits: 1/{1 / share:.1f}")
            cells = [
                r["impl"],
                f"{t['median']:.1f} [{t['min']:.1f}, {t['max']:.1f}]",
                f"{times['eager'] / t['median']:.2f}",
                "" if percent is None else f"{percent:.0f}",
                "" if percent is None else f"{r['bytes'] / t['median'] / 1e6:.1f}",
                f"{r['peak_bytes'] / 1e6:.0f}",
                "" if error is None else f"{error:.1e}",
                "; ".join(goals),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


KEYS = ("op", "case", "dtype", "N", "V", "H")


def goal(times: dict[str, float], impl: str, other: str, ratio: float) -> str:
    got = times[other] / times[impl]
    wanted = f"{ratio:g}x {other}" if ratio >= 1 else f"at most {1 / ratio:g}x the time of {other}"
    value = f"{got:.2f}x" if ratio >= 1 else f"{1 / got:.2f}x"
    return f"{wanted}: {value}{'' if got >= ratio else ' (missed)'}"
