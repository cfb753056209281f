"""Resumable checkpoints: the last one whole is taken, and only as it was written; metrics lose no line in silence."""

from __future__ import annotations

import os
import time

import pytest

from pyunlearn._files import check_seal, seal
from pyunlearn.training.callbacks import MetricsWriter, append_metrics, read_metrics
from pyunlearn.training.folder import TrainingFolder
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.unlearn import UnlearnData, unlearn

from ..runs.test_run import press_at

SETTINGS = UnlearnConfig(
    forget="ga", retain=[], learning_rate=1e-3, batch_size=4, max_steps=4, scheduler="constant", save_steps=1
)


@pytest.fixture
def train(tiny, tmp_path):
    """The same training, again and again in one folder."""
    data, stage = UnlearnData(tiny.world.forget, tiny.world.retain, []), Stage(TrainingFolder(tmp_path / "work"))
    return stage.folder, lambda: unlearn(stage, SETTINGS, tiny.model(), tiny.tokenizer, data)


@pytest.fixture
def stopped(train, monkeypatch):
    """At step 3 of 4, with a checkpoint dated ahead among those before."""
    folder, start = train
    ahead = time.time() + 1e6
    original = MetricsWriter.on_log

    def dated(self, args, state, control, logs=None, **kwargs):
        for path in folder.checkpoints("unlearn").values():
            os.utime(path, (ahead, ahead))
        original(self, args, state, control, logs, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "on_log", dated)
        press_at(patch, "unlearn", 2)
        with pytest.raises(Interrupted, match="at step 3 of 4"):
            start()
    return folder, start


def test_the_checkpoint_of_the_most_steps_stays_and_a_damaged_one_is_refused(stopped):
    folder, start = stopped
    assert list(folder.checkpoints("unlearn")) == [3]
    last = folder.last_checkpoint("unlearn")
    names = {path.name for path in last.iterdir()} - {"digests.json"}
    assert names >= {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    remedy = rf"; delete {last}: the checkpoint before it, or the start of the stage, is taken then"
    for name in names:
        whole = (last / name).read_bytes()
        middle = len(whole) // 2
        (last / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=f"{name}: is damaged, it is not what was written{remedy}"):
            start()
        (last / name).unlink()
        with pytest.raises(ValueError, match=f"{name}: is missing{remedy}"):
            start()
        (last / name).write_bytes(whole)
    for text in ("{", "[]"):
        digests = (last / "digests.json").read_text()
        (last / "digests.json").write_text(text)
        with pytest.raises(ValueError, match=r"digests\.json: is damaged"):
            start()
        (last / "digests.json").write_text(digests)
    (folder.training("unlearn") / "checkpoint-9").mkdir()  # cut short
    (folder.training("unlearn") / "checkpoint-9" / "trainer_state.json").write_text("{")
    assert start().steps == 4
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 4]


def test_checkpoints_without_a_seal_are_told(tmp_path, caplog):
    folder = TrainingFolder(tmp_path)
    paths = {step: folder.training("unlearn") / f"checkpoint-{step}" for step in (2, 9, 10)}
    for path in paths.values():
        path.mkdir(parents=True)
    seal(paths[2])
    seal(paths[9])
    assert folder.last_checkpoint("unlearn") == paths[9]
    assert [record.getMessage().split(": passed over, it has no digests.json")[0] for record in caplog.records] == [
        str(paths[10])
    ]
    (paths[9] / "digests.json").unlink()
    caplog.clear()
    assert folder.last_checkpoint("unlearn") == paths[2]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(paths[10]), str(paths[9])]


def test_a_seal_knows_every_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "part").write_text("a")
    seal(tmp_path)
    check_seal(tmp_path, "")
    (tmp_path / "more").write_text("b")  # what came later is not known
    check_seal(tmp_path, "")
    (tmp_path / "sub" / "part").write_text("b")
    with pytest.raises(ValueError, match=r"sub/part: is damaged, it is not what was written; begin anew"):
        check_seal(tmp_path, "begin anew")


def test_a_bad_line_of_metrics_is_told_unless_it_is_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": "unlearn", "step": step} for step in range(3)]
    for row in rows:
        append_metrics(path, row)
    with open(path, "a") as file:
        file.write('{"stage": "unl')
    assert read_metrics(path) == rows
    lines = path.read_text().splitlines()
    for bad in ("{", "3", "[" * 100_000, "\udcff"):
        path.write_bytes("\n".join([lines[0], bad, *lines[1:3], ""]).encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: is damaged, no row of metrics \(.*\); repair or del"):
            read_metrics(path)
    path.write_text("\n\n")
    assert read_metrics(path) == []
