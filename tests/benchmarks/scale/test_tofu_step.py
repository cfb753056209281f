"""The benchmark of steps on TOFU's rows, tried on a toy: all ways agree, and its page says what came out."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import PARTS
from benchmarks.scale import tofu_step

from ...model.test_compiled import traced  # noqa: F401 (a fixture)


def test_a_study(traced, tmp_path):  # noqa: F811
    tofu_step.main(["--toy", "--batch-size", "3", "--rounds", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "tofu_step.json").read_text())
    ways = record["ways"]
    assert next(iter(ways)) == tofu_step.FIRST
    assert record["positions"] >= record["real"] > record["supervised"] > 0
    for own in ways.values():
        assert own["loss_error"] < 1e-6
        assert own["gradient_error"] < 1e-5
        assert own["step_bytes"] > 0 < own["held_bytes"]
        assert own["seconds"][0][0] > 0
    tokens = [own["tokens"] for own in ways.values()]
    assert tokens[:3] == [record["positions"]] * 3
    assert tokens[3] == record["real"] - 2 * 3  # the rows' last tokens predict nothing
    assert tokens[5] == tokens[4] < tokens[3]
    assert ways[[*ways][-1]]["packing"] == {"used": True, "declined": {}}
    assert ways[[*ways][-1]]["compiling"] | {"seconds": 0} == {"used": True, "declined": {}, "seconds": 0}
    assert ways[[*ways][-1]]["compiling"]["seconds"] > 0
    assert "tofu_step" in PARTS


@pytest.mark.parametrize(("seconds", "peak", "told"), [(0.5, 10, ["met", "met"]), (0.9, 90, ["missed", "missed"])])
def test_targets_are_met_or_missed(seconds, peak, told):
    def way(seconds, peak, packing=None, compiling=None):
        return {"seconds": [[seconds, 3 * seconds], [2 * seconds, seconds]], "cpu_seconds": [[1.0, 1.0]],
                "held_bytes": 0, "step_bytes": peak << 20, "tokens": 7, "loss_error": 1e-7, "gradient_error": 1e-6,
                "packing": packing, "compiling": compiling}  # fmt: skip

    record = {
        "model": "m", "parameters": 10, "batch_size": 8, "batches": 2, "rounds": 2, "positions": 9, "real": 8,
        "supervised": 4, "threads": 1, "device": "D", "versions": {"torch": "2", "transformers": "5"}, "commit": "c",
        "ways": {tofu_step.FIRST: way(1.0, 100),
                 "ours": way(seconds, peak, {"used": False, "declined": {"packed rows": "why"}},
                             {"used": True, "declined": {}, "seconds": 11.8})},
    }  # fmt: skip
    page = tofu_step.markdown(record)
    lines = page.splitlines()
    assert [line.split("| ")[-1].removesuffix(" |") for line in lines if line.endswith(("met |", "missed |"))] == told
    assert f"| ours | {1000 * seconds:.0f} | 1000 | {1 / seconds:.2f} | {peak} | {peak / 100:.2f} | 7 |" in page
    assert lines[-2] == "ours: made and tried in 12 s before its first step, which no time has."
    assert lines[-1] == "ours: packed rows is not used: why."
