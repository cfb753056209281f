"""`pyunlearn evaluate --suite` on a folder with TOFU's files: the table, what is written, and bad input by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyunlearn.cli import app
from pyunlearn.data import QA, QADataset
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import SUITES, read_log, teacher_forced
from pyunlearn.runs import suite as suite_module
from pyunlearn.runs.files_config import SuiteConfig

NAMES = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
COUNTS = dict(zip(NAMES, (5, 4, 3, 4), strict=True))


def items_of(name, count):
    return [
        QA(f"Which colour has {name} {i}?", f"It is red {i}.", f"Red {i} it is.", (f"Blue {i} it is.", "Green it is."))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(folder of a model, folder of data)"""
    data, model = tmp_path_factory.mktemp("tofu"), tmp_path_factory.mktemp("model")
    for name, count in COUNTS.items():
        rows = [json.dumps(item.to_json()) for item in items_of(name, count)]
        (data / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    texts = [f"Question: {item.question}\nAnswer: {item.answer}" for name in NAMES for item in items_of(name, 5)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_hidden_layers=1).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model, data


@pytest.fixture
def call(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYUNLEARN_CACHE", str(tmp_path / "cache"))

    def invoke(*words, model=places[0], data=places[1], suite=("--suite", "tofu")):
        arguments = ["evaluate", *suite, "--model", str(model), "--data", str(data), *map(str, words)]
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_a_log_and_then_what_it_serves(call, places, tmp_path):
    code, text, _ = call("--out", "retained", "--limit", 3)
    assert code == 0
    assert "try next\n  pyunlearn evaluate --suite tofu --model OTHER --data " in text
    rows = {
        cells[0]: cells for line in text.splitlines() if len(cells := [c.strip() for c in line.split("│")[1:-1]]) == 5
    }
    assert rows["forget_Q_A_Prob"][2:] == ["3", "TOFU", ""]
    assert rows["forget_truth_ratio"][3] == "TOFU, closer_to_1_better, epsilon=0"
    assert rows["forget_quality"][1] == "-"
    assert rows["forget_quality"][4].startswith("no retain log")
    assert rows["mia_min_k"][4] == "no holdout set"
    without = sum(cells[1] == "-" for cells in rows.values())
    assert f"{without} of {len(rows)} lines have no value here; their notes say why" in text
    log = read_log("retained")
    model, tokenizer = _loaded(places[0])
    rows_of = QADataset(items_of("forget10_perturbed", 3), tokenizer, None)
    expected = [record["probability"] for record in teacher_forced(model, rows_of, progress=False)]
    assert log["forget_Q_A_Prob"].column("prob") == pytest.approx(expected, rel=1e-5)
    assert float(rows["forget_Q_A_Prob"][1]) == pytest.approx(sum(expected) / 3, rel=1e-5)
    summary = json.loads(Path("retained/TOFU_SUMMARY.json").read_text())
    assert summary["model_utility"] == log["model_utility"].value
    assert summary["forget_quality"] is None

    (tmp_path / "data").mkdir()
    for path in places[1].iterdir():
        (tmp_path / "data" / path.name).write_text(path.read_text())
    (tmp_path / "data" / "holdout10.jsonl").write_text((places[1] / "retain_perturbed.jsonl").read_text())
    code, text, _ = call("--retain-log", "retained/TOFU_EVAL.json", "--out", "own", data=tmp_path / "data")
    assert code == 0
    numbers = json.loads(Path("own/numbers.json").read_text())
    assert (numbers["suite"], numbers["split"]) == ("tofu", "forget10")
    by_name = {number["name"]: number for number in numbers["numbers"]}
    assert by_name["forget_quality"]["value"] > 0.9  # three of the same five
    assert by_name["forget_quality"]["samples"] == "5 / 3"
    assert by_name["forget_quality"]["note"].startswith("the log has 3 forget samples, here 5: other rows; only 5")
    assert by_name["mia_min_k"]["samples"] == "5 / 4"
    assert "1: memorised" in by_name["mia_min_k"]["note"]
    assert "ln p" in text
    code, _, _ = call("--out", "own", data=tmp_path / "data")  # its own earlier files
    assert code == 0


def _loaded(folder):
    from pyunlearn.model.load import load_model

    return load_model(str(folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--retain-log", "none.json"), "no such log: none.json"),
        (("--split", "forget01"), "forget01_perturbed.jsonl; did you mean forget10_perturbed.jsonl"),
        (("--rouge-samples", "3"), "--rouge-samples=3: goes without --suite only"),
        (("--variant", "suffix"), "--variant=suffix: goes without --suite only"),
        (("--name", "forget10"), "--name=forget10: goes without --suite only"),
        (("--out", "theirs"), "no earlier evaluation wrote theirs/TOFU_EVAL.json"),
        (("--out", "file"), "--out file: is a file, needs a folder"),
        (("--out", "mine", "--retain-log", "mine/TOFU_EVAL.json"), "would replace --retain-log=mine/TOFU_EVAL.json"),
        (("--out", "mine", "--retain-log", "mine"), "its log would replace that of --retain-log=mine; choose another"),
        (("--out", "mine/../mine/", "--full-log", "link"), "its log would replace that of --full-log=link"),
        (
            ("--retain-log", "summary.json"),
            "--retain-log=summary.json: suite 'tofu' reads samples of forget_truth_ratio, ",
        ),
        (
            ("--retain-log", "summary.json"),
            "mia_min_k of it, and it has none of them, but a, b, c, d and 1 more; needs ",
        ),
        (("--full-log", "summary.json"), "--full-log=summary.json: no line of suite 'tofu' reads a full log"),
        (("--out", "mine", "--retain-log", "."), ".: needs one *_EVAL.json"),  # another folder: as far as reading it
    ],
)
def test_bad_input_is_named(call, words, message, monkeypatch):
    monkeypatch.setattr(suite_module, "first_model", None)  # told before there is a model
    for folder in ("theirs", "mine"):
        Path(folder).mkdir()
        Path(folder, "TOFU_EVAL.json").write_text("{}")
    Path("mine/numbers.json").write_text("{}")
    Path("file").write_text("")
    Path("summary.json").write_text(json.dumps(dict.fromkeys("abcd", 0.5) | {"forget_truth_ratio": 0.5}))
    Path("link").symlink_to("mine")
    code, _, errors = call(*words)
    assert code == 2
    assert message in errors


def test_bad_data_is_named(call, places, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in places[1].iterdir():
        (data / path.name).write_text(path.read_text())
    row = {"question": "Who?", "answer": "No one."}
    (data / "retain_perturbed.jsonl").write_text(json.dumps(row) + "\n")
    code, _, errors = call(data=data)
    assert code == 2
    assert "set retain: metric 'truth_ratio': items: 1 of 1 have no perturbed_answer (first: item 0)" in errors
    (data / "retain_perturbed.jsonl").unlink()
    code, _, errors = call(data=data)
    assert code == 2
    assert f"no such file: {data}/retain_perturbed.jsonl" in errors
    code, _, errors = call(data=data / "forget10_perturbed.jsonl")
    assert code == 2
    assert "needs the folder that holds forget10_perturbed.jsonl, retain_perturbed.jsonl, real_authors" in errors
    code, _, errors = call(suite=("--suite", "tufu"))
    assert code == 2
    assert "suite='tufu': did you mean tofu" in errors
    code, _, errors = call("--split", "forget10", suite=())
    assert code == 2
    assert "--split=forget10: goes with --suite only" in errors
    code, _, errors = call("--retain-log", "x.json", suite=())
    assert "--retain-log=x.json: goes with --suite only" in errors


def test_help_names_every_suite(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = CliRunner().invoke(app, ["evaluate", "--help"]).stdout
    for name in SUITES:
        assert name in text


def test_a_suites_config():
    config = SuiteConfig.of_suite("tofu", "some/model", "locuslab/TOFU", split="forget05", limit=7)
    assert (config.data.name, config.data.limit) == ("forget05_perturbed", 7)
    with pytest.raises(ValueError, match="suite='wmdq'"):
        SuiteConfig.of_suite("wmdq", "some/model", "locuslab/TOFU")
