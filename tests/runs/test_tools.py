"""What a run's metrics need is loaded as its settings name it, and a server may write and judge."""

from __future__ import annotations

import json

import pytest

from pyunlearn.metrics import Classifier, Embedder
from pyunlearn.runs.config import ConfigError, FilesConfig
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.run import run
from pyunlearn.runs.sections import EvaluateConfig
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
