"""Steps of others' trainers beside ours, tried on a toy."""

from __future__ import annotations

import json

import pytest

from benchmarks.scale import integrations

pytest.importorskip("trl")


def test_every_case_runs(tmp_path):
    integrations.main(["--small", "--device", "cpu", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "integrations.json").read_text())
    assert [one["case"] for one in record["cases"]] == list(integrations.CASES)
    for one in record["cases"]:
        assert one["difference"] < integrations.TOLERANCE
        assert all(
            value > 0 for side in one["peak_bytes"] for value in (one["peak_bytes"][side], *one["seconds"][side])
        )
    page = (tmp_path / "integrations.md").read_text()
    assert page.count("\n| ") == 1 + len(integrations.CASES)


def test_other_losses_stop_it(monkeypatch, tmp_path):
    setting = integrations.Setting("toy", 2, 16, "cpu", str(tmp_path))
    pair = integrations.trainer_wga(setting)
    monkeypatch.setitem(integrations.CASES, "Trainer, WGA", lambda _: pair._replace(ours=lambda: 2 * pair.theirs()))
    with pytest.raises(SystemExit, match="Trainer, WGA: the losses are"):
        integrations.measure("Trainer, WGA", setting, 1)
