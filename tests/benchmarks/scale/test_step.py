"""Training steps of a toy: ours and the plain one agree, and are recorded."""

import itertools

from benchmarks.kernels.report import table
from benchmarks.results import read
from benchmarks.scale import step

from ..records import KEYS


def test_steps_agree_and_are_recorded(tmp_path, session, monkeypatch):
    assert step.run(session("step")) == 0
    records = read(tmp_path / "step.json")
    assert [(r["case"].split(",")[0], r["impl"]) for r in records] == list(
        itertools.product(("NPO + KL", "WGA + KL"), ("eager", "cpu"))
    )
    for r in records:
        assert set(r) == KEYS | {"threads"}
        assert r["N"] == 2 * 2 * 16
        assert r["peak_bytes"] > 0
    assert "| eager | " in "\n".join(table.steps(records))

    before = (tmp_path / "step.json").read_text()
    assert step.run(session("step")) == 0
    assert (tmp_path / "step.json").read_text() == before

    right = step.token_logp
    monkeypatch.setattr(step, "token_logp", lambda model, batch: 1.01 * right(model, batch))
    records = list(step.measure(session("step"), step.Step("toy", "WGA", "cpu", 2, 16), ["eager", "cpu"]))
    assert records[0]["time_ms"]
    assert records[1]["failed"].startswith("ValueError: the first losses are ")
