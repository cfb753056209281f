"""Targets are held against records."""

import torch

from benchmarks.kernels import cases, targets


def record(impl, ms, case=cases.ENTROPY, n=8192, v=128256, h=0, peak=0, **more):
    size = cases.Logits(case, torch.bfloat16, n, v).bytes if case in cases.KINDS else 0
    times = {"median": ms, "min": ms, "max": ms, "samples": [ms]}
    fields = {"op": "token_stats", "case": case, "impl": impl, "device": "D", "dtype": "bfloat16", "N": n, "V": v}
    return {
        **fields, "H": h, "time_ms": times, "bytes": size, "copy_gbps": 4300.0, "peak_bytes": peak,
        "percent_of_copy": size / ms / 1e6 / 43.0, "error_vs_fp64": 1e-3, "commit": "c", "versions": {}, **more,
    }  # fmt: skip


def test_targets_say_met_missed_or_not_measured():
    limit = record("cuda", 1.0)["bytes"] / 4300e6  # ms at the copy's rate
    shape = dict(zip(("n", "v", "h"), targets.TARGET_SHAPE, strict=True))
    one_b = {"case": "NPO + KL, 1B, batch 8 x 256", "op": "step"}
    records = [
        record("cuda", limit / 0.95), record("triton", limit / 0.5), record("trl", limit), record("eager", limit * 5),
        record("cuda", 1.0, n=64), record("trl", 1.1, n=64),
        record("cuda", 21.0, cases.TOKENS_ENTROPY, **shape),
        record("cuda", 17.2, cases.MEAN, **shape), record("quack", 16.8, cases.MEAN, **shape),
        record("quack scaled exp", 14.5, cases.MEAN, **shape),
        record("cuda", 100.0, peak=50, **one_b), record("eager", 120.0, peak=100, **one_b),
    ]  # fmt: skip
    lines = {line.split(" | ")[0].lstrip("| "): line for line in targets.markdown(records)}

    def verdict(start):
        (line,) = (line for text, line in lines.items() if text.startswith(start))
        return line

    assert verdict("forward + backward >= 90 %").endswith("| 95 % | logp + entropy, bfloat16, N=8192, V=128256 | met |")
    assert verdict("every shape").endswith(" | missed at 1 of 2 |")
    assert "0.95x trl" in verdict("every shape")
    assert verdict("logp + entropy >= 4x eager").endswith(" | met |")
    assert verdict("logp + entropy >= 3x torch.compile").endswith(" | not measured |")
    assert verdict("weighted NLL + entropy from hidden").endswith(" | met |")
    assert verdict("mean NLL from hidden states").endswith(" | met |")
    assert "0.98x quack |" in verdict("mean NLL from hidden states")
    assert verdict("whole step at 1B >= 1.3x").endswith(" | missed at 1 of 1 |")
    assert verdict("whole step at 1B <= 0.6x").endswith(" | met |")


def test_out_of_place_is_held_against_in_place_and_one_write():
    (other, ratio) = targets.CPU_TARGETS[cases.KL, "float32", "cpu"][0]
    times = {"cpu": 15.5, "cpu in place": 8.5, "one write alone": 8.0}
    named = targets.with_limits(times, record("cpu", 15.5, cases.KL))
    text = targets.goal(named, "cpu", other, ratio)
    assert text == "at most 1.1x the time of cpu in place and one write alone: 0.94x"
    slow = {**named, "cpu": 33.0}
    assert targets.goal(slow, "cpu", other, ratio).endswith(": 2.00x (missed)")
    without = targets.with_limits({"cpu": 15.5, "cpu in place": 8.5}, record("cpu", 15.5, cases.KL))
    assert targets.goal(without, "cpu", other, ratio).endswith(": not measured")
