"""pyunlearn geffect: the same numbers from saved models as live, resumable, and clear where there is nothing."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from pyunlearn.report.geffect import cost, heat, render_geffect, section
from pyunlearn.runs import geffect
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.geffect import measure_run
from pyunlearn.runs.run import run
from pyunlearn.store import Store
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.probe import Probe
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

CHANGES = {
    "memorise": {"epochs": 30, "learning_rate": 1e-2},
    "unlearn": {"forget": "npo", "retain": ["kl", "gd"], "epochs": 6, "learning_rate": 3e-3, "keep_steps": 2},
    "geffect": {"every": 2, "forget_samples": 2, "retain_samples": 4, "batch_size": 3, "pointwise": True},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_settings):
    """A run of six steps, probed live and with models kept every two."""
    output = tmp_path_factory.mktemp("runs") / "probed"
    config = RunConfig.model_validate(merge(tiny_settings, {**CHANGES, "output": str(output)}))
    run(config)
    return output


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, whose geffect/ is still to be made."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "geffect")
    return tmp_path / "run"


def test_saved_models_give_what_the_live_probe_gave(finished, folder):
    live = [row for row in read_metrics(finished / "metrics.jsonl") if "geffect" in row]
    result = measure_run(folder)
    assert [row["step"] for row in result.rows] == [row["step"] for row in live] == [0, 2, 4, 6]
    for row, other in zip(result.rows, live, strict=True):
        assert row["geffect"] == other["geffect"]  # bit by bit
    assert json.loads((folder / "geffect" / "geffect.json").read_text())["rows"] == result.rows
    shutil.rmtree(folder / "checkpoints" / "step-6")  # the run's last model is step 6, too
    assert measure_run(folder, overwrite=True).rows == result.rows


def test_figures_of_the_paper(finished, folder):
    measure_run(folder, command="pyunlearn geffect <here>")
    names = {path.stem for path in (folder / "geffect").glob("*.svg")}
    assert names == {"total", "groups", "terms", "dynamics", "scatter-forget.npo"}
    for path in (folder / "geffect").glob("*.svg"):
        assert ET.fromstring(path.read_text()).tag.endswith("svg")
    html = (folder / "geffect" / "geffect.html").read_text()
    assert "geffect &lt;here&gt;" in html
    report = (finished / "report.html").read_text()
    # a panel an <svg>: total 3, groups 6, terms 2, dynamics 3, scatter 3; a run: losses 4, metrics 3, probabilities 3
    for page, panels in ((html, 17), (report, 17 + 10)):
        assert page.count("<svg") == page.count("</svg>") == panels
        for word in ("10 times closer", "100 times closer", "shallow", "inverse confidence, log10", "forget.npo",
                     "retaining G-effect", "retain.gd", "2 and 4 fixed samples"):  # fmt: skip
            assert word in page, word
        assert not re.findall(r"""(?:src|href)=["'](?!#|data:text/csv)""", page.replace("xlink:href", "href"))
    assert "training steps (medians of 3)" in report  # the cost of a probe
    assert "training steps" not in html  # no training is timed here


def test_tokens_are_as_dark_as_they_weigh(finished):
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if "geffect" in row]
    assert heat(rows) == []  # NPO has one weight an answer
    texts = rows[-1]["geffect"]["heat"]
    texts[0]["weights"]["forget.npo"][0] = 2.0
    rows[0]["geffect"]["heat"][0]["tokens"][0] = "<i>"
    (text,) = heat(rows)
    assert (text["label"], text["question"]) == ("forget.npo", texts[0]["question"])
    assert [line["step"] for line in text["lines"]] == [0, 2, 4, 6]
    assert text["lines"][-1]["tokens"][0] == ("<i>", 2.0, 1.0)
    assert text["lines"][-1]["tokens"][1][2] == texts[0]["weights"]["forget.npo"][1] / 2
    page = render_geffect("run", rows, {})
    assert page.count("each token weighs") == 1
    assert page.count(texts[0]["tokens"][1]) >= 4
    assert "&lt;i&gt;" in page
    assert "<i>" not in page


def test_the_cost_is_a_median_of_ratios():
    rows = [{"probe_seconds": p, "step_seconds": s} for p, s in ((9.0, None), (2.0, 1.0), (3.0, 2.0), (8.0, 1.0))]
    assert cost(rows) == "A probe takes 3 s, 2.0 training steps (medians of 3)."
    assert cost(rows[:1]) is None


def test_what_is_not_finite_is_told_in_the_report():
    rows = [{"step": 4, "geffect": {"not_finite": "objective: the gradient of 'w' is not finite"}}]
    found = section(rows)
    assert found["not_finite"] == "step 4: objective: the gradient of 'w' is not finite"
    assert found["figures"] == []
    assert section([]) is None


def test_stopped_and_continued(folder, monkeypatch):
    measure, measured = Probe.measure, []

    def counted(self, model):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return measure(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "measure", counted)
        with pytest.raises(Interrupted, match="kept\nresume with: again"):
            measure_run(folder, command="again")
    assert Store(folder / "geffect" / "rows").names() == ["step-0000000", "step-0000002"]
    measured.clear()
    monkeypatch.setattr(Probe, "measure", counted)
    assert [row["step"] for row in measure_run(folder).rows] == [0, 2, 4, 6]
    assert len(measured) == 2
    monkeypatch.setattr(geffect, "prepare", None)  # everything is there
    assert len(measure_run(folder, batch_size=1).rows) == 4
    with pytest.raises(ValueError, match=r"another job \(settings.forget_samples: 2 -> 1\); .* or --overwrite"):
        measure_run(folder, forget_samples=1)


def test_rows_of_another_model_are_measured_again(folder, monkeypatch):
    first = measure_run(folder)
    shutil.rmtree(folder / "checkpoints" / "step-2")
    shutil.copytree(folder / "checkpoints" / "step-4", folder / "checkpoints" / "step-2")
    second = measure_run(folder)
    assert second.rows[1]["geffect"] == first.rows[2]["geffect"]
    assert [second.rows[i] for i in (0, 2, 3)] == [first.rows[i] for i in (0, 2, 3)]


def test_rows_of_other_data_are_measured_again(folder, monkeypatch):
    first = measure_run(folder)
    load = geffect.Job.start

    def fewer(*args):
        job = load(*args)
        return replace(job, data=replace(job.data, retain=job.data.retain[1:]))

    monkeypatch.setattr(geffect.Job, "start", fewer)
    second = measure_run(folder)
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one["geffect"]["nll"]["unlearn"] == pytest.approx(other["geffect"]["nll"]["unlearn"])
        assert one["geffect"]["nll"]["retain"] != pytest.approx(other["geffect"]["nll"]["retain"])


def test_the_tokenizer_is_kept_too(folder):
    assert {path.name for path in (folder / "checkpoints" / "step-2").iterdir()} >= {
        "model.safetensors", "config.json", "tokenizer.json"
    }  # fmt: skip


def test_a_folder_without_what_is_needed_is_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"RUN: no such folder: .*nowhere"):
        measure_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a run folder \(no config.yaml\); make one with pyunlearn run"):
        measure_run(folder / "checkpoints")
    shutil.move(folder / "memorised", tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="memorised/, the model that unlearning started from, is gone"):
        measure_run(folder)
    shutil.move(tmp_path / "away", folder / "memorised")
    shutil.rmtree(folder / "checkpoint")
    assert [row["step"] for row in measure_run(folder, forget_samples=1).rows] == [0, 2, 4, 6]  # an unfinished run
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"saved no model yet; finish it .* --set unlearn.keep_steps=N"):
        measure_run(folder)
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_a_run_that_does_not_memorise(tiny_config, monkeypatch, checkpointing):
    """The first model is the configuration's; checkpointing is as in the training."""
    unlearning = {"epochs": 1, "retain": [], "gradient_checkpointing": checkpointing}
    config = tiny_config({"memorise": None, "unlearn": unlearning, "geffect": {}})
    run(config)
    live = [row["geffect"] for row in read_metrics(config.folder / "metrics.jsonl") if "geffect" in row]
    forward, calls = LlamaMLP.forward, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    result = measure_run(config.folder)
    assert [row["step"] for row in result.rows] == [0, 1]
    assert [row["geffect"] for row in result.rows] == live
    passes, layers, models = 3, 2, 2  # metrics and a term
    proof = layers * models  # of the head
    assert len(calls) - proof == passes * layers * models * (2 if checkpointing else 1)  # the backward runs them again
