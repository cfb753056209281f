"""The G-effect at scale, tried on a toy: it runs, and its page says what came out."""

from __future__ import annotations

import json

from benchmarks.scale import geffect


def test_a_study(tmp_path):
    geffect.main(["--samples", "4", "--length", "16", "--micro-batch", "2", "--rounds", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "geffect.json").read_text())
    assert list(record["measured"]) == ["training step", "backward alone", "probe", "PG-effect"]
    assert all(one["seconds"] > 0 and one["peak_bytes"] > 0 for one in record["measured"].values())
    assert record["weights_bytes"] == 2 * record["parameters"]
    assert record["disagreement"] < 0.05
    assert record["measured"]["probe"]["peak_bytes"] > 2 * record["weights_bytes"]  # two gradients are kept
    page = (tmp_path / "geffect.md").read_text()
    assert "| a probe takes at most 3 training steps |" in page


def test_targets_are_met_or_missed():
    row = {"seconds": 1.0, "peak_bytes": 2**30}
    rows = {
        "training step": row,
        "backward alone": row,
        "probe": {"seconds": 3.5, "peak_bytes": 2**31},
        "PG-effect": {"seconds": 1.9, "peak_bytes": 2**30},
    }
    record = {
        "shape": "7B", "parameters": 2**28, "weights_bytes": 2**29, "samples": 64, "length": 128, "micro_batch": 16,
        "device": "D", "versions": {"torch": "2"}, "commit": "c", "measured": rows, "probe_bytes_allowed": 2**31,
        "disagreement": 1e-3,
    }  # fmt: skip
    lines = geffect.markdown(record).splitlines()
    assert "| PG-effect | 1.90 | 1.90 | 1.00 | 2.00 |" in lines
    assert [line.rsplit("| ", 1)[1] for line in lines if line.endswith(("met |", "missed |"))] == [
        "missed |",
        "met |",
        "met |",
    ]
