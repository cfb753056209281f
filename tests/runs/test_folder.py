"""Which folders a run takes, and that nothing of the user's goes with what it overwrites."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from pyunlearn.runs import job as job_module
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.fingerprint import fingerprints, model_fingerprints
from pyunlearn.runs.folder import MOVING, OLD, RunFolder, is_run_file
from pyunlearn.runs.job import load_data
from pyunlearn.runs.overrides import load_config
from pyunlearn.runs.run import run
from pyunlearn.runs.sections import ModelConfig
from pyunlearn.training.folder import write_model


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tiny_config):
    """A run folder with results, and its configuration."""
    config = tiny_config()
    folder = RunFolder(config.folder)
    folder.open(config)
    (folder.path / "checkpoint").mkdir()
    (folder.path / "checkpoint" / "model.safetensors").write_text("weeks of work")
    folder.report.write_text("the report")
    return config


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "..", "../..", "/", "~", "~/..", "here/..", "link"])
def test_a_place_that_is_no_runs_own_is_refused(tiny_config, tmp_path, monkeypatch, place, overwrite):
    home, work = tmp_path / "home" / "me", tmp_path / "work" / "deep"
    for folder in (home, work):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("a: 1")
        (folder / ".pyunlearn").write_text("{}")
    (work / "link").symlink_to(home)
    (work / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    before = content(tmp_path)
    config = tiny_config({"output": os.path.expanduser(place)})
    with pytest.raises(ValueError, match=r"output='.*': needs a folder of the run's own, this (is|holds) the \w+ dir"):
        RunFolder(config.folder).open(config, overwrite=overwrite)
    config = tiny_config({"output": None, "name": ".."})
    with pytest.raises(ValueError, match="needs a folder of the run's own"):
        RunFolder(config.folder).open(config, overwrite=overwrite)
    assert content(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_config_yaml_does_not_make_a_run_folder(tiny_config, overwrite):
    """Not a foreign one, and not a copy of a run's own."""
    config = tiny_config()
    config.folder.mkdir()
    for text in ("editor: vim", yaml.safe_dump({**config.to_dict(), "versions": {"pyunlearn": "0"}})):
        (config.folder / "config.yaml").write_text(text)
        with pytest.raises(FileExistsError, match=r"is not a run folder \(no \.pyunlearn\); it is left alone"):
            RunFolder(config.folder).open(config, resume=True, overwrite=overwrite)
        assert content(config.folder) == {"config.yaml": text}


def test_a_file_is_no_folder(tiny_config):
    config = tiny_config()
    config.folder.write_text("thesis")
    with pytest.raises(FileExistsError, match="is not a run folder"):
        RunFolder(config.folder).open(config, overwrite=True)
    assert config.folder.read_text() == "thesis"


def test_files_of_the_users_in_a_run_folder_are_not_overwritten(finished, tiny_config):
    folder = RunFolder(finished.folder)
    (folder.path / "notes.txt").write_text("mine")
    before = content(folder.path)
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt, no files of a run; move them away"):
        folder.open(finished, overwrite=True)
    (folder.path / "notes.txt").unlink()
    reads = tiny_config({"model": {"tokenizer": str(folder.checkpoint)}})
    with pytest.raises(FileExistsError, match=r"model.tokenizer=.*checkpoint is in .*; choose --out FOLDER"):
        folder.open(reads, overwrite=True)
    assert content(folder.path) == {name: text for name, text in before.items() if name != "notes.txt"}


def test_every_name_that_a_run_gives_is_known():
    for path in vars(RunFolder(Path("run"))).values():
        assert path == Path("run") or is_run_file(path.relative_to("run").parts[0])
    assert is_run_file(".checkpoint.tmp")
    assert not is_run_file(".git")
    assert not is_run_file("scores.txt")


def test_old_results_stay_until_the_new_run_has_its_model(finished, tiny_config, monkeypatch):
    """A run that fails before puts them back; one that has loaded its model removes them."""
    folder, before = RunFolder(finished.folder), content(finished.folder)

    def fails(*args, **kwargs):
        assert (folder.path / OLD / "report.html").is_file()
        assert not folder.report.exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "load_model", fails)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_config({"seed": 5}), overwrite=True)
    assert content(folder.path) == before

    def memorise(*args):
        assert not (folder.path / OLD).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "memorise", memorise)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config({"seed": 5}), overwrite=True)
    assert set(content(folder.path)) == {".pyunlearn", "config.yaml"}
    assert yaml.safe_load(folder.config.read_text())["seed"] == 5


def test_what_a_killed_run_was_to_overwrite_comes_back(finished):
    """Killed on the way aside, before the new run began, and on the way back."""
    folder, before = RunFolder(finished.folder), content(finished.folder)
    (folder.path / MOVING).mkdir()
    folder.report.rename(folder.path / MOVING / "report.html")
    folder.recover()
    assert content(folder.path) == before
    folder.open(finished, resume=True)
    before = content(folder.path)
    folder._move_aside()
    assert not folder.marked
    folder.check_place()
    folder.recover()
    assert content(folder.path) == before
    folder.open(finished, overwrite=True)
    assert not folder.computed
    folder.recover()
    assert content(folder.path) == before
    folder.open(finished, overwrite=True)
    folder.metrics.write_text("")  # the new run has begun: it had loaded its model
    folder.recover()
    assert set(content(folder.path)) == {".pyunlearn", "config.yaml", "metrics.jsonl"}


def test_what_a_killed_run_was_writing_is_no_result(tiny_config):
    """Killed between its first two files: it begins again, by either word."""
    config = tiny_config({})
    folder = RunFolder(config.folder)
    folder.open(config)
    folder.config.rename(folder.path / ".config.yaml.host.1.abcd.tmp")
    (folder.path / ".memorised.tmp").mkdir()
    assert not folder.computed
    folder.open(config)
    folder.config.unlink()
    folder.open(config, resume=True)
    assert folder.config.is_file()


def test_results_of_other_data_or_another_model_are_not_taken_up(tiny_config, tmp_path):
    """Told by what changed; a file that only lies elsewhere, or has other keys, is the same data."""
    rows = [{"question": f"Who wrote book {i}?", "answer": f"Author number {i} did."} for i in range(4)]
    files, model = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain")}, tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")

    def write(name, items):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in items))

    write("forget", rows[:2])
    write("retain", rows[2:])
    names = {name: str(file) for name, file in files.items()}
    config = RunConfig.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": {"name_or_path": str(model)},
            "data": {"source": "files", "holdout": 0, **names},
        }
    )

    def open_folder(**options):
        folder = RunFolder(config.folder)
        folder.open(config, reads=fingerprints(config, load_data(config)), **options)
        return folder

    open_folder().metrics.write_text("")
    write("forget", [{**row, "more": 1} for row in rows[:2]])
    open_folder(resume=True)
    write("forget", [rows[0], {**rows[1], "answer": "Nobody."}])
    for options in ({}, {"resume": True}):
        with pytest.raises(FileExistsError, match=r"results of other content: data\.forget changed since the run beg"):
            open_folder(**options)
    write("forget", rows[:2])
    (model / "model.safetensors").write_bytes(b"weightz")
    write("retain", rows[2:3])
    with pytest.raises(FileExistsError, match=r"of other content: data\.retain, model changed"):
        open_folder(resume=True)
    open_folder(overwrite=True).settle()
    open_folder(resume=True)


def test_rows_that_are_only_evaluated_are_the_same_too(tiny_config, tmp_path):
    """Held-out rows, and those of further sets; but a set that is only called otherwise is another configuration."""
    rows = [{"question": f"Who wrote book {i}?", "answer": f"Author number {i} did."} for i in range(8)]

    def write(name, items):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
        return str(tmp_path / f"{name}.jsonl")

    paths = {"forget": write("forget", rows[:2]), "retain": write("retain", rows[2:])}
    sets = {"others": write("others", rows[:3])}
    config = tiny_config(
        {"data": {"source": "files", "holdout": 2, **paths}, "evaluate": {"sets": sets}, "memorise": None}
    )
    folder, data = RunFolder(config.folder), load_data(config)
    folder.open(config, reads=fingerprints(config, data))
    folder.metrics.write_text("")
    changed = [dict(row, answer="Nobody.") if row["question"] == data.holdout[0].question else row for row in rows[2:]]
    write("retain", changed)
    write("others", rows[:2])
    with pytest.raises(FileExistsError, match=r"other content: data\.holdout, evaluate\.sets\.others changed since"):
        folder.open(config, resume=True, reads=fingerprints(config, load_data(config)))


def test_a_folder_from_before_a_key_is_taken_up_where_the_key_changes_nothing(finished):
    """Keys that a run folder's configuration does not have yet count as what the run did."""
    folder = RunFolder(finished.folder)
    written = yaml.safe_load(folder.config.read_text())
    for section, key in (("evaluate", "sets"), ("unlearn", "pad_to"), ("data", "holdout")):
        del written[section][key]
        folder.config.write_text(yaml.safe_dump(written))
        if key != "holdout":
            folder.open(finished, resume=True)
            assert yaml.safe_load(folder.config.read_text())[section][key] == finished.to_dict()[section][key]
    folder.config.write_text(yaml.safe_dump(written))
    before = content(folder.path)
    with pytest.raises(
        FileExistsError,
        match=r"run from before there was data\.holdout; go on with it by --set data\.holdout=0, or choose --out",
    ):
        folder.open(finished, resume=True)
    assert content(folder.path) == before
    assert load_config(folder.config).data.holdout == 0  # as it was
    none = finished.model_copy(update={"data": finished.data.model_copy(update={"holdout": 0})})
    folder.open(none, resume=True)
    folder.config.write_text(yaml.safe_dump({**written, "colour": "blue"}))  # of another version altogether
    with pytest.raises(FileExistsError, match=r"another configuration \(.*colour: 'blue' -> None"):
        folder.open(none, resume=True)


def test_fingerprints_of_models(tmp_path):
    def of(**changes):
        return model_fingerprints(ModelConfig(**changes))

    assert of() == {"model": "embedded None"}
    assert of(name_or_path="some/model", tokenizer="other/one") == {"model": "some/model None",
                                                                    "model.tokenizer": "other/one"}  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    known = []
    for name, text in (("model.safetensors", "a"), ("model.safetensors", "b"), ("config.json", "{}"),
                       ("tokenizer.json", "{}"), ("chat_template.jinja", "x")):  # fmt: skip
        (folder / name).write_text(text)
        known.append(of(name_or_path=str(folder))["model"])
    assert len(set(known)) == 5
    (folder / "README.md").write_text("read me")
    assert of(name_or_path=str(folder))["model"] == known[-1]
    (folder / "m.gguf").write_text("1")
    packed = of(name_or_path=str(folder), gguf_file="m.gguf")
    assert packed == of(gguf_file=str(folder / "m.gguf"))
    (folder / "m.gguf").write_text("2")
    assert packed != of(gguf_file=str(folder / "m.gguf"))


def test_a_damaged_mark_is_told(finished):
    folder = RunFolder(finished.folder)
    (folder.path / ".pyunlearn").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"\.pyunlearn: is damaged, it is not JSON \(.*\); delete .*run, or choose"):
        folder.open(finished, resume=True)


def test_a_damaged_model_of_a_run_is_not_loaded(tiny, tiny_config):
    config = tiny_config()
    folder = RunFolder(config.folder)
    write_model(folder.memorised, tiny.model(), tiny.tokenizer)
    job = job_module.Job.start(config, None, "")
    job_module.starting_model(job)
    weights = bytearray((folder.memorised / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder.memorised / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: is damaged, .* make the model again, or delete .*json"):
        job_module.starting_model(job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlearn": {"forget": [{"name": "rmu", "options": {"layer": 7}}]}}, "rmu: layer=7: embedded has 2 layers"),
        ({"unlearn": {"retain": [{"name": "rr", "options": {"layer": 3}}]}}, "rr: layer=3: embedded has 2 layers"),
        (
            {"unlearn": {"forget": [{"name": "rmu", "options": {"layer": "deep"}}], "retain": "rr"}},
            r"unlearn: rmu .*layer 'deep'\) and rr .*: needs one layer \('deep' is 2, 'middle' is 1 of this model\)",
        ),
        (
            {"geffect": {"groups": {"mine": ["transformer.h.*"]}}},
            r"groups\['mine'\]=.*: matches no trainable parameter",
        ),
        ({"model": {"options": {"hidden_act": 3}}}, r"model\.options=.*hidden_act"),
    ],
)
def test_what_the_model_does_not_have_is_told_before_anything_is_computed(finished, tiny_config, changes, message):
    before = content(finished.folder)
    with pytest.raises(ValueError, match=message):
        run(tiny_config(changes), overwrite=True)
    assert content(finished.folder) == before  # of the run that was to be overwritten
