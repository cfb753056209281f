"""Early stopping: which of the models on the way a run ends with, and that it is that model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from pyunlearn._files import check_seal
from pyunlearn.runs import ConfigError, load_config
from pyunlearn.runs import run as run_module
from pyunlearn.runs.evaluate_config import PickConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.pick import pick_step, told_pick
from pyunlearn.runs.run import run

from .test_written_runs import KILLED, same

METRIC = "extraction_strength"
ROWS = {"forget": 20, "retain": 20}
PICKING = {
    "unlearn": {"batch_size": 1, "learning_rate": 2e-3, "forget": "ga", "retain": [], "keep_steps": 2},
    "evaluate": {"every": 2, "rouge_samples": 1, "pick": {"by": "probability", "kept": 0.83}},
}  # six steps


def means(forget, retain, holdout=None):
    sets = {"forget": forget, "retain": retain} | ({} if holdout is None else {"holdout": holdout})
    return {name: {} if value is None else {METRIC: value} for name, value in sets.items()}


CURVE = {2: means(0.6, 0.95), 4: means(0.3, 0.9), 6: means(0.1, 0.89), 8: means(0.3, 0.99)}


@pytest.mark.parametrize(
    ("before", "curve", "kept", "step", "reached"),
    [
        (means(0.9, 1.0), CURVE, 0.9, 4, True),  # the least of those that keep, the first of equal ones
        (means(0.9, 1.0), CURVE, 0.89, 6, True),
        (means(0.9, 1.0), CURVE, 0.95, 8, True),
        (means(0.9, 1.0), CURVE, 1.0, 8, False),  # none keeps it: the one that keeps the most
        (means(0.9, 0.5), {2: means(0.6, 0.4), 4: means(0.1, 0.4)}, 0.9, 2, False),
        (means(0.9, 0.0), CURVE, 1.0, 6, True),  # nothing to keep: all do
        # held-out rows decide where there are any
        (means(0.9, 1.0, 1.0), {2: means(0.6, 0.1, 0.9), 4: means(0.3, 1.0, 0.8)}, 0.9, 2, True),
        # a step without a finite mean is none to pick
        (means(0.9, 1.0), {2: means(0.6, 0.95), 4: means(None, 1.0), 6: means(0.0, None)}, 0.9, 2, True),
    ],
)
def test_the_step_that_forgets_most_of_those_that_keep(before, curve, kept, step, reached):
    picked = pick_step(before, curve, PickConfig(kept=kept), dict.fromkeys(before, 20))
    assert (picked["step"], picked["reached"]) == (step, reached)
    assert picked["set"] == ("holdout" if "holdout" in before else "retain")


def test_few_rows_held_out_decide_nothing():
    curve = {2: means(0.6, 0.1, 0.9), 4: means(0.3, 1.0, 0.8)}
    picked = pick_step(means(0.9, 1.0, 1.0), curve, PickConfig(), {"holdout": 9, "retain": 10})
    assert (picked["step"], picked["set"]) == (4, "retain")
    assert told_pick(picked) == (
        "step 4 of 2, 4: it forgets most of those that keep 90% of extraction strength; forget 0.900 -> 0.300, retain "
        "rows, which the unlearning itself may rehearse, 1.000 -> 1.000 (100.0%)"
    )
    missed = pick_step(means(0.9, 1.0, 1.0), curve, PickConfig(kept=0.95), {"holdout": 10, "retain": 10})
    assert told_pick(missed) == (
        "step 2 of 2, 4: it keeps the most, none keeps 95% of extraction strength; forget 0.900 -> 0.600, held-out "
        "rows 1.000 -> 0.900 (90.0%)"
    )


def test_there_is_nothing_to_pick_by():
    with pytest.raises(ValueError, match=r"evaluate\.pick: extraction_strength has no finite mean to pick a step by"):
        pick_step(means(0.9, 1.0), {2: means(None, 1.0)}, PickConfig(), ROWS)
    with pytest.raises(ValueError, match=r"evaluate\.pick: extraction_strength has no finite mean to pick a step by"):
        pick_step(means(0.9, None), CURVE, PickConfig(), ROWS)
    with pytest.raises(ValueError, match=r"evaluate\.pick: needs rows to retain"):
        pick_step({"forget": {METRIC: 0.9}}, CURVE, PickConfig(), {"forget": 20})


def weights(path):
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.fixture
def picking(tiny_config, tmp_path):
    def make(name="run", **changes):
        settings = {"unlearn": {**PICKING["unlearn"], **changes}, "evaluate": PICKING["evaluate"]}
        return tiny_config({**settings, "output": str(tmp_path / name)})

    return make


def test_a_run_ends_with_the_model_that_is_picked(picking, monkeypatch):
    config = picking()
    with Console(record=True, width=200, file=open(os.devnull, "w")) as console:
        result = run(config, console=console)
    folder = RunFolder(config.folder)
    unlearning = read(folder.path, "unlearning.json")
    picked = unlearning["picked"]
    assert folder.evaluated_steps() == sorted(folder.kept_models()) == [2, 4, 6]
    assert list(picked["steps"]) == ["2", "4", "6"]
    assert picked["step"] < unlearning["steps"] == 6  # else this would show nothing
    assert picked["reached"]
    step = picked["step"]
    for sub in (folder.kept / f"step-{step}", folder.checkpoint):
        check_seal(sub, "")
    assert same(weights(folder.checkpoint), weights(folder.kept / f"step-{step}"))
    assert not folder.training("unlearn").exists()
    after, then, last = (read(folder.path, f"evaluation/{name}.json") for name in ("after", f"step-{step}", "step-6"))
    assert after == then != last
    before = read(folder.path, "evaluation/before.json")
    for found, expected in ((picked["before"], before), (picked["steps"]["6"], last)):
        assert found == {"forget": expected["forget"]["probability"], "retain": expected["holdout"]["probability"]}
    told = told_pick(picked)
    html = folder.report.read_text()
    assert f"pick {told}" in console.export_text().replace("\n", " ")
    assert told.replace(">", "&gt;") in html
    assert html.count(f"the run's model is that of step {step}") == 2
    monkeypatch.setattr(run_module, "compute", None)
    assert run(config, resume=True) == result


@pytest.mark.parametrize("step", [3, 5])
def test_killed_and_resumed_it_picks_the_same(picking, tmp_path, step):
    whole, config = (picking(name, save_steps=1) for name in ("whole", "killed"))
    table = run(whole).table
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.yaml"), "unlearn", str(step)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert run(config, resume=True).table == table
    assert same(*(weights(each.folder / "checkpoint") for each in (config, whole)))
    assert read(config.folder, "unlearning.json") == read(whole.folder, "unlearning.json")


def test_killed_before_the_picked_model_is_whole_it_is_picked_again(picking, monkeypatch):
    config = picking()

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "copy_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert not (config.folder / "checkpoint").exists()
    picked = read(config.folder, "unlearning.json")["picked"]
    run(config, resume=True)
    assert read(config.folder, "unlearning.json")["picked"] == picked
    assert same(
        weights(config.folder / "checkpoint"), weights(config.folder / "checkpoints" / f"step-{picked['step']}")
    )


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_of_adapters_too(tiny_config, save):
    """The last step is no multiple of those that are measured: it is measured and kept all the same."""
    config = tiny_config(
        {
            "model": {"lora": {"save": save, "r": 2}},
            "unlearn": {**PICKING["unlearn"], "learning_rate": 1e-2, "max_steps": 5},
            "evaluate": {**PICKING["evaluate"], "pick": {"by": "probability", "kept": 0.05}},
        }
    )
    result = run(config)
    picked = read(result.folder, "unlearning.json")["picked"]
    assert list(picked["steps"]) == ["2", "4", "5"]
    kept = result.folder / "checkpoints" / f"step-{picked['step']}"
    assert same(weights(result.folder / "checkpoint"), weights(kept))
    assert (kept / "adapter_config.json").is_file() == (save == "adapter")
    forget = next(row["after"] for row in result.table if (row["set"], row["metric"]) == ("forget", "probability"))
    assert forget == pytest.approx(picked["steps"][str(picked["step"])]["forget"], rel=1e-5)


KEEPING = ["evaluate.every=4", "unlearn.keep_steps=2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluate.pick={}"], "evaluate.every=N and unlearn.keep_steps=N, or a number that divides it; got None and"),
        (["evaluate.pick={}", "evaluate.every=epoch", "unlearn.keep_steps=2"], "got epoch and 2"),
        (["evaluate.pick={}", "evaluate.every=3", "unlearn.keep_steps=2"], "got 3 and 2"),
        (["evaluate.pick=fluency", *KEEPING], "evaluate.pick.by: pick.by='fluency': needs one of extraction_strength"),
        (["evaluate.pick={kept: 1.5}", *KEEPING], "evaluate.pick.kept: needs 1 at most, got 1.5"),
        (["evaluate.pick={by: rouge_l}", "evaluate.metrics=[probability]", *KEEPING],
         "evaluate.pick.by=rouge_l: needs it among evaluate.metrics, got probability"),
        (["evaluate.pick={}", "data.forget=x.jsonl", "unlearn.retain=[]", *KEEPING],
         "evaluate.pick: needs rows to retain"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=settings)
    assert message in str(caught.value)


def test_one_word():
    pick = load_config(overrides=["evaluate.pick=probability", *KEEPING]).evaluate.pick
    assert pick == PickConfig(by="probability", kept=0.9)
