"""Runs on files: every kind of term, and data that is not what it should be."""

from __future__ import annotations

import json

import pytest

from pyunlearn.data import generate_authors
from pyunlearn.runs import job as job_module
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.run import run
from pyunlearn.training.callbacks import read_metrics
from pyunlearn.training.stage import Stage
from pyunlearn.training.unlearn import retain_used


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    rows = [{"question": f"Who wrote book {i}?", "answer": f"Author number {i} did."} for i in range(6)]
    return {
        "source": "files",
        "forget": write_lines(tmp_path / "forget.jsonl", rows[:2]),
        "retain": write_lines(tmp_path / "retain.jsonl", rows[2:]),
        "num_authors": 40, "questions_per_author": 5, "forget_fraction": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "terms",
    [("idk", ["ap"]), ("dpo", ["gd"]), ("me", [{"name": "kl", "preset": "open_unlearning"}]), ("ga", [])],
)
def test_files_and_every_kind_of_term(tiny_config, files, tmp_path, terms):
    (tmp_path / "no.txt").write_text("I do not know.\nI cannot say.\n")
    forget, retain = terms
    config = tiny_config(
        {
            "data": {**files, "refusals": str(tmp_path / "no.txt")},
            "memorise": None,
            "unlearn": {"forget": forget, "retain": retain, "max_steps": 2, "gradient_checkpointing": True},
            "evaluate": {"metrics": ["probability"], "retain_limit": 3, "goal": None},
        }
    )
    result = run(config)
    assert result.goals == []
    assert {path.name for path in result.folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "table.json", "table.md", "report.html", "checkpoint", "evaluation",
        "unlearning.json", ".pyunlearn",
    }  # fmt: skip
    assert len((result.folder / "evaluation" / "after-retain.jsonl").read_text().splitlines()) == 3
    steps = read_metrics(result.folder / "metrics.jsonl")
    assert {key.split("/")[0] for key in steps[0] if key.endswith("/loss")} == {
        f"forget.{forget}",
        *(f"retain.{term['name'] if isinstance(term, dict) else term}" for term in retain),
    }


def test_held_out_rows_and_further_sets_are_evaluated(tiny_config, files, tmp_path):
    """At every moment; held-out rows are of the retain file, and `retain_limit` bounds them as it does the others."""
    others = write_lines(tmp_path / "others.jsonl", [{"question": "Who are you?", "answer": "A model."}] * 2)
    config = tiny_config(
        {
            "data": {**files, "holdout": 2},
            "memorise": {"epochs": 1},
            "unlearn": {"max_steps": 1},
            "evaluate": {"metrics": ["probability"], "retain_limit": 1, "sets": {"real.others": others}},
        }
    )
    result = run(config)
    counts = {row["set"]: row["samples"] for row in result.table}
    assert counts == {"forget": 2, "retain": 1, "holdout": 1, "real.others": 2}
    data = job_module.load_data(config)
    assert len(data.holdout) == 2
    assert not set(data.holdout) & set(data.retain)
    for moment in ("before", "after"):
        (line,) = (result.folder / "evaluation" / f"{moment}-holdout.jsonl").read_text().splitlines()
        assert json.loads(line)["question"] == data.holdout[0].question
    (held_out,) = (row for row in result.table if row["set"] == "holdout")
    assert "held-out rows" in result.goals[1]["text"]
    assert result.goals[1]["value"] == pytest.approx(held_out["after"] / held_out["before"])
    html = (result.folder / "report.html").read_text()
    assert "real.others" in html
    assert '<td class="holdout">holdout</td>' in html
    written = result.folder / "config.yaml"
    assert load_config(written) == config


def test_the_embedded_world_alone_teaches_refusals(tiny_config, files):
    world = generate_authors(4, 2, forget_fraction=0.25, num_unknown=8)
    assert job_module.load_data(tiny_config({"data": {"num_unknown": 8}})).unknown == list(world.unknown)
    assert job_module.load_data(tiny_config({"data": {**files, "num_unknown": 8}})).unknown == []


def test_only_retain_rows_that_are_used_get_a_reference(tiny_config, files):
    config = tiny_config({"data": files, "memorise": None, "unlearn": {"max_steps": 1, "batch_size": 2}})
    data, stage = job_module.load_data(config), Stage(RunFolder(config.folder))
    used = retain_used(stage, config.unlearn, data)
    assert len(used) == 2
    assert used == retain_used(stage, config.unlearn, data)
    assert set(used) < set(data.retain)
    more = config.unlearn.model_copy(update={"max_steps": None})
    assert retain_used(stage, more, data) == data.retain


def test_bad_data_is_told_before_anything_is_written(tiny_config, files, tmp_path):
    def told(error, message, **changes):
        config = tiny_config({"data": {**files, **changes}})
        with pytest.raises(error, match=message):
            run(config)
        assert not config.folder.exists()

    told(
        FileNotFoundError,
        r"no such file: .*forgot.jsonl; did you mean forget.jsonl",
        forget=str(tmp_path / "forgot.jsonl"),
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    told(ValueError, r"broken.jsonl:2: not valid JSON", forget=str(broken))
    broken.write_text("")
    told(ValueError, "broken.jsonl holds no question-answer pairs", forget=str(broken))
    told(
        ValueError,
        r"data.forget=.*retain.jsonl: 4 rows are in data.retain=.*retain.jsonl too, .*; the first is 'Who wrote book 2",
        forget=files["retain"],
    )
    long = write_lines(tmp_path / "long.jsonl", [{"question": "Q?", "answer": "very " * 300}])
    told(
        ValueError,
        r"sample 0 \(question 'Q\?'\) has \d+ tokens with its answer, more than the limit of 256",
        forget=long,
    )
    told(ValueError, "data.max_length=4096: the model's context is 256 tokens", max_length=4096)
    told(FileNotFoundError, "no such file: .*nowhere.txt", refusals=str(tmp_path / "nowhere.txt"))
    told(ValueError, r"data\.holdout=4: needs 5 different retain pairs at least, 4 to hold out and one to", holdout=4)
    with pytest.raises(ValueError, match=r"evaluate\.sets\.long: sample 0 .* has \d+ tokens .* than the limit of 256"):
        run(tiny_config({"data": files, "evaluate": {"sets": {"long": long}}}))
    assert not tiny_config().folder.exists()


def test_a_mistake_that_computed_nothing_does_not_block_the_folder(tiny_config, files):
    """It leaves none that was not there, and one that was as it was."""
    config = tiny_config({"data": {**files, "max_length": 4096}})
    for there in (False, True):
        if there:
            config.folder.mkdir()
        with pytest.raises(ValueError, match=r"data.max_length=4096"):
            run(config)
        assert config.folder.exists() == there
    fixed = {"data": files, "unlearn": {"max_steps": 1}, "memorise": {"epochs": 1}}
    assert run(tiny_config(fixed)).folder == config.folder
