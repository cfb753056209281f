"""What TensorBoard and W&B are told, and where they keep it; each where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from pyunlearn.runs.run import run
from pyunlearn.training.arguments import check_trackers
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.trainer import UnlearnTrainer

SHORT = {
    "memorise": {"max_steps": 2},
    "unlearn": {"max_steps": 4},
    "evaluate": {"every": 2, "metrics": ["probability"]},
}


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed: pip install {name}")


def told(config, name):
    """The run of the configuration with this tracker of both stages, and what it should have been told."""
    config = config({**SHORT, **{stage: {**SHORT[stage], "report_to": name} for stage in ("memorise", "unlearn")}})
    folder = run(config).folder
    losses = {
        stage: [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if row["stage"] == stage]
        for stage in ("memorise", "unlearn")
    }
    means = json.loads((folder / "evaluation" / "step-2.json").read_text())
    return folder, losses, means


def test_none_by_default():
    assert UnlearnConfig().report_to == []
    assert UnlearnConfig(report_to="wandb").report_to == ["wandb"]
    with pytest.raises(ValueError, match="report_to"):
        UnlearnConfig(report_to="wand")


def test_one_that_is_not_installed_is_told_before_anything_is_done(tiny_config, tiny, arguments, monkeypatch):
    monkeypatch.setattr("pyunlearn.training.arguments.find_spec", lambda name: None)
    config = tiny_config({"unlearn": {"report_to": ["wandb"]}})
    with pytest.raises(ImportError, match=r"unlearn\.report_to=wandb: wandb is not installed: pip install wandb"):
        run(config)
    assert not config.folder.exists()
    with pytest.raises(ImportError, match=r"args\.report_to=tensorboard: .*pip install tensorboard"):
        UnlearnTrainer(
            tiny.model(), arguments(report_to=["tensorboard"]), train_dataset=tiny.pairs(), objectives=["ga"]
        )


def test_any_package_that_serves_will_do(monkeypatch):
    monkeypatch.setattr("pyunlearn.training.arguments.find_spec", lambda name: name == "tensorboardX" or None)
    check_trackers(["tensorboard"])
    with pytest.raises(ImportError, match="report_to=wandb"):
        check_trackers(["tensorboard", "wandb"])


@needs("tensorboard")
def test_tensorboard(tiny_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, losses, means = told(tiny_config, "tensorboard")
    for stage, own in losses.items():
        events = EventAccumulator(str(folder / "trackers" / "tensorboard" / stage)).Reload()
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(own, rel=1e-5)
    for name in ("forget", "retain", "holdout"):
        (event,) = events.Scalars(f"train/{name}/probability")
        assert (event.step, event.value) == (2, pytest.approx(means[name]["probability"], rel=1e-5))


@needs("wandb")
def test_wandb_offline(tiny_config, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows, log = {}, wandb.Run.log

    def recorded(self, data, *args, **options):
        rows.setdefault(self.name.split("/")[-1], []).append(dict(data))
        return log(self, data, *args, **options)

    monkeypatch.setattr(wandb.Run, "log", recorded)
    folder, losses, means = told(tiny_config, "wandb")
    assert wandb.run is None  # each stage's is finished
    written = list((folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert all(file.stat().st_size for file in written)
    for stage, own in losses.items():
        assert [row["train/loss"] for row in rows[stage] if "train/loss" in row] == own
    (row,) = [row for row in rows["unlearn"] if "train/forget/probability" in row]
    assert row["train/global_step"] == 2
    assert {name: row[f"train/{name}/probability"] for name in means} == {n: m["probability"] for n, m in means.items()}
