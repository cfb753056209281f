"""The figures of benchmarks/mrd_study.py on a model of a few samples: they run, go on, and say what was found."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.studies import intervals, mrd_study, unlearned
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
    mrd_study.main(words)
    out = mrd_study.Path(words[-1])
    names = list(mrd_study.FIGURES)
    stored = {name: json.loads((out / f"mrd_study_{name}.json").read_text()) for name in names}
    assert all("</svg>" in (out / f"mrd_study_{name}.svg").read_text() for name in names)
    report = (out / "mrd_study.md").read_text()
    assert all(one["text"] in report for one in stored.values())

    one = stored["difficulty"]["result"]
    assert len(one["methods"]["ga"]["updates"]) == 4
    expected = intervals.rank_correlation(one["x"]["MRD (Algorithm 1)"], one["methods"]["npo"]["change"])
    assert one["methods"]["npo"]["change_with"]["MRD (Algorithm 1)"] == mrd_study.without_nan(expected)
    arms = stored["methods"]["result"]["methods"]["npo"]
    a, b = (arms[by]["values"]["retain accuracy"] for by in ("algorithm2", "shuffle"))
    assert arms["algorithm2"]["minus_shuffle"]["retain accuracy"][0] == pytest.approx(sum(a) / 2 - sum(b) / 2)
    ratios = stored["sensitivity"]["result"]["ratio to the first sigma"]
    assert ratios["4e-05"][0] == pytest.approx(4, rel=0.05)
    assert len(stored["choice"]["result"]["group"]["sets"]) == 3
    assert set(stored["characteristics"]["result"]["characteristics"]) >= {"probability", "rare_words", "num_tokens"}

    monkeypatch.setattr(unlearned, "unlearn", None)  # all is there: nothing is computed again
    mrd_study.main(["difficulty", "efficiency", *words])
    again = json.loads((out / "mrd_study_efficiency.json").read_text())
    assert again["result"] == stored["efficiency"]["result"]
    with pytest.raises(TypeError):
        mrd_study.main(["efficiency", *words, "--rate", "1e-3"])  # other settings


def test_intervals():
    found = intervals.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(1.9632, abs=1e-4)  # 2.7764 sqrt(2.5 / 5)
    assert math.isnan(intervals.interval([1.0]).half)
    up = intervals.rank_correlation([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 3, 2, 5, 4, 7, 6, 9, 8, 10])
    alike = intervals.rank_correlation([1, 2, 3, 4], [20, 20, 20, 20])
    assert intervals.told(alike) == "none: all alike"
    assert mrd_study.without_nan({"a": [alike]})["a"][0]["rho"] is None
    assert intervals.told(intervals.rank_correlation([1, 2, 3], [1, 2, 3])) == "+1.00"
    assert up["rho"] == pytest.approx(1 - 6 * 8 / 990)
    assert -1 < up["low"] < up["rho"] < up["high"] < 1
    down = intervals.rank_correlation(list(range(10)), [-y for y in (1, 3, 2, 5, 4, 7, 6, 9, 8, 10)])
    assert (down["low"], down["high"]) == pytest.approx((-up["high"], -up["low"]))


def test_a_cell_is_computed_once(tmp_path):
    start = unlearned.Start(None, None, [], [], [], tmp_path)
    assert start.cell("a", {"x": 1}, lambda: {"y": 2}) == {"y": 2}
    assert start.cell("a", {"x": 1}, lambda: {"y": 3}) == {"y": 2}
    assert start.cell("a", {"x": 2}, lambda: {"y": 3}) == {"y": 3}


def test_bad_input_is_named(capsys):
    for words, message in (
        (["dificulty"], "unknown figure 'dificulty': needs some of sensitivity"),
        (["choice", "--model", "m"], "--model, --forget and --retain belong together"),
    ):
        with pytest.raises(SystemExit):
            mrd_study.main(words)
        assert message in capsys.readouterr().err
