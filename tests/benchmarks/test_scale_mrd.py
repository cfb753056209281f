"""The studies of benchmarks/mrd.py and mrd_precision.py run, and their tables say what was found."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.scale import mrd
from benchmarks.studies import mrd_precision
from pyunlearn.data import QADataset, collate, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer


def test_a_study(tmp_path):
    words = ["--shape", "toy", "--num-draws", "40", "--check-draws", "2", "--naive-seconds", "0.01"]
    words += ["--estimators", "algorithm1,gradient,definition:3,hutchinson:3,initial"]
    mrd.main([*words, "--threads", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "mrd.json").read_text())
    assert list(found["estimators"]) == ["algorithm1", "gradient", "definition", "hutchinson", "initial"]
    assert found["spearman"]["definition, hutchinson"] > 0.95
    for name in ("naive", "naive, in place"):
        loop = found[name]
        assert loop["samples"] == 8
        assert loop["extrapolated_seconds"] == pytest.approx(loop["seconds_a_sample_and_draw"] * found["samples"] * 40)
    one, exact = (torch.tensor(found["estimators"][name]["values"]) for name in ("algorithm1", "gradient"))
    assert float((one / exact).mean()) == pytest.approx(1, abs=0.2)
    table = (tmp_path / "mrd.md").read_text()
    assert f"| algorithm1 | 40 | {found['estimators']['algorithm1']['seconds']:.1f} |" in table
    assert f"| algorithm1, gradient | {found['spearman']['algorithm1, gradient']:.3f} |" in table


@pytest.mark.parametrize("word", ["nope", "algorithm1:x", "algorithm1:1"])
def test_estimators_that_are_none(word, capsys):
    with pytest.raises(SystemExit):
        mrd.main(["--estimators", f"gradient,{word}"])
    assert f"{word!r}: needs one of algorithm1, definition" in capsys.readouterr().err


def test_precisions(tmp_path):
    world = generate_authors(4, 2)
    tokenizer = train_tokenizer(world.texts, vocab_size=384)
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    rows = QADataset(world.forget, tokenizer, 256)
    found = mrd_precision.measure(model, collate([rows[i] for i in range(len(rows))], 0), 4, (1e-5,))
    truth = found["float64"][0]
    assert found["float32"][0] == pytest.approx(truth, rel=0.02)
    assert abs(found["TF32 products"][0] / truth - 1) > 0.1
    assert found["bfloat16 activations"][0] > 3 * truth
    assert found["bfloat16 weights"][0] > 3 * truth
    mrd_precision.draw((1e-5,), found, tmp_path / "x.svg")
    assert "bfloat16 weights" in (tmp_path / "x.svg").read_text()


def test_ten_bits_are_kept():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-12, 1 + 2**-11, -3.0, 0.0])
    assert mrd_precision.ten_bits(x).tolist() == [1.0, 1 + 2**-10, 1.0, 1 + 2**-10, -3.0, 0.0]
