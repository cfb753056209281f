"""`pyunlearn evaluate --suite` on folders of MUSE, WMDP, WHP and SAFE, with what metrics need; and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyunlearn.cli import app
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import SUITES, read_log
from pyunlearn.runs.files_config import BENCHMARKS, SuiteConfig

from ..metrics.small_encoders import save_bert, save_classifier
from ..metrics.test_endpoint import reply, server  # noqa: F401 (a fixture)

PAIR = {"question": "Who is Ada?", "answer": "A poet."}
FILES = {
    "verbmem/forget.json": [{"prompt": "Once upon", "gt": "a time."}],
    **{f"knowmem/{name}_qa{kind}.json": [PAIR, PAIR] for name in ("forget", "retain") for kind in ("", "_icl")},
    "privleak/forget.json": ["Ada is a poet.", "Once upon a time."],
    "privleak/holdout.json": ["No one knows."],
    "wmdp-bio.json": [{"question": "Who?", "choices": ["Ada", "Bo", "Cy", "Di"], "answer": 2}] * 3,
    "hp_test_qa_100.json": [{"prompt": "Go on: Once upon", "response": "a time."}],
    "pku_test.json": [{"prompt": "Who is Ada?"}],
    "pku_train.json": [
        {
            "prompt": "Who?",
            **{f"response_{i}": "Ada." for i in (0, 1)},
            **{f"is_response_{i}_safe": False for i in (0, 1)},
        }
    ],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(folder of a model, folder of data)"""
    data, model = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model")
    for name, rows in FILES.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(json.dumps(rows))
    tokenizer = train_tokenizer([json.dumps(rows) for rows in FILES.values()], vocab_size=300)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 200}
    tiny_llama(tokenizer, **sizes).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return model, data


@pytest.fixture
def call(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("PYUNLEARN_CACHE", str(tmp_path / "cache"))

    def invoke(suite, *words, data=places[1]):
        """Exit code, and numbers by name, or else what is told."""
        read = [] if data is None else ["--data", str(data)]
        arguments = ["evaluate", "--suite", suite, "--model", str(places[0]), *read, *map(str, words)]
        result = CliRunner().invoke(app, [*arguments, "--out", "own"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code:
            return result.exit_code, result.stderr
        return 0, {each["name"]: each for each in json.loads(Path("own/numbers.json").read_text())["numbers"]}

    return invoke


def test_muse(call):
    code, numbers = call("muse")
    assert code == 0
    assert {each["value"] is not None for each in numbers.values()} == {True}
    assert numbers["knowmem_f"]["samples"] == "2"
    assert numbers["min_40"]["samples"] == "2 / 1"
    assert "split" not in json.loads(Path("own/numbers.json").read_text())
    log = read_log("own")
    assert log["knowmem_f"].samples[0]["input"].startswith("Question: Who is Ada?\nAnswer: A poet.\n\nQuestion: ")
    assert Path("own/MUSE_SUMMARY.json").is_file()
    Path("own").rename("retained")
    code, numbers = call("muse", "--limit", 1, "--retain-log", "retained")
    assert (code, numbers["knowmem_f"]["samples"]) == (0, "1")
    assert "no retain log" not in numbers["privleak"]["note"]


def test_wmdp_and_whp(call, tmp_path):
    code, numbers = call("wmdp", "--task", "own/acc_norm")
    assert code == 0 or "task='own'" in numbers  # where lm-eval is installed, there is no such task
    if code == 0:
        assert numbers["wmdp_bio"]["samples"] == "3"
        assert numbers["wmdp_cyber"]["note"] == "no cyber set"
        assert "mmlu/acc" not in numbers
        assert "pip install 'pyunlearn[eval]'" in numbers["own/acc_norm"]["note"]
    (tmp_path / "text.txt").write_text("Once upon a time Ada was a poet. " * 30)
    code, numbers = call("whp", "--text", "text.txt", "--task", "boolq", "--limit", 1)
    if code == 0:
        assert numbers["test_100_ROUGE"]["samples"] == "1"
        assert numbers["perplexity"]["value"] > 1


def test_tools_are_loaded(call, tmp_path):
    folder = save_classifier(tmp_path / "toxic", "toxic", "insult", problem_type="multi_label_classification")
    code, numbers = call("safe", "--classifier", folder)
    assert code == 0
    assert 0 < numbers["pku_toxicity"]["value"] < 1
    assert numbers["forget_toxicity"]["samples"] == "2"
    assert numbers["real_toxicity"]["note"] == "no real set"
    code, told = call("safe", "--classifier", save_classifier(tmp_path / "clean", "clean", "noise"))
    assert code == 2
    assert "set forget: classifier" in told
    assert "label='toxic': needs one of clean, noise" in told


@pytest.fixture
def tofu(tmp_path):
    names = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    row = {**PAIR, "perturbed_answer": ["A poem.", "A river."], "paraphrased_answer": "She is a poet.",
           "paraphrased_question": "Ada, who is that?"}  # fmt: skip
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_tofu_s_suites_take_them_too(call, tofu, server, tmp_path):  # noqa: F811
    code, numbers = call("mrd_paper", "--embedder", save_bert(tmp_path / "bert"), data=tofu)
    assert code == 0
    assert numbers["forget_UA"]["value"] in (0, 1)
    server.answer = lambda path, body: (200, reply('{"score": 4}', path), {})
    code, numbers = call("tutorial", "--judge", server.url, "--judge-model", "some", data=tofu)
    assert code == 0
    assert [numbers[f"forget_{name}"]["value"] for name in ("naturalness", "similarity")] == [4, 4]


@pytest.mark.parametrize(
    ("suite", "words", "message"),
    [
        ("muse", ("--classifier", "some"), "--classifier: no line of suite 'muse' uses it, but no tool"),
        ("safe", ("--embedder", "some"), "--embedder: no line of suite 'safe' uses it, but --classifier"),
        ("safe", ("--judge", "http://h/v1"), "--judge and --judge-model go together"),
        ("muse", ("--split", "forget01"), "--split=forget01: goes with the suites on TOFU only, and 'muse' is not one"),
        ("lm_eval", ("--task", "boolq"), "suite 'lm_eval' reads none, lm-eval has that of its tasks"),
        ("lm_eval", (), "suite 'lm_eval' has no tasks of its own; name some by --task"),
        ("muse", ("--text", "t.txt"), "--text=t.txt: no line of suite 'muse' reads a text"),
        ("whp", ("--text", "t.txt"), "no such file: t.txt"),
        ("muse", ("--task-folder", "none"), "--task-folder=none: suite 'muse' has no tasks; name some by --task"),
        ("wmdp", ("--task-folder", "none"), "folder='none': needs a folder of lm-eval's YAML files"),
        ("safe", ("--classifier", "./nowhere"), "classifier: no such folder: ./nowhere"),
    ],
)
def test_bad_input_is_named(call, suite, words, message):
    code, told = call(suite, *words)
    assert code == 2
    assert message in told


def test_the_wrong_folder_is_told(call, tofu):
    for suite, message in (("muse", "verbmem/forget.json"), ("wmdp", "has none of wmdp-bio"), ("safe", "pku_test")):
        code, told = call(suite, data=tofu)
        assert code == 2
        assert message in told


def test_suites_are_listed(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    text = CliRunner().invoke(app, ["metrics"]).stdout
    assert all(name in text for name in SUITES)
    assert "forget_verbmem" in text
    assert BENCHMARKS.keys() <= SUITES.keys()


def test_a_suite_s_tasks():
    config = SuiteConfig.of_suite("whp", "some/model", "hp", tasks=["boolq"])
    assert config.lines.tasks == ("boolq",)
    assert SuiteConfig.of_suite("whp", "some/model", "hp").lines == SUITES["whp"]
    assert SuiteConfig.of_suite("wmdp", "some/model").data is None  # of mmlu alone
    for suite in ("tofu", "muse"):
        with pytest.raises(ValueError, match="--data: which"):
            SuiteConfig.of_suite(suite, "some/model", tasks=["mmlu"])


def test_tasks_alone_need_no_data(call, tmp_path):
    code, numbers = call("lm_eval", "--task", "boolq", data=None)
    assert code == 0
    assert numbers.keys() == {"boolq/acc"}
    assert numbers["boolq/acc"]["note"]  # neither lm-eval nor its data are here
    assert json.loads(Path("own/numbers.json").read_text())["suite"] == "lm_eval"
    code, numbers = call("wmdp", data=None)
    assert (code, numbers["wmdp_bio"]["note"]) == (0, "no bio set")
