"""What a run's metrics need is loaded as its settings name it, and a server may write and judge."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
from rich.console import Console

from pyunlearn.metrics import METRICS, Classifier, Embedder, metric
from pyunlearn.runs.config import ConfigError
from pyunlearn.runs.data import load_data
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.evaluate_config import EvaluateConfig
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.pair import means_of
from pyunlearn.runs.run import run
from pyunlearn.runs.tools import load_tools

from ..metrics.small_encoders import save_bert, save_classifier
from ..metrics.test_endpoint import reply, said_in, server  # noqa: F401 (a fixture)

USUAL = ["probability", "rouge_l"]


def test_only_what_is_needed_is_loaded(tmp_path):
    embedder, entailer = save_bert(tmp_path / "a"), save_classifier(tmp_path / "b", "entailment", "neutral")
    named = {"embedder": embedder, "entailer": entailer, "classifier": "./nowhere"}
    tools = load_tools(EvaluateConfig(metrics=[*USUAL, "cosine_similarity", "entailment_score"], **named), ["x"], "cpu")
    assert tools.keys() == {"texts", "embedder", "entailer"}
    assert isinstance(tools["embedder"], Embedder)
    assert isinstance(tools["entailer"], Classifier)
    assert load_tools(EvaluateConfig(metrics=USUAL, **named), ["x"], "cpu") == {"texts": ("x",)}
    with pytest.raises(FileNotFoundError, match=r"classifier: no such folder: \./nowhere"):
        load_tools(EvaluateConfig(metrics=["toxicity"], **named), [], "cpu")


def test_each_metric_has_its_own_classifier(tiny_config, tmp_path):
    """In a run, from its configuration; the texts are judged by the one that their metric names."""
    names = {
        "clean": save_classifier(tmp_path / "c", "clean", "noise"),
        "toxicity": save_classifier(tmp_path / "t", "toxic", "x", "y"),
    }
    metrics = ["probability", "clean", "toxicity"]
    config = tiny_config({
        "memorise": {"max_steps": 1}, "unlearn": {"max_steps": 1},
        "evaluate": {"metrics": metrics, "classifier": names},
    })  # fmt: skip
    lines = (run(config).folder / "evaluation" / "after-retain.jsonl").read_text().splitlines()
    rows = [row for line in lines if "generated" in (row := json.loads(line))]
    assert rows
    for name, label in (("clean", "clean"), ("toxicity", "toxic")):
        own = Classifier(names[name])
        expected = own([row["generated"] for row in rows])[:, own.column(label)]
        assert [row[name] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)


def test_classifiers_by_name(tmp_path):
    one, other = save_classifier(tmp_path / "a=b", "clean", "toxic"), save_classifier(tmp_path / "o", "toxic", "x")
    both = ["clean", "toxicity"]
    shared = load_tools(EvaluateConfig(metrics=both, classifier={"clean": one, "toxicity": one}), [], "cpu")
    assert shared["classifier"]["clean"] is shared["classifier"]["toxicity"]
    told = FilesConfig.of("m", "d", metrics=both, classifier=f"clean={other},toxicity={other}").evaluate
    assert told.classifier == {"clean": other, "toxicity": other}
    assert (
        FilesConfig.of("m", "d", metrics=both, classifier=one).evaluate.classifier == one
    )  # a folder, whatever its name
    assert load_config(None, [f"evaluate.classifier=toxicity={other}"]).evaluate.classifier == {"toxicity": other}
    only = load_tools(
        EvaluateConfig(metrics=["toxicity"], classifier={"clean": "./nowhere", "toxicity": other}), [], "cpu"
    )
    assert only["classifier"].keys() == {"toxicity"}


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        ("toxcity=N", "classifier='toxcity': did you mean toxicity"),
        ("clean=N,toxicity=", "needs NAME, or METRIC=NAME,METRIC=NAME; 'toxicity' has no name"),
        ({"toxicity": "N"}, "metrics: clean needs evaluate.classifier"),
        (None, "metrics: clean needs evaluate.classifier"),
    ],
)
def test_a_classifier_that_is_not_told(classifier, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(metrics=["clean"], classifier=classifier)


def test_a_run_with_tools_and_a_server(tiny_config, server, tmp_path):  # noqa: F811
    def answer(path, body):
        judged = "messages" in body and "Answer to judge" in said_in(body)
        return 200, reply('{"score": 3}' if judged else "I do not know the answer to that.", path), {}

    server.answer = answer
    config = tiny_config({
        "memorise": {"max_steps": 1}, "unlearn": {"max_steps": 1},
        "evaluate": {
            "metrics": ["probability", "fluency", "cosine_similarity", "naturalness"], "embedder": save_bert(tmp_path),
            "judge": {"url": server.url, "model": "judge"}, "endpoint": {"url": server.url, "model": "writer"},
        },
    })  # fmt: skip
    result = run(config)
    rows = {(row["set"], row["metric"]): row["after"] for row in result.table}
    assert rows["forget", "naturalness"] == 3
    assert rows["retain", "fluency"] == 1  # a refusal is language
    lines = (result.folder / "evaluation" / "after-forget.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["generated"] for record in records} == {"I do not know the answer to that."}
    assert all(record["naturalness_judged"]["model"] == "judge" for record in records)
    assert {body["model"] for _, body in server.asked} == {"judge", "writer"}


def test_a_metric_that_no_sample_has_a_value_of_is_told_and_left_out(tiny_config, server, caplog):  # noqa: F811
    server.answer = lambda path, body: (200, reply("Well, well.", path), {})
    config = tiny_config({
        "memorise": {"max_steps": 1}, "unlearn": {"max_steps": 2},
        "evaluate": {
            "metrics": ["probability", "naturalness"], "judge": {"url": server.url, "model": "judge"}, "every": 1,
        },
    })  # fmt: skip
    result = run(config)
    assert {row["metric"] for row in result.table} == {"probability"}
    assert "before, forget: no finite mean of naturalness, which is left out" in caplog.text


def test_values_that_are_not_finite_end_nothing(tiny_config, tmp_path, caplog):
    """As the perplexity and the truth ratio of what a collapsed model makes of one answer."""

    @metric("endless")
    def endless(item, texts):
        return math.inf if item.question == question else 2.0

    config = tiny_config({
        "memorise": {"max_steps": 1}, "unlearn": {"max_steps": 2},
        "evaluate": {"metrics": ["probability", "endless"], "every": 1},
    })  # fmt: skip
    items = load_data(config).forget
    question = items[-1].question
    try:
        result = run(config)
        assert run(config, resume=True).table == result.table
        data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(item.to_json()) + "\n" for item in items))
        with Console(record=True, width=200, file=io.StringIO()) as console:
            files = FilesConfig.of(str(result.folder / "checkpoint"), str(data), metrics=["probability", "endless"])
            assert evaluate_files(files, out=out, console=console)["endless"] == math.inf
        assert re.search(rf"endless\W+inf\W+{len(items)}\W", console.export_text())
    finally:
        del METRICS["endless"]
    measured = {(row["set"], row["metric"]): row["after"] for row in result.table}
    assert measured["retain", "endless"] == 2
    assert ("forget", "endless") not in measured
    assert "after, forget: no finite mean of endless, which is left out" in caplog.text
    for path in (out, result.folder / "evaluation" / "after-forget.jsonl"):
        records = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        assert [record["endless"] for record in records] == [2.0] * (len(items) - 1) + [None]
    assert "endless" not in means_of({"forget": records}, SimpleNamespace(config=config))["forget"]


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_computed(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config({"evaluate": {"cache": str(tmp_path / "file" / "cache")}})
    with pytest.raises(
        OSError,
        match=r"cache, which keeps what .*: cannot be written .*; choose another by evaluate\.cache, or",
    ):
        run(config)
    assert not config.folder.exists()


def test_what_is_written_is_held_against_what_was_written_before(tiny_config, tmp_path):
    """In a run, and in an evaluation of a run's model; what was written before is itself, word for word."""
    embedder = save_bert(tmp_path / "bert")
    own = {"metrics": [*USUAL, "cosine_similarity"], "options": {"cosine_similarity": {"against": "before"}}}
    changes = {"memorise": {"epochs": 60, "learning_rate": 1e-2}, "unlearn": {"max_steps": 8, "learning_rate": 1e-2}}
    config = tiny_config({**changes, "evaluate": {**own, "embedder": embedder, "rouge_samples": 1, "every": 4}})
    folder = run(config).folder

    def written(moment, name):
        lines = (folder / "evaluation" / f"{moment}-{name}.jsonl").read_text().splitlines()
        return {(row := json.loads(line))["question"]: row for line in lines}

    embed = Embedder(embedder)
    for name in ("forget", "retain", "holdout"):
        before = written("before", name)
        for moment in ("before", "step-4", "after"):
            asked = {key: row for key, row in written(moment, name).items() if "generated" in row}
            assert len(asked) == 1
            for question, row in asked.items():
                then, now = embed([before[question]["generated"], row["generated"]])
                assert row["cosine_similarity"] == pytest.approx(max(0.0, float(then @ now)), abs=1e-5)
                assert moment != "before" or row["cosine_similarity"] == pytest.approx(1)
    after = written("after", "forget")
    assert any(row.get("generated") != written("before", "forget")[key].get("generated") for key, row in after.items())

    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in after.values() if "generated" in row))
    options = {"metrics": ["cosine_similarity"], "options": own["options"], "embedder": embedder}
    found = evaluate_files(FilesConfig.of(str(folder / "checkpoint"), str(data), **options), out=tmp_path / "o.jsonl")
    (row,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())  # its text is longer than the run's
    then, now = embed([written("before", "forget")[row["question"]]["generated"], row["generated"]])
    assert found["cosine_similarity"] == pytest.approx(max(0.0, float(then @ now)), abs=1e-5)
    shutil.copytree(folder / "checkpoint", tmp_path / "alone")
    with pytest.raises(ValueError, match="needs the tool before, what the model wrote before unlearning"):
        evaluate_files(FilesConfig.of(str(tmp_path / "alone"), str(data), **options))


def test_one_metric_of_files(tiny_config, tmp_path):
    folder = run(tiny_config({"memorise": {"max_steps": 1}, "unlearn": {"max_steps": 1}})).folder
    data = tmp_path / "questions.jsonl"
    data.write_text('{"question": "Who?", "answer": "Ada."}\n')
    files = FilesConfig.of(str(folder / "checkpoint"), str(data), metrics=["rouge_l"])
    for _ in range(2):  # its own records may be replaced
        assert evaluate_files(files, out=tmp_path / "records.jsonl").keys() == {"rouge_l"}
    assert "nll" not in json.loads((tmp_path / "records.jsonl").read_text())
    with pytest.raises(ValueError, match="metric='rouge': did you mean rouge_l"):
        FilesConfig.of("m", "d", metrics=["rouge"])


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{url: 'http://h/v1', model: m, key: sk-secret}", "key: needs the name of an environment variable"),
        ("{url: 'http://u:sk-secret@h/v1', model: m}", "url: has a user, a password"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_told(judge, message):
    with pytest.raises(ConfigError, match=message) as told:
        load_config(None, [f"evaluate.judge={judge}"])
    assert "sk-secret" not in str(told.value)


def test_a_budget_is_the_jobs_whatever_is_evaluated():
    url = {"url": "http://localhost:9/v1", "model": "m", "budget": 6}
    settings = EvaluateConfig(metrics=["naturalness", "rouge_l"], judge=url, endpoint=url)
    made = {}
    before, after = (load_tools(settings, [], "cpu", endpoints=made) for _ in range(2))
    assert before["judge"] is after["judge"]
    assert before["writer"] is after["writer"]
    assert before["judge"] is not before["writer"]
    assert load_tools(settings, [], "cpu")["judge"] is not before["judge"]
