"""Runs that unlearn by an adapter, from the configuration to the folder they leave."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pyunlearn.geffect import g_effect
from pyunlearn.model import lora as lora_module
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.forward import supervised_stats
from pyunlearn.model.load import load_model
from pyunlearn.model.lora import add_adapter, count_parameters
from pyunlearn.runs import job as job_module
from pyunlearn.runs.config import ConfigError, RunConfig
from pyunlearn.runs.data import load_data
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.fingerprint import model_fingerprints
from pyunlearn.runs.geffect import measure_run
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.run import run, steps_taken
from pyunlearn.runs.score import score
from pyunlearn.runs.sections import ModelConfig
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.selection import trained_names
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

from .test_run import press_at

SETTINGS = {
    "unlearn": {"batch_size": 1, "learning_rate": 3e-3, "epochs": 2},
    "memorise": {"epochs": 1},
    "evaluate": {"metrics": ["probability"]},
}


@pytest.fixture
def lora_config(tiny_config):
    def make(changes=None, **lora):
        return tiny_config(merge({**SETTINGS, "model": {"lora": {"r": 2, **lora}}}, changes or {}))

    return make


def weights(path):
    return {name: load_file(file) for file in path.glob("*.safetensors") for name in [file.name]}


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[file][name]) for file, tensors in first.items() for name, tensor in tensors.items()
    )


# ---- settings --------------------------------------------------------------------------------------------------------


def test_defaults_and_pefts_own_keys():
    given = load_config(None, ["model.lora={}"]).model.lora
    assert (given.r, given.alpha, given.dropout, given.targets, given.save) == (8, 16, 0.0, "all-linear", "merged")
    more = load_config(None, ["model.lora.targets=q_proj", "model.lora.use_rslora=true"]).model.lora
    assert more.adapter() == {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj"], "use_rslora": True}
    assert load_config().model.lora is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.lora.alhpa=3"], "model.lora: 'alhpa': unknown key; did you mean alpha"),
        (["model.lora.use_rlora=true"], "model.lora: 'use_rlora': unknown key; did you mean use_rslora"),
        (["model.lora.lora_alpha=3"], "model.lora: lora_alpha is model.lora.alpha"),
        (["model.lora.task_type=x"], "model.lora: 'task_type': unknown key"),
        (["model.lora.bias=all"], "model.lora: 'bias': unknown key; needs one of r, alpha, dropout, targets, save"),
        (["model.lora.init_lora_weights=pissa"], "init_lora_weights='pissa': needs true or gaussian"),
        (["model.lora.r=0"], "model.lora.r: needs 1 at least, got 0"),
        (["model.lora.r=true"], "model.lora.r: needs a number, got True"),
        (["model.lora.save=merge"], "model.lora.save='merge': did you mean merged?"),
        (["model.quantize=nf4"], "model: quantize=nf4: needs a model of safetensors, a folder or a Hub id"),
        (["model.name_or_path=a/b", "model.quantize=nf5"], "model.quantize='nf5': did you mean nf4?"),
        (["model.name_or_path=a/b", "model.quantize=nf4"], "needs model.lora.save=adapter, and no memorise"),
        (["model.name_or_path=a/b", "model.quantize=nf4", "model.lora={}"], "needs model.lora.save=adapter"),
        (["model.lora.save=adapter", "memorise=null"], "needs a base that is found again"),
        (
            [
                *("model.name_or_path=a/b", "model.quantize=nf4", "model.lora.save=adapter"),
                *("unlearn.sampling=mrd", "data.refusals=x"),
            ],
            "unlearn.sampling=mrd scores by small changes of the weights, and quantised ones have none",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_without_peft_nothing_is_begun(lora_config, monkeypatch):
    monkeypatch.setattr(lora_module.importlib.util, "find_spec", lambda name: None)
    config = lora_config()
    with pytest.raises(ImportError, match=r"model\.lora needs the peft package"):
        run(config)
    assert not config.folder.exists()


def test_a_target_that_is_none_is_told_before_anything_is_memorised(lora_config):
    config = lora_config(targets=["q_prj"])
    with pytest.raises(ValueError, match=r"model\.lora\.targets='q_prj': did you mean q_proj"):
        run(config)
    assert not config.folder.exists()


# ---- what it leaves --------------------------------------------------------------------------------------------------


def test_the_reference_is_the_model_with_its_adapter_off(lora_config, tmp_path):
    """The losses of every step are those that a cache of the memorised model gives, and there is no cache."""
    config = lora_config({"unlearn": {"forget": "npo", "retain": "kl"}})
    result = run(config)
    assert not (result.folder / "reference").exists()
    rows = [row for row in read_metrics(result.folder / "metrics.jsonl") if row["stage"] == "unlearn"]
    assert rows[0]["retain.kl/loss"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["retain.kl/loss"] > 1e-6
    model, _ = load_model(str(result.folder / "checkpoint"))
    before, _ = load_model(str(result.folder / "memorised"))
    moved = [name for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True)
             if not torch.equal(a, b)]  # fmt: skip
    assert len(moved) == 2 * 7
    assert all("_proj" in name for name in moved)
    unlearning = json.loads((result.folder / "unlearning.json").read_text())
    trained, every = unlearning["trained"], unlearning["parameters"]
    assert every - trained == sum(weight.numel() for weight in model.parameters())
    page = (result.folder / "report.html").read_text()
    assert f"{trained:,} of {every:,} parameters ({trained / every:.2%})" in page


def test_how_much_is_trained_is_told_where_it_is_not_all(tiny_config):
    config = tiny_config()
    for unlearning in ({"steps": 1}, {"steps": 1, "trained": 7, "parameters": 7}):
        assert "trained" not in steps_taken(config, unlearning)
    told = steps_taken(config, {"steps": 1, "trained": 1000, "parameters": 80000})
    assert told["trained"] == "1,000 of 80,000 parameters (1.25%)"


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_stopped_and_killed_and_resumed_it_ends_the_same(lora_config, tmp_path, monkeypatch, kind):
    changes = {"unlearn": {"save_steps": 1}}
    config = lora_config(changes, save=kind, dropout=0.1)
    whole = lora_config({**changes, "output": str(tmp_path / "whole")}, save=kind, dropout=0.1)
    table = run(whole).table
    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 1)
        with pytest.raises(Interrupted, match=r"stopped in unlearn at step 2 of 4, checkpoint saved"):
            run(config)
    checkpoint = config.folder / "training" / "unlearn" / "checkpoint-2"
    assert {file.name for file in checkpoint.glob("*.safetensors")} == {"adapter_model.safetensors"}
    with monkeypatch.context() as patch:  # while the unlearned model is being written

        def killed(path, model, tokenizer):
            path.with_name(f".{path.name}.tmp").mkdir()
            raise SystemExit

        patch.setattr(job_module, "write_model", killed)
        with pytest.raises(SystemExit):
            run(config, resume=True)
    assert run(config, resume=True).table == table
    theirs = weights(whole.folder / "checkpoint")
    assert same(weights(config.folder / "checkpoint"), theirs)
    assert theirs.keys() == {"model.safetensors" if kind == "merged" else "adapter_model.safetensors"}
    ours, theirs = (
        [{k: v for k, v in row.items() if "second" not in k and "runtime" not in k} for row in read_metrics(path)]
        for path in (config.folder / "metrics.jsonl", whole.folder / "metrics.jsonl")
    )
    assert ours == theirs


def test_saved_as_an_adapter_it_is_the_merged_model_everywhere(lora_config, tmp_path):
    """Its own evaluation after a restart; score, evaluate and geffect; and as the model of another run."""
    changes = {"unlearn": {"keep_steps": 2}}
    adapter = lora_config({**changes, "output": str(tmp_path / "adapter")}, save="adapter")
    merged = lora_config({**changes, "output": str(tmp_path / "merged")})
    table = run(adapter).table
    assert run(merged).table == table
    folders = [config.folder / "checkpoint" for config in (adapter, merged)]
    settings = json.loads((folders[0] / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((adapter.folder / "memorised").resolve())
    for path in adapter.folder.glob("evaluation/after*"):
        path.unlink()
    assert run(adapter, resume=True).table == table  # of the model as it is loaded
    models = [load_model(str(folder))[0] for folder in folders]
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])
    kept = [load_model(str(config.folder / "checkpoints" / "step-2"))[0] for config in (adapter, merged)]
    assert model_fingerprint(kept[0]) == model_fingerprint(kept[1]) != model_fingerprint(models[0])
    rows = measure_run(adapter.folder).rows
    assert [row["step"] for row in rows] == [0, 2, 4]
    forget = {name: torch.arange(3, 11).view(2, 4) for name in ("input_ids", "labels")}
    forget["attention_mask"] = torch.ones_like(forget["labels"])
    nll = partial(lambda model, sign: -sign * supervised_stats(model, forget)[0].logp.mean(), sign=1.0)
    effects = [g_effect(model, partial(nll, sign=-1.0), {"unlearn": nll}).total for model in models]
    assert effects[0] == effects[1]
    assert effects[0]["unlearn"] < 0
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    data.write_text('{"question": "Who?", "answer": "Nobody."}\n')
    other.write_text('{"question": "Why?", "answer": "For nothing."}\n')
    files = [FilesConfig.of(str(folder), str(data), rouge_samples=1) for folder in folders]
    scores = [score(config, out=tmp_path / f"{i}.jsonl", estimator="gradient") for i, config in enumerate(files)]
    assert [row["mrd"] for row in scores[0].records] == [row["mrd"] for row in scores[1].records]
    assert evaluate_files(files[0]) == evaluate_files(files[1])
    again = {
        "model": {"name_or_path": str(folders[0]), "lora": {"r": 2}},
        "data": {"source": "files", "forget": str(data), "retain": str(other), "holdout": 0},
        "unlearn": {"max_steps": 1},
        "evaluate": {"metrics": ["probability"]},
        "output": str(tmp_path / "again"),
    }
    result = run(RunConfig.model_validate(again))
    before, after = (load_model(str(folder))[0] for folder in (folders[0], result.folder / "checkpoint"))
    assert 0 < sum(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)) <= 14


def test_an_adapters_base_is_what_a_run_reads(lora_config, tmp_path):
    config = lora_config(save="adapter")
    run(config)
    adapter = tmp_path / "adapter"
    shutil.copytree(config.folder / "checkpoint", adapter)
    source = ModelConfig(name_or_path=str(adapter))
    before = model_fingerprints(source)
    assert before.keys() == {"model", "model's base"}
    assert source.named_paths()["model.name_or_path's base"] == str((config.folder / "memorised").resolve())
    file = config.folder / "memorised" / "config.json"
    file.write_text(file.read_text() + "\n")
    after = model_fingerprints(source)
    assert after["model"] == before["model"]
    assert after["model's base"] != before["model's base"]
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text() + "\n")
    assert model_fingerprints(source)["model"] != before["model"]


def test_it_draws_by_difficulty_and_probes_and_checkpoints(lora_config):
    """MRD and the G-effect of a model under peft on the way; padded rows, whose reference no cache could be."""
    settings = {"sampling": "mrd", "gradient_checkpointing": True, "bf16": True, "pad_to": 64}
    wide = {"forget": {"name": "ga", "preset": "paper"}, "retain": "kl"}
    config = lora_config(
        {"unlearn": {**settings, **wide}, "geffect": {"every": 2, "pointwise": True}, "evaluate": {"every": 3}}
    )
    result = run(config)
    rows = [row["geffect"] for row in read_metrics(result.folder / "metrics.jsonl") if "geffect" in row]
    assert len(rows) == 3
    assert all(torch.tensor(list(row["total"].values())).isfinite().all() for row in rows)
    assert not (result.folder / "reference").exists()
    assert not (result.folder / "geffect" / "reference").exists()
    samples = json.loads((result.folder / "unlearning.json").read_text())["samples"]
    assert sum(sample["updates"] for sample in samples) == 4


# ---- the page about it -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.findall(r"^    (pyunlearn run .*)", PAGE, re.MULTILINE) if not line.endswith("...")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_configurations(command):
    words = shlex.split(command)[2:]
    assert words[::2] == ["--set"] * (len(words) // 2)
    config = load_config(None, words[1::2])
    model, _ = load_model(**config.model.loading(), texts=load_data(config).texts, seed=config.seed)
    if config.model.lora is None:
        assert 0 < len(trained_names(model, config.unlearn)) < 10
    else:
        trained, every = count_parameters(add_adapter(model, **config.model.lora.adapter()))
        assert f"{trained:,} of {every:,} parameters ({trained / every:.2%})" in PAGE


def test_there_are_commands():
    assert len(COMMANDS) == 2
