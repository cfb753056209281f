"""The figures of the MRD study on a model of a few samples: they run, go on, and say what came out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.studies.mrd import __main__ as command
from benchmarks.studies.mrd import intervals, precision, study
from pyunlearn.data import QADataset, collate, generate_authors
from pyunlearn.data.tiny import tiny_llama, train_tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Arguments of a small study, of a model that knows a few samples."""
    folder = tmp_path_factory.mktemp("study")
    world = generate_authors(6, 4, forget_fraction=0.3).write(folder)
    pairs = generate_authors(6, 4, forget_fraction=0.3)
    tokenizer = train_tokenizer(pairs.texts, vocab_size=384)
    model = tiny_llama(tokenizer, hidden_size=48, intermediate_size=96, num_hidden_layers=2).train()
    rows = QADataset(pairs.forget + pairs.retain, tokenizer, 256)
    batch = collate([rows[i] for i in range(len(rows))], 0)
    batch.pop("index")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [
        "--model", str(folder / "model"), "--forget", str(world / "forget.jsonl"),
        "--retain", str(world / "retain.jsonl"), "--samples", "4", "--seeds", "2", "--steps", "3", "--rate", "3e-3",
        "--work", str(folder / "work"), "--out", str(folder / "out"),
    ]  # fmt: skip


def test_every_figure(words, monkeypatch):
    command.main(words)
    out = Path(words[-1])
    names = list(command.FIGURES)
    stored = {name: json.loads((out / f"mrd_study_{name}.json").read_text()) for name in names}
    assert all("</svg>" in (out / f"mrd_study_{name}.svg").read_text() for name in names)
    report = (out / "mrd_study.md").read_text()
    assert all(one["text"] in report for one in stored.values())

    one = stored["difficulty"]["result"]
    assert len(one["methods"]["ga"]["updates"]) == 4
    expected = intervals.rank_correlation(one["x"]["MRD (Algorithm 1)"], one["methods"]["npo"]["change"])
    assert one["methods"]["npo"]["change_with"]["MRD (Algorithm 1)"] == command.without_nan(expected)
    arms = stored["methods"]["result"]["methods"]["npo"]
    a, b = (arms[by]["values"]["retain accuracy"] for by in ("algorithm2", "shuffle"))
    assert arms["algorithm2"]["minus_shuffle"]["retain accuracy"][0] == pytest.approx(sum(a) / 2 - sum(b) / 2)
    ratios = stored["sensitivity"]["result"]["ratio to the first sigma"]
    assert ratios["4e-05"][0] == pytest.approx(4, rel=0.05)
    assert len(stored["choice"]["result"]["group"]["sets"]) == 3
    assert set(stored["characteristics"]["result"]["characteristics"]) >= {"probability", "rare_words", "num_tokens"}

    monkeypatch.setattr(study, "unlearn", None)  # all is there: nothing is computed again
    command.main(["difficulty", "efficiency", *words])
    again = json.loads((out / "mrd_study_efficiency.json").read_text())
    assert again["result"] == stored["efficiency"]["result"]
    with pytest.raises(TypeError):
        command.main(["efficiency", *words, "--rate", "1e-3"])  # other settings


def test_intervals():
    mean = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean.mean == 3
    assert mean.half == pytest.approx(1.9632, abs=1e-4)  # 2.7764 sqrt(2.5 / 5)
    assert math.isnan(intervals.interval([1.0]).half)
    up = intervals.rank_correlation([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 3, 2, 5, 4, 7, 6, 9, 8, 10])
    alike = intervals.rank_correlation([1, 2, 3, 4], [20, 20, 20, 20])
    assert intervals.in_words(alike) == "none: all alike"
    assert command.without_nan({"a": [alike]})["a"][0]["rho"] is None
    assert intervals.in_words(intervals.rank_correlation([1, 2, 3], [1, 2, 3])) == "+1.00"
    assert up["rho"] == pytest.approx(1 - 6 * 8 / 990)
    assert -1 < up["low"] < up["rho"] < up["high"] < 1
    down = intervals.rank_correlation(list(range(10)), [-y for y in (1, 3, 2, 5, 4, 7, 6, 9, 8, 10)])
    assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))


def test_bad_input_is_named(capsys):
    for words, message in (
        (["dificulty"], "figure='dificulty': did you mean difficulty? needs one of sensitivity"),
        (["choice", "--model", "m"], "--model, --forget and --retain belong together"),
    ):
        with pytest.raises(SystemExit):
            command.main(words)
        assert message in capsys.readouterr().err


def test_precisions(tmp_path):
    world = generate_authors(4, 2)
    tokenizer = train_tokenizer(world.texts, vocab_size=384)
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    rows = QADataset(world.forget, tokenizer, 256)
    means = precision.measure(model, collate([rows[i] for i in range(len(rows))], 0), 4, (1e-5,))
    truth = means["float64"][0]
    assert means["float32"][0] == pytest.approx(truth, rel=0.02)
    assert abs(means["TF32 products"][0] / truth - 1) > 0.1
    assert means["bfloat16 activations"][0] > 3 * truth
    assert means["bfloat16 weights"][0] > 3 * truth
    precision.draw((1e-5,), means, tmp_path / "x.svg")
    assert "bfloat16 weights" in (tmp_path / "x.svg").read_text()


def test_ten_bits_are_kept():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-12, 1 + 2**-11, -3.0, 0.0])
    assert precision.ten_bits(x).tolist() == [1.0, 1 + 2**-10, 1.0, 1 + 2**-10, -3.0, 0.0]
