"""Runs of the methods that need text or models made beforehand: by one word, killed, resumed, and what comes after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pyunlearn.runs import ConfigError, load_config
from pyunlearn.runs import job as job_module
from pyunlearn.runs.compare import compare
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.cru import calibrate_cru
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.export import export
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.geffect import measure_run
from pyunlearn.runs.reliability import Settings, measure_reliability
from pyunlearn.runs.run import run
from pyunlearn.runs.uwc import calibrate_uwc
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.settings import merge

from ..tiny import TINY

REINFORCED = ("task_vector", "whp", "whp_logits")
SHORT = {
    "bss": {"forget": [{"name": "bss", "options": {"samples": 2, "max_new_tokens": 5, "refresh_epochs": 1}}]},
    "altpo": {"forget": [{"name": "altpo", "options": {"alternates": 2, "max_new_tokens": 5}}]},
    **{name: {"reinforce": {"epochs": 3, "batch_size": 1, "warmup": 0, "save_steps": 1}} for name in REINFORCED},
}


@pytest.fixture
def make(tmp_path):
    """The configuration of a recipe on the tiny world."""

    def config(recipe, place="run", **changes):
        steps = {} if recipe in ("task_vector", "whp_logits") else {"epochs": 3, "batch_size": 1, "save_steps": 1}
        own = {
            "unlearn": merge({"recipe": recipe, "warmup": 0, **steps}, SHORT[recipe]),
            "output": str(tmp_path / place),
        }
        base = {**TINY, "evaluate": {**TINY["evaluate"], "metrics": ["probability", "rouge_l"]}}
        base.pop("unlearn")
        return RunConfig.model_validate(merge(merge(base, own), changes))

    return config


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): load_file(path)
        for path in sorted((folder / "checkpoint").rglob("*.safetensors"))
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[file][name]) for file, tensors in one.items() for name, tensor in tensors.items()
    )


def losses(folder):
    return [(row["stage"], row["step"], row["loss"]) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("recipe", SHORT)
def test_a_run_and_all_that_is_done_with_it(make, tmp_path, recipe):
    config = make(recipe)
    result = run(config)
    folder = result.folder
    with pytest.raises(FileExistsError, match="a finished run; choose --resume"):
        run(config)
    page = (folder / "report.html").read_text()
    stages = {row["stage"] for row in read_metrics(folder / "metrics.jsonl")}
    assert ("reinforce" in stages) == (folder / "reinforced").is_dir() == (recipe in REINFORCED)
    assert ("unlearn" in stages) == (recipe not in ("task_vector", "whp_logits"))
    unlearning = json.loads((folder / "unlearning.json").read_text())
    if recipe in REINFORCED:
        assert unlearning["reinforced"]["steps"] == 6
        assert "6 steps on the forget set" in page
    assert (folder / "texts").is_dir() == (recipe in ("bss", "altpo"))
    for path in folder.glob("evaluation/after*"):
        path.unlink()
    assert run(config, resume=True).table == result.table  # of the model as it is loaded
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "Who?", "answer": "Nobody."}\n')
    numbers = evaluate_files(FilesConfig.of(str(folder / "checkpoint"), str(data), rouge_samples=1))
    out = export(folder, tmp_path / "given")
    assert evaluate_files(FilesConfig.of(str(out), str(data), rouge_samples=1)) == numbers
    card = (out / "README.md").read_text()
    assert ("load_model(FOLDER)" in card) == (recipe == "whp_logits")
    compare([folder], out=tmp_path / "compared")
    if recipe == "whp_logits":  # two models: nothing of them is mixed, read inside or trained as if they were one
        for calibrate in (calibrate_uwc, calibrate_cru):
            with pytest.raises(ValueError, match=r"its model is two whose logits are combined, and \w+ mixes"):
                calibrate(folder)
        for attack in ("probing", "relearning"):
            with pytest.raises(
                ValueError, match=f"attack={attack}: the model of .* is two whose .* jailbreak, noising"
            ):
                measure_reliability([folder], out=tmp_path / "attacked", attacks=[attack], settings=Settings(relearn=1))
    assert load_config(folder / "config.yaml") == config
    if recipe != "whp_logits":
        measured = pytest.raises(ValueError, match="geffect: is measured o")
        with measured:
            measure_run(folder)


KILLED = """
import os, signal, sys, yaml
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import SealCheckpoints
original, stage, step = SealCheckpoints.on_save, sys.argv[2], int(sys.argv[3])
def on_save(self, args, state, control, **kwargs):
    original(self, args, state, control, **kwargs)
    if self.stage == stage and state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
SealCheckpoints.on_save = on_save
run(RunConfig.model_validate(yaml.safe_load(open(sys.argv[1]))))
"""


@pytest.mark.parametrize(
    ("recipe", "stage", "step"),
    [("bss", "unlearn", 3), ("altpo", "unlearn", 4), ("whp", "reinforce", 2), ("whp", "unlearn", 3),
     ("task_vector", "reinforce", 4), ("whp_logits", "reinforce", 1)],
)  # fmt: skip
def test_killed_and_resumed_it_has_the_same_bits(make, tmp_path, recipe, stage, step):
    whole, config = make(recipe, "whole"), make(recipe, "killed")
    table = run(whole).table
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.yaml"), stage, str(step)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (config.folder / "checkpoint").exists()
    assert run(config, resume=True).table == table
    assert same(files_of(config.folder), files_of(whole.folder))
    assert losses(config.folder) == losses(whole.folder)


def test_killed_before_the_result_is_whole_it_is_made_again(make, tmp_path, monkeypatch):
    """After the reinforced model, while the unlearned one is written."""
    whole, config = make("task_vector", "whole"), make("task_vector", "killed")
    run(whole)
    original = job_module.write_model

    def killed(path, model, tokenizer):
        if path.name == "checkpoint":
            raise SystemExit
        original(path, model, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "write_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    assert (config.folder / "reinforced").is_dir()
    run(config, resume=True)
    assert same(files_of(config.folder), files_of(whole.folder))


def test_a_task_vector_is_the_equation_on_the_files_of_the_run(make):
    config = make("task_vector", unlearn={"reinforce": {"strength": 2.5}})
    run(config)
    base, reinforced, made = (
        load_file(config.folder / name / "model.safetensors") for name in ("memorised", "reinforced", "checkpoint")
    )
    for name, weight in made.items():
        wanted = base[name].double() - 2.5 * (reinforced[name].double() - base[name].double())
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-6, atol=1e-7)
    unlearning = json.loads((config.folder / "unlearning.json").read_text())
    changed = torch.cat([(made[name] - base[name]).abs().flatten() for name in made]).mean()
    assert unlearning["mean_absolute_change"] == pytest.approx(float(changed), rel=1e-3)


@pytest.mark.parametrize("recipe", ["task_vector", "whp_logits"])
def test_strength_0_is_the_model_before(make, recipe):
    config = make(recipe, unlearn={"reinforce": {"strength": 0}})
    table = run(config).table
    assert all(row["before"] == row["after"] for row in table)
    if recipe == "task_vector":
        made, base = (load_file(config.folder / name / "model.safetensors") for name in ("checkpoint", "memorised"))
        assert all(torch.equal(made[name], base[name]) for name in base)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("recipe", ["task_vector", "whp_logits", "whp", "bss", "altpo"])
def test_by_an_adapter(make, recipe, kind):
    """The reinforced model is an adapter, so is what a task vector makes of it, and the evaluation is the file's."""
    config = make(recipe, model={"lora": {"r": 2, "save": kind}})
    table = run(config).table
    if recipe in REINFORCED:
        assert (config.folder / "reinforced" / "adapter_model.safetensors").is_file()
    if recipe != "whp_logits":
        names = {path.name for path in (config.folder / "checkpoint").glob("*.safetensors")}
        assert names == {"model.safetensors" if kind == "merged" else "adapter_model.safetensors"}
    for path in config.folder.glob("evaluation/after*"):
        path.unlink()
    assert run(config, resume=True).table == table


def test_a_combined_model_is_another_runs_model(make, tmp_path):
    """It is evaluated as before; an objective, which needs one head, is refused."""
    first = run(make("whp_logits"))
    made = {"name_or_path": str(first.folder / "checkpoint"), "options": {}}
    data = {"source": "files", "forget": str(tmp_path / "f.jsonl"), "retain": str(tmp_path / "r.jsonl"), "holdout": 0}
    (tmp_path / "f.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    (tmp_path / "r.jsonl").write_text('{"question": "Why?", "answer": "For nothing."}\n')
    config = {
        "model": made,
        "data": data,
        "output": str(tmp_path / "second"),
        "unlearn": {"forget": "ga", "retain": []},
    }
    with pytest.raises(ValueError, match="is two models whose logits are combined, which are not trained as one"):
        run(RunConfig.model_validate(config))
    strength = first.folder / "checkpoint" / "combined.json"
    strength.write_text('{"strength": 5.0}')
    with pytest.raises(ValueError, match=r"combined.json: is damaged"):
        evaluate_files(FilesConfig.of(str(first.folder / "checkpoint"), str(tmp_path / "f.jsonl"), rouge_samples=1))


def test_anchors_are_part_of_what_a_run_reads(make, tmp_path):
    terms = tmp_path / "terms.json"
    terms.write_text('{"book": "film"}')
    config = make("whp", unlearn={"reinforce": {"anchors": str(terms)}})
    run(config)
    terms.write_text('{"book": "play"}')
    with pytest.raises(FileExistsError, match=r"unlearn.reinforce.anchors changed since the run began"):
        run(config, resume=True)
    missing = make("whp", "other", unlearn={"reinforce": {"anchors": str(tmp_path / "term.json")}})
    with pytest.raises(FileNotFoundError, match=r"unlearn.reinforce.anchors: no such file"):
        run(missing)
    assert not missing.folder.exists()


@pytest.mark.parametrize("word", ["bss", "altpo", "whp"])
def test_by_one_word_under_forget(word):
    config = load_config(None, [f"unlearn.forget={word}"])
    assert [term.name for term in config.unlearn.forget] == [word]
    assert (config.unlearn.reinforce is not None) == (word == "whp")
    assert config.unlearn.trains
    assert RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["unlearn.forget=bsss"], "objective='bsss': did you mean bss or bst?"),
        (["unlearn.retain=bss"], "unlearn.retain: bss is a forget objective"),
        (["unlearn.forget=bss", "unlearn.forget.options.samples=0"], "bss: samples=0: needs a whole number >= 1"),
        (["unlearn.forget=bss", "unlearn.forget.options.sample=2"], "bss: option='sample': did you mean samples?"),
        (
            ["unlearn.forget=altpo", "unlearn.forget.options.alternates=0"],
            "altpo: alternates=0: needs a whole number >= 1",
        ),
        (
            ["unlearn.recipe=task_vector", "unlearn.reinforce.strength=-1"],
            "unlearn.reinforce.strength: needs 0 at least, got -1",
        ),
        (["unlearn.recipe=task_vector", "unlearn.reinforce.into=weigths"], "unlearn.reinforce.into"),
        (
            ["unlearn.recipe=task_vector", "unlearn.forget=ga"],
            "takes the place of objectives: set forget=[] and retain=[]",
        ),
        (["unlearn.recipe=task_vector+mrd"], "takes no steps that sampling or keep_steps are of"),
        (["unlearn.recipe=whp_logits", "evaluate.every=epoch"], "has no steps; set it to null"),
        (["unlearn.recipe=whp", "unlearn.reinforce.into=weights"], "takes the place of objectives"),
        (["unlearn.forget=ga", "unlearn.reinforce.into=labels"], "makes the labels of whp; needs both or neither"),
        (["unlearn.recipe=task_vector", "unlearn.reinforce.anchors=a.json"], "are for labels, and into=weights"),
        (["unlearn.recipe=bss", "geffect.every=1"], "geffect"),
        (
            ["unlearn.recipe=task_vector", "model.lora.use_dora=true"],
            "scales what plain LoRA adds; leave out model.lora.use_dora",
        ),
    ],
)
def test_bad_settings(overrides, message, tmp_path):
    with pytest.raises((ConfigError, ValueError)) as error:
        run(load_config(None, [*overrides, f"output={tmp_path / 'run'}", "data.num_authors=4"]))
    assert message in str(error.value)
