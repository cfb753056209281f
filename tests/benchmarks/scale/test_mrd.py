"""MRD at scale, tried on a toy: all estimators run, and the tables say what came out."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.scale import mrd


def test_a_study(tmp_path):
    words = ["--shape", "toy", "--num-draws", "40", "--check-draws", "2", "--naive-seconds", "0.01"]
    words += ["--estimators", "algorithm1,gradient,definition:3,hutchinson:3,initial"]
    mrd.main([*words, "--threads", "1", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "mrd.json").read_text())
    assert list(record["estimators"]) == ["algorithm1", "gradient", "definition", "hutchinson", "initial"]
    assert record["spearman"]["definition, hutchinson"] > 0.95
    for name in ("naive", "naive, in place"):
        loop = record[name]
        assert loop["samples"] == 8
        assert loop["extrapolated_seconds"] == pytest.approx(loop["seconds_a_sample_and_draw"] * record["samples"] * 40)
    one, exact = (torch.tensor(record["estimators"][name]["values"]) for name in ("algorithm1", "gradient"))
    assert float((one / exact).mean()) == pytest.approx(1, abs=0.2)
    table = (tmp_path / "mrd.md").read_text()
    assert f"| algorithm1 | 40 | {record['estimators']['algorithm1']['seconds']:.1f} |" in table
    assert f"| algorithm1, gradient | {record['spearman']['algorithm1, gradient']:.3f} |" in table


@pytest.mark.parametrize("word", ["nope", "algorithm1:x", "algorithm1:1"])
def test_estimators_that_are_none(word, capsys):
    with pytest.raises(SystemExit):
        mrd.main(["--estimators", f"gradient,{word}"])
    assert f"{word!r}: needs one of algorithm1, definition" in capsys.readouterr().err
