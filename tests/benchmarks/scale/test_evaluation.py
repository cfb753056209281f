"""The evaluation's benchmark, tried on a toy: both ways agree, and its page says what came out."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.scale import evaluation


def test_a_study(tmp_path):
    evaluation.main(["--toy", "--samples", "3", "--rounds", "1", "--flat", "40", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["texts"] == 4 * 3 * 5  # sets, questions, and answer, paraphrase and three wrong ones
    assert record["disagreement"] < evaluation.TOLERANCE
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 0 for one in record["measured"].values())
    assert len(record["resident_bytes"]) == 11
    assert min(record["resident_bytes"]) > 1e6
    assert "evaluation" in PARTS


@pytest.mark.parametrize(("seconds", "peak", "told"), [(1.0, 10.0, ["met", "met"]), (2.5, 20.0, ["missed", "missed"])])
def test_targets_are_met_or_missed(seconds, peak, told):
    record = {
        "model": "m", "parameters": 10, "texts": 8, "samples": 2, "batch_size": 16, "threads": 1, "device": "D",
        "versions": {"torch": "2"}, "commit": "c", "disagreement": 1e-6,
        "flat": 1000, "resident_bytes": [2**20, 3 * 2**20, *[2**21] * 9],
        "measured": {"plain loop": {"seconds": 4.0, "peak_bytes": 40.0},
                     "suite": {"seconds": seconds, "peak_bytes": peak}},
    }  # fmt: skip
    lines = evaluation.markdown(record).splitlines()
    assert [line.split("| ")[-1].removesuffix(" |") for line in lines if line.endswith(("met |", "missed |"))] == told
    assert (
        "Over 1000 questions the process holds 3 MiB after a tenth of the way and 2 at the end, 3 at most." in lines[-1]
    )
    assert f"| suite | {seconds:.2f} | {8 / seconds:.1f} | 0.0 |" in lines
