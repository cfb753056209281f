"""A file of one's own at the command line: columns, prompts, texts, and what is said where they do not fit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pyunlearn.runs.folder import MARK
from pyunlearn.training.folder import write_model

from .test_cli import call  # noqa: F401 (fixture)


@pytest.fixture
def own(tiny, call):  # noqa: F811
    """`call`, beside a model and files of other people's columns."""
    write_model(Path("model"), tiny.model(), tiny.tokenizer)
    Path("own.csv").write_text("id,prompt_text,reply\n1,Who?,Ada Lovelace.\n2,Where?,Rome.\n")
    Path("usual.tsv").write_text("Prompt\tCompletion\nWho?\tAda Lovelace.\nWhere?\tRome.\n")
    Path("text.txt").write_text("Once upon a time.")
    return call


def test_columns_and_a_prompt(own):
    ask = ["evaluate", "--model", "model", "--rouge-samples", "0", "--data"]
    code, told, _ = own(*ask, "usual.tsv", "--prompt", "llama2")
    assert code == 0
    assert told.startswith("usual.tsv: question = Prompt, answer = Completion\n")
    columns = ["--columns", "question=prompt_text,answer=reply"]
    code, given, _ = own(*ask, "own.csv", *columns, "--prompt", "llama2")
    assert code == 0
    assert given.startswith("own.csv: question = prompt_text, answer = reply\n")
    numbers = re.findall(r"probability\W+(0\.\d+)", told + given)
    assert numbers[0] == numbers[1]
    code, told, _ = own("score", "--model", "model", "--data", "own.csv", *columns, "--estimator", "gradient")
    assert (code, told.startswith("own.csv: question = prompt_text")) == (0, True)


def test_a_text(own):
    code, told, _ = own("evaluate", "--model", "model", "--data", "text.txt", "--prompt", "plain")
    assert code == 0
    assert told.startswith("text.txt: texts without questions\n")
    assert re.search(r"rouge_l\W+-\W", told)  # nothing was asked
    assert re.search(r"probability\W+0\.\d+", told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "own.csv"],
            "own.csv:2: no question and answer among its columns (id, prompt_text, reply); tell which",
        ),
        (["--data", "own.csv"], "or --columns 'question=prompt_text,answer=reply'\n"),
        (
            ["--data", "own.csv", "--columns", "question=prompt,answer=reply"],
            "question = prompt, which is not there; did",
        ),
        (["--data", "own.csv", "--columns", "anwser=reply"], "columns='anwser': did you mean answer?"),
        (
            ["--data", "own.csv", "--columns", "reply"],
            "needs FIELD=COLUMN,FIELD=COLUMN, as question=prompt,answer=reply",
        ),
        (["--data", "usual.tsv", "--prompt", "lama2"], "prompt='lama2': did you mean llama2"),
        (["--data", "text.txt"], "has texts without questions, and prompt=chat asks one; --prompt plain takes"),
        (["--data", "own.xlsx"], "no such file: own.xlsx; did you mean own.csv?"),
    ],
)
def test_what_does_not_fit_is_one_message(own, options, message):
    for command in ("evaluate", "score"):
        code, _, errors = own(command, "--model", "model", *options)
        assert code == 2
        assert errors.startswith("error: ")
        assert message in errors


def test_columns_are_of_one_set(own):
    suite = ["evaluate", "--model", "model", "--data", "folder", "--suite", "tofu"]
    code, _, errors = own(*suite, "--columns", "question=q")
    assert (code, "--columns=question=q: goes without --suite only" in errors) == (2, True)
    code, _, errors = own(*suite, "--prompt", "lama2")
    assert (code, "prompt='lama2': did you mean llama2" in errors) == (2, True)


def test_a_runs_own_file_has_the_columns_it_was_told(own):
    run = Path("run")
    shutil.copytree("model", run / "checkpoint")
    (run / MARK).write_text("{}")
    source = "{path: own.csv, columns: {question: prompt_text, answer: reply}}"
    (run / "config.yaml").write_text(f"data:\n  forget: {source}\n  retain: usual.tsv\n")
    code, told, _ = own("evaluate", "run", "--data", "own.csv", "--rouge-samples", "0")
    assert (code, "columns: question=prompt_text,answer=reply, as in its run\n" in told) == (0, True)
    code, told, _ = own("score", "run", "--data", "own.csv", "--estimator", "gradient")
    assert (code, "own.csv: question = prompt_text, answer = reply\n" in told) == (0, True)
    code, told, _ = own("evaluate", "run", "--data", "usual.tsv", "--rouge-samples", "0")
    assert (code, "columns:" in told) == (0, False)
