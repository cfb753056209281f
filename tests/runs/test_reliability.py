"""pyunlearn reliability: models attacked, metrics correlated; kept by the weights, resumable, clear about little."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from pyunlearn.calibration import pearson
from pyunlearn.data import make_format
from pyunlearn.metrics import evaluate
from pyunlearn.model.load import load_model
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.reliability import ATTACKS, Settings, Subject, measure_reliability
from pyunlearn.runs.run import run
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

CHANGES = {
    "data": {"num_authors": 6},
    "memorise": {"epochs": 40, "learning_rate": 1e-2},
    "unlearn": {"forget": "npo", "retain": "gd", "epochs": 2, "learning_rate": 3e-3, "keep_steps": 1},
    "evaluate": {"metrics": ["probability"]},
}
METRICS = ("probability", "extraction_strength")
SETTINGS = Settings(relearn=1, samples=5, rate=2e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_settings):
    """A run of four steps with each one's model."""
    output = tmp_path_factory.mktemp("runs") / "kept"
    run(RunConfig.model_validate(merge(merge(tiny_settings, CHANGES), {"output": str(output)})))
    return output


def test_every_model_once_and_its_means(folder, tmp_path):
    result = measure_reliability([folder, folder], out=tmp_path / "out", metrics=METRICS, settings=SETTINGS)
    # the last step's is the checkpoint
    assert [point.model for point in result.points] == ["kept", "kept step 1", "kept step 2", "kept step 3"]
    assert {attack for attack, _, _ in result.correlations} == {*ATTACKS}
    assert len(result.correlations) == 4 * 2 * 2
    for key, found in result.correlations.items():
        assert found == pearson([p.before[key] for p in result.points], [p.after[key] for p in result.points])
    # one number the long way: the model of step 1, asked with the prefix
    subject = Subject(folder, METRICS, SETTINGS, None, "")
    model, tokenizer = load_model(str(folder / "checkpoints" / "step-1"))
    point = result.points[1]
    for attack, prefix in (("jailbreak", SETTINGS.prefix), ("none", "")):
        items = [type(item)(prefix + item.question, item.answer) for item in subject.sets["retain"]]
        prompt = make_format(tokenizer, subject.job.config.prompt)
        means = evaluate(model, tokenizer, items, metrics=METRICS, prompt_format=prompt, progress=False).summary
        values = point.after if attack == "jailbreak" else point.before
        for metric in METRICS:
            assert values["jailbreak", metric, "retain"] == pytest.approx(means[metric], abs=1e-6)
    page = (tmp_path / "out" / "reliability.html").read_text()
    assert page.count("<svg") == 8
    assert any("4 models: a correlation of so few" in warning for warning in result.warnings)
    assert any("not independent" in warning for warning in result.warnings)


def test_what_is_learnt_again_is_no_part_of_what_is_told(folder, tmp_path):
    """Relearnt rows are left out before and after; a learning rate of 0 changes nothing."""
    still = Settings(relearn=1, samples=5, rate=1e-12)
    result = measure_reliability([folder], out=tmp_path, attacks=["relearning"], metrics=METRICS, settings=still)
    subject = Subject(folder, METRICS, still, None, "")
    (left,) = subject.relearnt
    for point in result.points:
        for key, value in point.after.items():
            assert value == pytest.approx(point.before[key], rel=1e-5)
    model, tokenizer = load_model(str(folder / "checkpoint"))
    prompt = make_format(tokenizer, subject.job.config.prompt)
    items = [item for i, item in enumerate(subject.sets["forget"]) if i != left]
    mean = evaluate(model, tokenizer, items, metrics=METRICS, prompt_format=prompt, progress=False).summary
    assert result.points[0].before["relearning", "probability", "forget"] == pytest.approx(
        mean["probability"], abs=1e-6
    )
    moved = measure_reliability([folder], out=tmp_path, attacks=["relearning"], metrics=METRICS, settings=SETTINGS)
    key = ("relearning", "probability", "forget")
    assert moved.points[0].before[key] == result.points[0].before[key]
    assert moved.points[0].after[key] > 1.01 * moved.points[0].before[key]  # others of the forget set come back, too


def test_stopped_and_continued(folder, tmp_path, monkeypatch):
    options = {"metrics": METRICS, "settings": SETTINGS, "attacks": ["relearning", "probing"]}
    whole = measure_reliability([folder], out=tmp_path / "whole", **options)
    attacked, measured = Subject.attacked, []

    def counted(self, *args):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(args[0])
        return attacked(self, *args)

    monkeypatch.setattr(Subject, "attacked", counted)
    with pytest.raises(Interrupted, match="resume with: again"):
        measure_reliability([folder], out=tmp_path / "out", command="again", **options)
    monkeypatch.setattr(Subject, "attacked", lambda self, *a: measured.append(a[0]) or attacked(self, *a))
    result = measure_reliability([folder], out=tmp_path / "out", **options)
    assert measured.count("none") == measured.count("probing") == measured.count("relearning") == 4
    assert result.points == whole.points  # bit by bit
    assert not (tmp_path / "out" / "work").exists()
    other = Settings(relearn=1, samples=5, rate=2e-3, layer=1)
    measure_reliability([folder], out=tmp_path / "out", **{**options, "settings": other})
    assert measured.count("probing") == 8  # its own setting is another
    assert measured.count("relearning") == measured.count("none") == 4


def test_numbers_are_kept_for_people_and_programs(folder, tmp_path):
    result = measure_reliability([folder], out=tmp_path, metrics=METRICS, settings=SETTINGS, attacks=["noising"])
    stored = json.loads((tmp_path / "reliability.json").read_text())
    assert stored["settings"]["noise"] == 0.05
    assert len(stored["points"]) == 4 * 2 * 2
    for row in stored["correlations"]:
        found = result.correlations[row["attack"], row["metric"], row["set"]]
        assert row["r"] == found.r
        assert row["count"] == 4
    assert all(math.isfinite(row["before"]) for row in stored["points"])


def test_bad_input(folder, tmp_path):
    def measure(*runs, settings=SETTINGS, **options):
        measure_reliability(runs or [folder], out=tmp_path / "out", settings=settings, **options)

    with pytest.raises(ValueError, match="attack='jailbraek': did you mean jailbreak"):
        measure(attacks=["jailbraek"])
    with pytest.raises(ValueError, match="metric='probabilty': did you mean probability"):
        measure(metrics=["probabilty"])
    with pytest.raises(ValueError, match=r"metric=cosine_similarity: needs .*embedder"):
        measure(metrics=["cosine_similarity"])
    with pytest.raises(ValueError, match=r"relearn=4: .* has 4 forget rows that count"):
        measure(settings=Settings(relearn=4))
    with pytest.raises(ValueError, match="samples=0: needs 1"):
        Settings(samples=0)
    with pytest.raises(ValueError, match="noise=nan: needs a share"):
        Settings(noise=math.nan)
    with pytest.raises(ValueError, match="relearn_rate=nan: needs a number above 0"):
        Settings(rate=math.nan)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        measure(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a run folder; choose a folder of its own"):
        measure_reliability([folder], out=folder)
    with pytest.raises(ValueError, match="layer=9"):
        measure(settings=Settings(relearn=1, layer=9), attacks=["probing"])
    copy = tmp_path / "one"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="has 1 saved models, a correlation needs 3"):
        measure(copy)
