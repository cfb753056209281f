from __future__ import annotations

import json
import math
import os
import re
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pyunlearn.data import QADataset
from pyunlearn.metrics import teacher_forced
from pyunlearn.model.load import load_tokenizer
from pyunlearn.runs import job as job_module
from pyunlearn.runs import run as run_module
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.evaluate import evaluate_sets
from pyunlearn.runs.evaluate_config import SETS, EvaluateConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.run import load_result, run
from pyunlearn.training.callbacks import MetricsWriter, read_metrics
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted, Stage
from pyunlearn.training.trainer import NonFiniteLossError, UnlearnTrainer

FILES = {
    "config.yaml", "metrics.jsonl", "table.json", "table.md", "report.html", "memorised", "checkpoint", "evaluation",
    "provenance.json",
    "reference", "unlearning.json", ".pyunlearn",
}  # fmt: skip


STAGES = ("memorise", "unlearn", "retrain")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_settings):
    """One whole run of the tiny demo, left in its folder."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    changes = {
        "output": str(output),
        "memorise": {"epochs": 60, "learning_rate": 1e-2},
        "unlearn": {"epochs": 20, "learning_rate": 3e-3},
    }
    config = RunConfig.model_validate(merge(tiny_settings, changes))
    return config, run(config)


def test_the_folder_is_whole(finished):
    config, result = finished
    folder = result.folder
    assert {path.name for path in folder.iterdir()} == FILES
    evaluations = {f"{moment}-{name}.jsonl" for moment in ("before", "after") for name in SETS}
    assert {path.name for path in (folder / "evaluation").iterdir()} == evaluations | {
        "before.json",
        "after.json",
    }
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written.pop("versions").keys() == {"pyunlearn", "python", "torch", "transformers", "platform"}
    assert RunConfig.model_validate(written) == config
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".tmp")]


def test_it_forgets_more_than_it_loses(finished):
    _, result = finished
    rows = {(row["set"], row["metric"]): row for row in result.table}
    forget, retain = rows["forget", "probability"], rows["retain", "probability"]
    assert forget["before"] > 0.3
    assert forget["after"] < 0.1
    assert retain["after"] / retain["before"] > 2 * forget["after"] / forget["before"]
    assert next(goal["met"] for goal in result.goals)
    stored = json.loads((result.folder / "table.json").read_text())
    assert stored == {"table": result.table, "goals": result.goals, "verdict": result.verdict}
    assert load_result(result.folder) == result
    markdown = (result.folder / "table.md").read_text()
    then, now = (f"{forget[m]:.4f} [{low:.3f}, {high:.3f}]" for m, (low, high) in forget["intervals"].items())
    assert f"| forget | probability | {then} | {now} |" in markdown


@pytest.mark.parametrize("forget", ["rmu", "npo"])
def test_hidden_states_are_retained(tiny_config, forget):
    """RMU + RR and NPO + RR: every step is told, and the reference's hidden states of the layer are on disk."""
    terms = {"forget": {"rmu": [{"name": "rmu", "options": {"c": 5.0, "layer": 1}}]}.get(forget, "npo"), "retain": "rr"}
    result = run(tiny_config({"unlearn": terms, "memorise": {"epochs": 1}}))
    rows = [row for row in read_metrics(result.folder / "metrics.jsonl") if row["stage"] == "unlearn"]
    assert len(rows) == 3
    assert rows[0]["retain.rr/loss"] == pytest.approx(0, abs=1e-6)  # where the reference is
    assert rows[-1]["retain.rr/loss"] > 0
    assert rows[-1][f"forget.{forget}/loss"] < rows[0][f"forget.{forget}/loss"]
    cached = load_file(result.folder / "reference" / "retain.safetensors")
    assert {"hidden.1", "hidden.offsets"} <= set(cached)
    assert "head.weight" not in cached


def test_half_precision_ends_with_its_stage(tiny_settings, finished, tmp_path):
    """In both stages of the demo, and of a model from disk; evaluations are those of the weights in float32."""
    pretrained = {"model": {"name_or_path": str(finished[1].folder / "memorised")}, "memorise": None}
    for name, changes in {"demo": {"memorise": {"bf16": True, "epochs": 2}}, "pretrained": pretrained}.items():
        settings = {**tiny_settings, "unlearn": {"bf16": True, "epochs": 2}, "output": str(tmp_path / name), **changes}
        config = RunConfig.model_validate(settings)
        before = run(config).table
        folder = RunFolder(config.folder)
        for path in folder.path.glob("evaluation/after*"):
            path.unlink()
        assert run(config, resume=True).table == before  # of the model as it is loaded


def test_the_table_is_the_mean_of_the_records(finished):
    _, result = finished
    for row in result.table:
        for moment in ("before", "after"):
            lines = (result.folder / "evaluation" / f"{moment}-{row['set']}.jsonl").read_text().splitlines()
            values = [json.loads(line)[row["metric"]] for line in lines if row["metric"] in json.loads(line)]
            assert row[moment] == pytest.approx(sum(values) / len(values))


def test_metrics_hold_every_step_and_every_term(finished):
    config, result = finished
    rows = read_metrics(result.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["stage"] == "memorise"] == list(range(1, 121))
    unlearning = [row for row in rows if row["stage"] == "unlearn"]
    assert [row["step"] for row in unlearning] == list(range(1, 21))
    for row in unlearning:
        assert row["loss"] == pytest.approx(row["forget.wga/loss"] + row["retain.kl/loss"], rel=1e-4, abs=1e-6)
        assert 0 < row["grad_norm"] < math.inf
        assert 0 <= row["learning_rate"] <= config.unlearn.learning_rate
        assert row["forget.wga/count"] > 0


def test_the_checkpoint_loads_and_is_the_model_evaluated_last(finished):
    from pyunlearn.data import load_qa
    from pyunlearn.metrics import evaluate
    from pyunlearn.model.load import load_model

    config, result = finished
    model, tokenizer = load_model(str(result.folder / "checkpoint"))
    lines = (result.folder / "evaluation" / "after-forget.jsonl").read_text()
    (result.folder.parent / "again.jsonl").write_text(lines)
    again = evaluate(
        model,
        tokenizer,
        load_qa(result.folder.parent / "again.jsonl"),
        metrics=("probability",),
        progress=False,
    )
    expected = json.loads((result.folder / "evaluation" / "after.json").read_text())["forget"]["probability"]
    assert again.summary["probability"] == pytest.approx(expected, rel=1e-4)
    assert config.evaluate.metrics[0] == "probability"


def test_the_report_stands_alone(finished):
    _, result = finished
    html = (result.folder / "report.html").read_text()
    assert html.count("<svg") == html.count("</svg>") == 9  # metrics and probabilities of three sets, three losses
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:text/csv)""", html.replace("xlink:href", "href"))
    assert html.count("<script") == 1
    assert 'name="viewport"' in html
    for word in (
        "forget.wga",
        "retain.kl",
        "retain.gd",
        "memorise",
        "What the model says",
        "versions:",
    ):
        assert word in html


def without_anchors(row):
    return {moment: bounds for moment, bounds in row["intervals"].items() if moment in ("before", "after")}


def test_other_models_stand_beside_it(tiny_config, monkeypatch):
    """Asked for later: the run is not run again. The retrained model is kept, made by the memorised one's recipe."""
    config = tiny_config()
    folder, plain = RunFolder(config.folder), run(config).table
    memorised = load_file(folder.memorised / "model.safetensors")
    monkeypatch.setattr(run_module, "unlearn", None)
    monkeypatch.setattr(job_module, "memorise", None)
    asked = tiny_config({"evaluate": {"anchors": ["random", "retrained"]}})
    with monkeypatch.context() as patch:
        press_at(patch, "retrain", 2)
        with pytest.raises(Interrupted, match="stopped in retrain at step 3 of 6, checkpoint saved"):
            run(asked, resume=True)
    result = run(asked, resume=True)
    assert {path.name for path in folder.path.iterdir()} == FILES | {"retrained"}
    own = [{**{key: row[key] for key in plain[0]}, "intervals": without_anchors(row)} for row in result.table]
    assert own == plain
    assert all({"retrained", "random"} < row.keys() for row in result.table)
    retrained = load_file(folder.retrained / "model.safetensors")
    assert any(not torch.equal(retrained[name], tensor) for name, tensor in memorised.items())
    rows = {stage: [row for row in read_metrics(folder.metrics) if row["stage"] == stage] for stage in STAGES}
    assert [row["step"] for row in rows["retrain"]] == list(range(1, 7))
    tokens = {stage: sum(row["retain.gd/count"] for row in own) for stage, own in rows.items() if stage != "unlearn"}
    forgotten = QADataset(job_module.load_data(config).forget, load_tokenizer(str(folder.checkpoint)), None)
    assert tokens["memorise"] - tokens["retrain"] == 3 * sum(int((row["labels"] != -100).sum()) for row in forgotten)
    monkeypatch.setattr(run_module, "compute", None)
    assert run(config, resume=True).table == result.table  # measured once, told ever after
    assert "| retrained | random | samples |" in (folder.path / "table.md").read_text().splitlines()[0]
    html = folder.report.read_text()
    assert '<th class="n">retrained</th><th class="n">random</th>' in html
    assert "diamond: a model trained without the forget set; cross: a model that was not trained" in html


def test_it_is_evaluated_on_the_way(tiny_config, tmp_path):
    """As a curve in the report, with the same unlearned weights as without."""
    plain = tiny_config({"output": str(tmp_path / "plain"), "unlearn": {"batch_size": 1}})
    run(plain)
    config = tiny_config({"evaluate": {"every": "epoch"}, "unlearn": {"batch_size": 1}})
    result = run(config)
    folder = RunFolder(config.folder)
    assert folder.evaluated_steps() == [2, 4]  # of 6
    assert {path.name for path in folder.path.glob("evaluation/step-*")} == {
        f"step-{step}{rest}" for step in (2, 4) for rest in (".json", *(f"-{name}.jsonl" for name in SETS))
    }
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(config)[name])
    values = [json.loads((folder.evaluation(f"{moment}.json")).read_text())["forget"]["probability"]
              for moment in ("before", "step-2", "step-4", "after")]  # fmt: skip
    assert values == sorted(values, reverse=True)
    html = folder.report.read_text()
    assert html.count("<svg") == 14  # and a curve of each metric
    assert "means of each set over the steps of the unlearning" in html
    assert "means of each set" not in RunFolder(plain.folder).report.read_text()
    assert result.table[0]["after"] == values[-1]


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    config, result = finished
    with pytest.raises(FileExistsError, match="holds a finished run; choose --resume, --overwrite"):
        run(config)
    other = config.model_copy(update={"seed": 7})
    with pytest.raises(
        FileExistsError,
        match=r"another configuration \(seed: 0 -> 7\); choose --out FOLDER or --overwrite",
    ):
        run(other, resume=True)
    monkeypatch.setattr(run_module, "compute", None)
    (result.folder / "report.html").unlink()
    assert run(config, resume=True) == result
    assert (result.folder / "report.html").is_file()


def test_the_variant_reaches_the_metrics(tiny, tmp_path):
    settings = EvaluateConfig(variant="open_unlearning", metrics=["probability", "memorization_accuracy"])
    folder, model, items = RunFolder(tmp_path), tiny.model(), tiny.world.forget[:2]
    evaluate_sets(Stage(folder), settings, folder, "before", {"forget": items}, model, tiny.tokenizer)
    records = [json.loads(line) for line in folder.evaluation("before-forget.jsonl").read_text().splitlines()]
    for record in records:
        hits = record["memorization_accuracy"] * (record["num_tokens"] - 1)
        assert hits == pytest.approx(round(hits), abs=1e-9)
    rows = teacher_forced(model, QADataset(items, tiny.tokenizer, 256), variant="open_unlearning", progress=False)
    assert [record["memorization_accuracy"] for record in records] == [row["memorization_accuracy"] for row in rows]


def test_there_is_nothing_to_resume(tiny_config, monkeypatch):
    config = tiny_config()
    monkeypatch.setattr(run_module, "compute", None)
    with pytest.raises(FileNotFoundError, match=r"^--resume: there is no run in .*; leave --resume out"):
        run(config, resume=True)
    assert not config.folder.exists()
    RunFolder(config.folder).open(config)  # killed before it computed anything: that is this run
    RunFolder(config.folder).open(config, resume=True)


def test_a_folder_that_is_no_run_is_left_alone(tiny_config, tmp_path):
    config = tiny_config()
    config.folder.mkdir()
    (config.folder / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"is not a run folder \(no \.pyunlearn\); it is left alone"):
            run(config, overwrite=overwrite)
    assert (config.folder / "thesis.tex").read_text() == "years of work"


def press_at(monkeypatch, stage, step):
    """Ctrl-C while that step of that stage is being logged."""
    original = MetricsWriter.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs, **kwargs)
        if self.stage == stage and state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsWriter, "on_log", on_log)


def weights(config):
    return load_file(config.folder / "checkpoint" / "model.safetensors")


def test_stopped_in_either_stage_and_resumed_it_ends_the_same(tiny_config, tmp_path, monkeypatch):
    config = tiny_config({"unlearn": {"batch_size": 1}})
    whole = tiny_config({"unlearn": {"batch_size": 1}, "output": str(tmp_path / "whole")})
    run(whole)
    with monkeypatch.context() as patch:
        press_at(patch, "memorise", 2)
        with pytest.raises(
            Interrupted, match=r"stopped in memorise at step 3 of 6, checkpoint saved\nresume with: again --resume"
        ) as caught:
            run(config, command="again")
    assert caught.value.exit_code == 130
    folder = RunFolder(config.folder)
    assert folder.last_checkpoint("memorise").name == "checkpoint-3"
    with pytest.raises(FileExistsError, match="holds an unfinished run; choose --resume"):
        run(config)

    with monkeypatch.context() as patch:
        press_at(patch, "unlearn", 3)
        with pytest.raises(Interrupted, match="stopped in unlearn at step 4 of 6"):
            run(config, resume=True)
    assert not folder.training("memorise").exists()  # finished: its checkpoints are gone, its model is kept
    kept = (folder.memorised / "model.safetensors").stat().st_mtime_ns

    result = run(config, resume=True)
    assert (folder.memorised / "model.safetensors").stat().st_mtime_ns == kept
    assert {path.name for path in result.folder.iterdir()} == FILES
    ours, theirs = weights(config), weights(whole)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    steps = [(row["stage"], row["step"]) for row in read_metrics(folder.metrics)]
    assert steps == [("memorise", i) for i in range(1, 7)] + [("unlearn", i) for i in range(1, 7)]


def test_a_kill_leaves_whole_files_and_goes_on(tiny_config, monkeypatch):
    """Killed while the unlearned model is being written: no checkpoint/, and the next run does only what is left."""
    config = tiny_config()

    def killed(path, model, tokenizer):
        if path.name == "checkpoint":
            model.save_pretrained(path.with_name(".checkpoint.tmp"))
            raise SystemExit(9)
        original(path, model, tokenizer)

    original = job_module.write_model
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "write_model", killed)
        with pytest.raises(SystemExit):
            run(config)
    folder = RunFolder(config.folder)
    assert not folder.checkpoint.exists()
    assert folder.evaluation("before.json").is_file()
    (folder.training("unlearn") / "checkpoint-999").mkdir()  # one that was cut short
    with open(folder.metrics, "a") as file:
        file.write('{"stage": "unlearn", "st')
    monkeypatch.setattr(job_module, "memorise", None)
    assert {path.name for path in run(config, resume=True).folder.iterdir()} == FILES
    assert all("loss" in row for row in read_metrics(folder.metrics))


def test_ctrl_c_while_evaluating_is_told_too(tiny_config, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "evaluate_sets", pressed)
    with pytest.raises(Interrupted, match="everything finished so far is kept\nresume with: again --resume") as caught:
        run(tiny_config(), command="again")
    assert caught.value.exit_code == 130


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tiny_config, monkeypatch):
    config = tiny_config({"unlearn": {"save_steps": 1, "epochs": 6}})
    original = UnlearnTrainer.term_losses

    def broken(self, model, inputs, counts):
        losses = original(self, model, inputs, counts)
        return [loss * float("nan") if self.state.global_step == 4 and i else loss for i, loss in enumerate(losses)]

    monkeypatch.setattr(UnlearnTrainer, "term_losses", broken)
    with pytest.raises(NonFiniteLossError) as caught:
        run(config)
    text = str(caught.value)
    assert "unlearn: step 5: the loss is not finite" in text
    assert "retain.kl = nan" in text
    assert "forget samples [" in text
    assert text.endswith("checkpoint-4")
    assert (RunFolder(config.folder).last_checkpoint("unlearn") / "model.safetensors").is_file()
