"""`pyunlearn evaluate --suite` on a folder with TOFU's files: the table, what is written, and bad input by name."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pyunlearn.cli import app
from pyunlearn.data import QA, PromptFormat, QADataset
from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.metrics import SUITES, Embedder, greedy_generate, read_log, teacher_forced
from pyunlearn.runs import beside as beside_module
from pyunlearn.runs import suite as suite_module
from pyunlearn.runs.files_config import SuiteConfig
from pyunlearn.runs.folder import MARK

from ..metrics.small_encoders import save_bert, save_classifier

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


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    entailer = save_classifier(folder / "nli", "entailment", "neutral", "contradiction")
    return "--embedder", save_bert(folder / "bert"), "--entailer", entailer


@pytest.fixture(scope="module")
def other(places, tmp_path_factory):
    """The folder of another model, with the first one's tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    _, tokenizer = _loaded(places[0])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = tiny_llama(tokenizer, seed=5, **sizes)
    model.config.tie_word_embeddings = False  # so that it writes letters: the first one repeats the prompt's colon
    head, (colon, letter) = model.lm_head.weight.detach().clone(), tokenizer.convert_tokens_to_ids([":", "e"])
    head[[colon, letter]] = head[[letter, colon]]
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def numbers_of(folder):
    numbers = json.loads(Path(folder, "numbers.json").read_text())["numbers"]
    return {number["name"]: number for number in numbers}


@pytest.fixture
def alone(monkeypatch):
    """Fails where a model is loaded while another is there; which ones were."""
    alive, order = [], []

    def watched(load):
        def loaded(*arguments, **options):
            gc.collect()
            assert not any(each() is not None for each in alive)
            model, *rest = load(*arguments, **options)
            alive.append(weakref.ref(model))
            order.append(model.config._name_or_path)
            return model, *rest

        return loaded

    monkeypatch.setattr(suite_module, "first_model", watched(suite_module.first_model))
    monkeypatch.setattr(beside_module, "loaded", watched(beside_module.loaded))
    return order


def straight_cosine(places, other, embedder, prefix, count):
    """Of what both models write."""
    written = []
    for folder in (places[0], other):
        model, tokenizer = _loaded(folder)
        form = PromptFormat(tokenizer)
        prompts = [form.prompt_ids(item.question) for item in items_of(prefix, count)]
        written += greedy_generate(model, tokenizer, prompts, max_new_tokens=200, progress=False)
    both = Embedder(embedder)(written)
    return float((both[:count] * both[count:]).sum(-1).clamp(0, 1).mean())


def test_closer_look_has_all_numbers_from_the_command_line(call, places, other, encoders, alone):
    suite = ("--suite", "closer_look")
    code, _, _ = call(*encoders, "--before", other, "--out", "own", suite=suite)
    assert code == 0
    assert alone == [str(other), str(places[0])]
    numbers = numbers_of("own")
    assert [name for name, number in numbers.items() if number["value"] is None] == []
    for prefix, name in (("ra", "real_authors_perturbed"), ("wf", "world_facts_perturbed")):
        expected = straight_cosine(places, other, encoders[1], name, COUNTS[name])
        assert numbers[f"{prefix}_CS"]["value"] == pytest.approx(expected, abs=1e-5)
        assert numbers[f"{prefix}_CS"]["value"] < 0.999  # else nothing would tell a wrong one
    alone.clear()
    code, text, _ = call(*encoders[2:], "--before", other, suite=suite)  # no embedder, no line that needs it
    assert (code, alone) == (0, [str(places[0])])
    assert "needs embedder, which was not given" in text


def run_folder(folder, places, **model):
    """A run's folder with the second model's checkpoint, as far as an evaluation reads it."""
    folder.mkdir()
    (folder / MARK).write_text("{}")
    values = {"model": model, "data": {"source": "files", "forget": str(places[1] / f"{NAMES[0]}.jsonl")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(places[0], folder / "checkpoint")
    return folder


def test_the_model_before_is_where_the_run_began(call, places, other, encoders, alone, tmp_path, caplog):
    suite = ("--suite", "closer_look")
    run = run_folder(tmp_path / "run", places, name_or_path=str(other))
    code, _, _ = call(*encoders, "--out", "own", model=run / "checkpoint", suite=suite)
    assert code == 0
    assert alone == [str(other), str(run / "checkpoint")]
    expected = straight_cosine(places, other, encoders[1], "real_authors_perturbed", 3)
    assert numbers_of("own")["ra_CS"]["value"] == pytest.approx(expected, abs=1e-5)
    assert numbers_of("own")["avg"]["value"] is not None
    alone.clear()
    run = run_folder(tmp_path / "gone", places, name_or_path=str(tmp_path / "nowhere"))
    code, _, _ = call(*encoders, "--out", "none", model=run / "checkpoint", suite=suite)
    assert code == 0
    assert "started from" in caplog.text
    assert "name a model by --before" in caplog.text
    assert "what the model wrote before unlearning" in numbers_of("none")["ra_CS"]["note"]
    run = run_folder(tmp_path / "same", places, name_or_path=str(tmp_path / "same" / "checkpoint"))
    code, _, _ = call(*encoders, "--out", "itself", model=run / "checkpoint", suite=suite)
    assert numbers_of("itself")["ra_CS"]["value"] == pytest.approx(1)


def test_a_reference_is_read_beside(call, places, other, alone, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(places[1], data)
    (data / "holdout10.jsonl").write_text((places[1] / "retain_perturbed.jsonl").read_text())
    suite = ("--suite", "open_unlearning")
    code, _, _ = call("--reference", other, "--limit", 3, "--out", "own", data=data, suite=suite)
    assert code == 0
    assert alone == [str(other), str(places[0])]
    losses = []
    for folder in (places[0], other):
        model, tokenizer = _loaded(folder)
        rows = QADataset(items_of("forget10_perturbed", 3), tokenizer, None)
        losses.append([-record["nll"] for record in teacher_forced(model, rows, progress=False)])
        counts = [record["num_tokens"] for record in teacher_forced(model, rows, progress=False)]
    expected = [(b - a) / n for a, b, n in zip(*losses, counts, strict=True)]
    entry = read_log("own")["mia_reference"]
    assert entry.parts["forget"].column() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    alone.clear()
    code, _, _ = call("--reference", other, suite=suite)  # without rows held out there is no line for it
    assert (code, alone) == (0, [str(places[0])])


def test_another_prompt_is_told_below_the_table(call):
    for prompt, told in (("plain", True), ("question_answer", False)):
        code, text, _ = call("--prompt", prompt, "--limit", 1, suite=("--suite", "open_unlearning"))
        assert code == 0
        assert ("--prompt takes one of open_unlearning, question_answer" in text) == told
        assert ("asked by prompt=plain, not its source's" in text) == told


@pytest.mark.parametrize(
    ("words", "suite", "message"),
    [
        (("--before", "x"), "tofu", "--before: no line of suite 'tofu' uses it, but no tool"),
        (("--reference", "x"), "closer_look", "uses it, but --embedder, --entailer, --before"),
        (("--before", "x"), None, "--before=x: goes with --suite only"),
        (("--reference", "x"), None, "--reference=x: goes with --suite only"),
    ],
)
def test_models_beside_that_nothing_needs_are_told(call, words, suite, message):
    code, _, errors = call(*words, suite=() if suite is None else ("--suite", suite))
    assert (code, message in errors) == (2, True)


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
