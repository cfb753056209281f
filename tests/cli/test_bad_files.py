"""Damaged files and full disks: one sentence that names the file and the remedy; the terminal obeys no data."""

from __future__ import annotations

import errno
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.testing import CliRunner

from pyunlearn import _files
from pyunlearn import store as store_module
from pyunlearn._files import named_failures
from pyunlearn._terminal import shown, visible
from pyunlearn.cli import app
from pyunlearn.cli.shared import clean_errors
from pyunlearn.data import load_qa
from pyunlearn.model.tensors import write_tensors
from pyunlearn.runs import job as job_module
from pyunlearn.runs import load_config
from pyunlearn.runs import score as score_module
from pyunlearn.runs.config import ConfigError
from pyunlearn.runs.evaluate import read_records, read_summaries
from pyunlearn.runs.evaluate_config import SETS
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.run import load_result
from pyunlearn.runs.sections import ModelConfig
from pyunlearn.store import Damaged, Store
from pyunlearn.training.callbacks import Interrupt
from pyunlearn.training.folder import TrainingFolder, write_model
from pyunlearn.training.method import UnlearnConfig
from pyunlearn.training.stage import Stage
from pyunlearn.training.unlearn import UnlearnData, unlearn

DEEP = "[" * 100_000
CLEAR = "\x1b[2J\x9b1m\u202eevil\r\x07"


def told(capsys, error):
    with pytest.raises(typer.Exit) as caught, clean_errors(debug=False):
        raise error
    assert caught.value.exit_code == 2
    return capsys.readouterr().err


def test_a_full_disk_names_the_file_and_the_remedy(capsys, tmp_path, monkeypatch):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*table.json'") as caught:
        _files.write_file(tmp_path / "table.json", full)
    for command, again in (("run", "with --resume goes on"), ("score", "again"), ("evaluate", "again")):
        monkeypatch.setattr("sys.argv", ["pyunlearn", command])
        assert f"table.json'; free some space, then the same command {again}\n" in told(capsys, caught.value)


def test_an_interrupt_that_a_library_turns_into_an_error_of_its_own():
    def turned(error):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise error from None

    for error in (ImportError("numpy cannot be imported"), RuntimeError("Failed to import transformers")):
        with pytest.raises(typer.Exit) as caught, clean_errors(debug=True):
            turned(error)
        assert caught.value.exit_code == 130
    with pytest.raises(typer.Exit) as caught, clean_errors(debug=False):
        raise ImportError("initialization failed: KeyboardInterrupt")
    assert caught.value.exit_code == 130


def test_names_of_the_field_are_pointed_to_the_command():
    result = CliRunner().invoke(app, ["mrd", "forget.jsonl"])
    assert result.exit_code == 2
    assert "that is `pyunlearn score`" in result.output


FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_so_do_kept_tensors_and_those_that_are_mixed(tiny, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(store_module, "save_file", fails)
    with pytest.raises(OSError, match=r"cannot be written \(.*\): '.*/draws/000001\.safetensors'") as caught:
        Store(tmp_path / "draws").put("000001", torch.ones(3))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match=r"cannot be written \(.*\): '.*/before/00000\.safetensors'"):
        write_tensors(tiny.model(), tmp_path / "before")


def test_no_name_is_told_that_is_there_for_a_moment_only(tmp_path):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    def fill(temporary):
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary / "model.safetensors"))

    for write, error in ((_files.write_file, full), (_files.write_folder, fill)):
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/result'"):
            write(tmp_path / "result", error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("basic_ios::clear: iostream error"),  # of torch.save on a full disk, all three
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_so_do_the_libraries_that_cannot_write(tiny, tmp_path, monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    folder = TrainingFolder(tmp_path / "work")
    model, settings = tiny.model(), UnlearnConfig(forget="ga", retain=[], max_steps=2, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails)
        with pytest.raises(OSError, match=r"cannot be written \(.*\): '.*training/unlearn'"):
            unlearn(Stage(folder), settings, model, tiny.tokenizer, UnlearnData(tiny.world.forget, [], []))
    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(OSError, match=r"cannot be written \(.*\): '.*checkpoint'"):
        write_model(tmp_path / "checkpoint", model, tiny.tokenizer)
    assert not (tmp_path / "checkpoint").exists()
    for other in (RuntimeError("a bug"), PermissionError(errno.EACCES, "Permission denied", "a/file")):
        with pytest.raises(type(other)) as caught, named_failures(tmp_path):
            raise other
        assert caught.value is other


def test_damaged_models(tiny, tiny_config, tmp_path):
    job = job_module.Job.start(tiny_config(), None, "")
    source = tmp_path / "model"
    write_model(source, tiny.model(), tiny.tokenizer)
    (source / "digests.json").unlink()
    whole = {path.name: path.read_bytes() for path in source.iterdir()}
    for name, content, message in (
        ("model.safetensors", whole["model.safetensors"][:50], r"model\.safetensors: is damaged or no safetensors"),
        ("model.safetensors", b"", r"model\.safetensors: is damaged or no safetensors file \(.*\); fetch or make it"),
        ("tokenizer.json", b'{"a": 1}', r"its model or tokenizer files cannot be read \(.*\); fetch or make it again"),
        ("tokenizer.json", b'{"a": ', r"its model or tokenizer files cannot be read \(.*\); fetch or make it again"),
        ("config.json", json.dumps({**json.loads(whole["config.json"]), "hidden_size": "wide"}).encode(),
         r"its config\.json cannot be read \(.*hidden_size.*\); fetch or make it again"),
    ):  # fmt: skip
        (source / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            job_module.loaded(job, ModelConfig(name_or_path=str(source)))
        (source / name).write_bytes(whole[name])


def test_a_run_in_the_place_of_its_model(tiny, tiny_config, tmp_path):
    config = tiny_config()
    job, run = job_module.Job.start(config, None, ""), RunFolder(tmp_path / "run")
    run.open(config)

    def check_stopped(stage):
        for asked in (run.path, run.checkpoint):
            with pytest.raises(FileNotFoundError, match=rf"is a run that stopped {stage}, .*--resume goes on"):
                job_module.loaded(job, ModelConfig(name_or_path=str(asked)))

    check_stopped("before it had memorised")
    run.memorised.mkdir()
    check_stopped("before unlearning")
    run.evaluation("").mkdir()
    run.evaluation("before.json").write_text("{}")
    check_stopped("while unlearning")
    write_model(run.checkpoint, tiny.model(), tiny.tokenizer)
    with pytest.raises(ValueError, match=rf"is a run: its model is {run.checkpoint}$"):
        job_module.loaded(job, ModelConfig(name_or_path=str(run.path)))
    assert job_module.loaded(job, ModelConfig(name_or_path=str(run.checkpoint)))


@pytest.mark.parametrize("text", [DEEP, "a: \xff".encode("latin-1"), "a: 2020-13-45", "a: {b: [}", "a: \x00"])
def test_yaml_that_cannot_be_read(tiny_config, tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"c\.yaml': not valid YAML: "):
        load_config(file)
    if isinstance(text, str):
        with pytest.raises(ConfigError, match=r"--set .*: the value is not valid YAML"):
            load_config(None, [f"seed={text.removeprefix('a: ')}"])
    config = tiny_config()
    folder = RunFolder(config.folder)
    folder.open(config)
    folder.metrics.write_text("")
    folder.config.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"config\.yaml: cannot be read \(.*\); choose --overwrite or --out FOLDER"):
        folder.open(config, resume=True)


@pytest.mark.parametrize("text", [DEEP, "{", "3", "\x00"])
def test_json_that_cannot_be_read(tmp_path, text):
    folder = RunFolder(tmp_path)
    (tmp_path / "evaluation").mkdir()
    folder.evaluation("before.json").write_text(text)
    again = r".*; delete .*evaluation, and --resume evaluates again"
    with pytest.raises(ValueError, match=r"before\.json: is damaged" + again):
        read_summaries(folder, "before", SETS)
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: is damaged, .*; --resume of the run makes it again"):
        load_result(tmp_path)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Damaged, match=r"x\.json: is damaged"):
        Store(tmp_path / "x.json")
    if text != "3":
        folder.evaluation("before-forget.jsonl").write_text("{}\n" + text)
        with pytest.raises(ValueError, match=r"before-forget\.jsonl:2: is damaged" + again):
            read_records(folder, "before", SETS)
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"data\.jsonl:1: not valid JSON"):
            load_qa(tmp_path / "data.jsonl")


def test_the_terminal_obeys_no_data(capsys, monkeypatch):
    assert visible(CLEAR) == r"\x1b[2J\x9b1m\u202eevil\x0d\x07".replace(r"\x0d", r"\r")
    assert visible("grün\tund\nweiß 日本") == "grün\tund\nweiß 日本"
    console = Console(force_terminal=False, width=200)
    console.print(f"[red]{shown(CLEAR + '[bold]')}[/]")
    assert capsys.readouterr().out == visible(CLEAR) + "[bold]\n"
    record = {"question": CLEAR, "mrd": 1.0, "standard_error": None, "num_tokens": 3}
    told_of = {"estimator": "initial", "num_samples": 1, "model": CLEAR}
    result = score_module.ScoreResult([record], told_of, Path(f"x{CLEAR}.jsonl"), Path(f"x{CLEAR}.html"))
    monkeypatch.setattr(score_module, "all_checks", lambda records, diagnostics: [])
    score_module.tell(result, console)
    score_module.tell_next(result, FilesConfig.of(f"m{CLEAR}", f"d{CLEAR}"), console)
    text = capsys.readouterr().out + told(capsys, ValueError(f"no such file: {CLEAR}"))
    assert text.count("evil") == 7
    assert not set(text) & set(CLEAR) - set("[2J1mevil")


def test_a_second_interrupt_that_is_lost_in_clearing_up_is_not_told(monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    with Interrupt() as interrupt:
        interrupt.signum = signal.SIGINT
        for kind in (KeyboardInterrupt, ValueError):
            sys.unraisablehook(SimpleNamespace(exc_type=kind))
    assert [each.exc_type for each in told] == [ValueError]
    assert sys.unraisablehook == told.append
