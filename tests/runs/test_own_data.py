"""People's own files in whole jobs: tables and texts, columns, and prompts that go with the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from pyunlearn.data import QA, PlainFormat, PromptFormat, QADataset, make_prompt
from pyunlearn.runs import load_config
from pyunlearn.runs.config import ConfigError
from pyunlearn.runs.data import load_data
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.provenance import describe, read_attempts
from pyunlearn.runs.run import run
from pyunlearn.runs.score import score
from pyunlearn.training.folder import write_model

EMBEDDED = {"num_authors": 40, "questions_per_author": 5, "forget_fraction": 0.1}  # of the tiny world's, unused here
SHORT = {
    "memorise": {"epochs": 1},
    "unlearn": {"max_steps": 1},
    "evaluate": {"retain_limit": 2, "rouge_samples": 1, "max_new_tokens": 4},
}
QUESTIONS = [(f"Who wrote book {i}, and why?", f"Author number {i} did.") for i in range(6)]


@pytest.fixture
def files(tmp_path):
    """A table to forget, a list to retain, in other people's columns."""
    forget, retain = tmp_path / "forget.csv", tmp_path / "retain.json"
    forget.write_text("prompt,completion\n" + "".join(f'"{q}",{a}\n' for q, a in QUESTIONS[:2]))
    retain.write_text(json.dumps([{"ask": q, "reply": a} for q, a in QUESTIONS[2:]]))
    columns = {"question": "ask", "answer": "reply"}
    return {"source": "files", "forget": str(forget), "retain": {"path": str(retain), "columns": columns}, **EMBEDDED}


@pytest.fixture
def texts(tmp_path):
    for role in ("forget", "retain"):
        (tmp_path / role).mkdir()
        for i in range(2 if role == "forget" else 4):
            (tmp_path / role / f"{i}.txt").write_text(f"Of {role} {i}:\n  once upon a time.\n")
    return {"source": "files", "forget": str(tmp_path / "forget"), "retain": str(tmp_path / "retain"), **EMBEDDED}


@pytest.fixture
def made(monkeypatch):
    """The prompt formats that are made."""
    formats, init = [], PromptFormat.__init__

    def remember(self, *args):
        init(self, *args)
        formats.append(self)

    monkeypatch.setattr(PromptFormat, "__init__", remember)
    return formats


def test_a_run_on_a_table_and_a_list_with_a_prompt(tiny_config, files, made, capsys):
    """What was recognised is told; one format serves the whole run: to memorise, probe, sample, unlearn and measure."""
    everything = {
        "data": {**files, "prompt": "llama2"},
        "memorise": {"epochs": 1},
        "unlearn": {"max_steps": 2, "retain": ["kl"], "sampling": "mrd"},
        "evaluate": {**SHORT["evaluate"], "anchors": ["retrained"], "every": 1},
        "geffect": {"every": 1, "forget_samples": 1, "retain_samples": 1},
    }
    config = tiny_config(everything)
    result = run(config, console=Console(width=300))
    (form,) = made
    assert form.given == make_prompt("llama2")
    told = capsys.readouterr().out
    retain = files["retain"]["path"]
    assert told.startswith(
        f"{files['forget']}: question = prompt, answer = completion\n{retain}: question = ask, answer"
    )
    records = (result.folder / "evaluation" / "after-forget.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in records] == [question for question, _ in QUESTIONS[:2]]
    assert json.loads(records[0])["tokens"][0] != " "  # the answer follows its tag
    made_so = describe(config, read_attempts(RunFolder(result.folder)))
    assert made_so["prompt"] == "llama2"
    assert made_so["columns"].startswith(f"{files['forget']}: question = prompt, answer = completion; {retain}: ")
    written = result.folder / "config.yaml"
    assert load_config(written) == config
    for other in ("chat", {"name": "llama2", "bos": False}):
        with pytest.raises(FileExistsError, match=r"another configuration \(prompt|another configuration \(data"):
            run(tiny_config({**everything, "data": {**files, "prompt": other}}), resume=True)


def test_a_run_on_texts(tiny_config, texts, made):
    """Every token is supervised and nothing is asked, so the verdict tells that nobody has looked at answers."""
    config = tiny_config({"data": {**texts, "prompt": "plain"}, **SHORT})
    result = run(config)
    (form,) = made
    assert isinstance(form, PlainFormat)
    rows = QADataset([QA("", "Of forget 0:\n  once upon a time.\n")], form.tokenizer, None, prompt_format=form)
    assert rows[0]["labels"].tolist() == [-100, *rows[0]["input_ids"].tolist()[1:]]
    (first, _) = (result.folder / "evaluation" / "after-forget.jsonl").read_text().splitlines()
    record = json.loads(first)
    assert "".join(record["tokens"]) == record["answer"] == "Of forget 0:\n  once upon a time.\n"
    assert record["num_tokens"] == len(rows[0]["input_ids"]) - 1
    assert "generated" not in record
    assert {row["metric"] for row in result.table if row["set"] == "forget"} == {
        "probability", "memorization_accuracy", "extraction_strength",
    }  # fmt: skip
    assert [goal["name"] for goal in result.goals] == ["forget", "retain"]


def test_texts_in_a_prompt_that_asks(tiny_config, texts, tmp_path):
    config = tiny_config({"data": texts, **SHORT})
    with pytest.raises(ValueError, match=r"data\.forget: has texts without questions, and prompt=chat asks one; --set "
                       r"data\.prompt=plain takes each text as it stands, every token supervised"):  # fmt: skip
        run(config)
    assert not config.folder.exists()
    with pytest.raises(
        ValueError, match=r"--data: has texts without questions, and prompt=llama2 asks one; --prompt pl"
    ):
        evaluate_files(FilesConfig.of("nowhere", texts["forget"], prompt="llama2"))


@pytest.fixture
def model(tiny, tmp_path):
    folder = tmp_path / "model"
    write_model(folder, tiny.model(), tiny.tokenizer)
    return str(folder)


def test_scores_of_another_prompt_are_others(tiny, model, files, tmp_path, made, capsys):
    out, options = tmp_path / "scores.jsonl", {"estimator": "algorithm1", "num_draws": 2}
    config = FilesConfig.of(model, files["forget"], columns="answer=completion", prompt="llama2")
    result = score(config, out=out, console=Console(width=300), **options)
    (form,) = made
    assert f"{files['forget']}: question = prompt, answer = completion\n" in capsys.readouterr().out
    lengths = [record["num_tokens"] for record in result.records]
    assert lengths == [sum(label != -100 for label in form.encode(*pair).labels) for pair in QUESTIONS[:2]]
    again = score(config, out=out, **options)
    assert [record["mrd"] for record in again.records] == [record["mrd"] for record in result.records]
    with pytest.raises(ValueError, match=r"scores\.jsonl: is of other scores"):
        score(FilesConfig.of(model, files["forget"], prompt="question_answer"), out=out, **options)


def test_an_evaluation_keeps_nothing_of_another_prompt(tiny, model, files, made):
    """What a model has read is kept between evaluations; with other tokens it reads again."""
    retain = files["retain"]
    found = {}
    for name in ("question_answer", "llama2", "chat"):
        config = FilesConfig.of(model, retain["path"], columns=retain["columns"], prompt=name, limit=2)
        found[name] = evaluate_files(config)["probability"]
    assert found["chat"] == found["question_answer"]  # a tokenizer without a template
    assert found["llama2"] != found["chat"]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["data.prompt=llama3"], lambda c: c.prompt == make_prompt("llama3")),
        (["data.prompt=llama3", "data.prompt.system=null"],
         lambda c: c.prompt == replace(make_prompt("llama3"), system=None)),
        (["data.prompt={user_start: '<u>', user_end: '<a>'}"],
         lambda c: (c.prompt.name, c.prompt.user_end) == ("tags", "<a>")),
        (["data.prompt.system=Be brief."], lambda c: (c.prompt.name, c.prompt.system) == ("chat", "Be brief.")),
    ],
)  # fmt: skip
def test_prompts_of_a_configuration(overrides, read):
    config = load_config(None, overrides)
    assert read(config)
    assert type(config).model_validate(config.to_dict()) == config


def test_columns_of_a_configuration():
    given = ["data.source=files", "data.retain=r.csv", "data.forget=f.csv"]
    columns = load_config(
        None, [*given, "data.forget.columns={question: q, answer: a}", "unlearn.forget=ga"]
    ).data.forget
    assert (columns.path, columns.columns) == ("f.csv", {"question": "q", "answer": "a"})
    assert FilesConfig.of("m", "d", columns="question=q, answer=a b").data.columns == {"question": "q", "answer": "a b"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.prompt=lama2", "data.prompt: prompt='lama2': did you mean llama2"),
        ("data.prompt={user_strat: x}", "data.prompt: prompt='user_strat': did you mean user_start"),
        ("data.forget={path: f, columns: {anwser: a}}", "data.forget.columns: columns='anwser': did you mean answer?"),
        ("data.forget={path: f, columns: question}", "data.forget.columns: needs FIELD=COLUMN,FIELD=COLUMN, as"),
        ("data.forget={path: f, columns: {text: a, answer: b}}", "columns: text is all of a sample"),
    ],
)
def test_what_is_wrong_is_told(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_rows_in_both_sets_and_rows_that_repeat_are_told(files, tiny_config, caplog):
    forget = files["forget"]
    question, answer = QUESTIONS[0]
    with open(forget, "a") as table:
        table.write(f'"{question.upper()}",{answer}\n')
    load_data(tiny_config({"data": files}))
    assert f"{forget}: 1 row is there more than once, case and white space aside, and counted as often" in caplog.text
    question, answer = QUESTIONS[2]
    with open(forget, "a") as table:
        table.write(f'"{question}",{answer}\n' * 2)
    told = rf"^data\.forget={forget}: 1 row is in data\.retain={files['retain']['path']} too, .*; leave each in one of"
    with pytest.raises(ValueError, match=told):
        load_data(tiny_config({"data": files}))
