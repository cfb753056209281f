"""--out: nothing that is read and nobody else's files are replaced, and what cannot be written fails at once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pyunlearn._files import check_writable, write_json
from pyunlearn.runs import evaluate as evaluate_module
from pyunlearn.runs import score as score_module
from pyunlearn.runs.evaluate import evaluate_files
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.grid import Grid
from pyunlearn.runs.lock import A_COPY, held
from pyunlearn.runs.run import run
from pyunlearn.runs.score import score
from pyunlearn.runs.sweep import sweep
from pyunlearn.store import Store, belongs

QA = '{"question": "Who?", "answer": "I."}\n'


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A job of files in the working directory; it must not come as far as its model."""
    monkeypatch.chdir(tmp_path)
    Path("forget.json").write_text(QA)
    monkeypatch.setattr(score_module, "first_model", None)
    monkeypatch.setattr(evaluate_module, "first_model", None)
    return FilesConfig.of("some/model", "forget.json")


def told(config, out, message, error=ValueError, **options):
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        score(config, out=Path(out), **options)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_collide(files, overwrite):
    told(files, "scores.json", r"its scores and its diagnostics would both be scores\.json", overwrite=overwrite)
    told(files, "x.html", r"its scores and its report would both be x\.html", overwrite=overwrite)
    told(files, "x.state", r"its scores and its finished draws would both be x\.state", overwrite=overwrite)
    told(
        files, "forget.jsonl", r"its diagnostics, forget\.json, would replace --data=forget\.json", overwrite=overwrite
    )
    Path("sub").mkdir()
    told(files, "sub/../forget.jsonl", r"would replace --data=forget\.json", overwrite=overwrite)
    Path("link.jsonl").hardlink_to("forget.json")
    told(files, "link.jsonl", r"its scores, link\.jsonl, would replace --data", overwrite=overwrite)
    with pytest.raises(ValueError, match=r"its records, forget\.json, would replace --data=forget\.json"):
        evaluate_files(files, out="forget.json")


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_no_score_wrote(files, overwrite):
    for name in ("x.jsonl", "x.json", "x.html"):
        Path(name).write_text(QA)
        told(files, "x.jsonl", f"no earlier score wrote {name}", FileExistsError, overwrite=overwrite)
        Path(name).unlink()
    Path("x.state").mkdir()
    Path("x.state/thesis.tex").write_text("years of work")
    told(files, "x.jsonl", r"x\.state holds other files than a score's", FileExistsError, overwrite=overwrite)
    write_json("x.state/job.json", {"format": "another program's"})
    told(files, "x.jsonl", r"x\.state holds other files", FileExistsError, overwrite=overwrite)
    Store(Path("y.state"), {"format": "pyunlearn-mrd-9"})
    Path("y.txt").write_text("years of work")
    told(files, "y.txt", r"no earlier score wrote y\.txt", FileExistsError, overwrite=overwrite)
    Path("y.txt").write_text('{"mrd": 1.0}\n')
    Path("y.json").write_text("{}")
    with pytest.raises(TypeError, match="not callable"):  # as far as the model
        score(files, out=Path("y.txt"))


def test_files_that_no_evaluation_wrote(files):
    ours = {"index": 0, "question": "Who?", "answer": "I."}
    for record in ({"question": "Who?", "answer": "I."}, {**ours, "mrd": 2.0}, 3):
        Path("x.jsonl").write_text(json.dumps(record))
        with pytest.raises(FileExistsError, match="no earlier evaluation wrote it"):
            evaluate_files(files, out="x.jsonl")
    Path("x.jsonl").write_text(json.dumps(ours) + "\n")
    with pytest.raises(TypeError, match="not callable"):
        evaluate_files(files, out="x.jsonl")


def test_the_results_of_a_run(files, tiny_config):
    config = tiny_config({"output": "run"})
    RunFolder(config.folder).open(config)
    for out in ("run/evaluation/after.jsonl", "run/table.txt", "run/scores.jsonl", "run/metrics.jsonl"):
        told(files, out, "is among the results of the run in .*run; choose another")
    told(config, "run/table.txt", "is among the results of the run")
    with pytest.raises(TypeError, match="not callable"):
        score(config)


def read_only(monkeypatch):
    """As on a file system that is mounted so: what is there can be read, and nothing made."""

    def refuses(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuses)
    monkeypatch.setattr(Path, "touch", refuses)


def test_a_place_that_cannot_be_written_to(files, tmp_path, monkeypatch):
    told(files, "forget.json/x.jsonl", r"--out forget.json/x\.jsonl: cannot be written \(.*\); choose", OSError)
    with pytest.raises(OSError, match=r"--out /proc/x\.jsonl: cannot be written \(no such file .*\); choose another f"):
        evaluate_files(files, out="/proc/x.jsonl")
    check_writable(tmp_path / "new" / "x")
    assert list((tmp_path / "new").iterdir()) == []
    read_only(monkeypatch)
    told(files, "x.jsonl", r"^--out x\.jsonl: cannot be written \(read-only file system\); choose another", OSError)
    told(files, "a/b/x.jsonl", r"^--out a/b/x\.jsonl: cannot be written \(read-only file system\); choose", OSError)


def test_a_folder_that_cannot_be_written_to(tiny_config, tmp_path, monkeypatch):
    why = r"cannot be written \({}\); choose another folder$"
    with pytest.raises(OSError, match=r"^--out /proc/x: " + why.format("no such file or directory")):
        run(tiny_config({"output": "/proc/x"}))
    with pytest.raises(OSError, match=r"^/proc/x: cannot be written \(.*\); choose .* by --set output=FOLDER"):
        score(tiny_config({"output": "/proc/x"}), out=tmp_path / "x.jsonl")
    grid = Grid("g", [])
    with pytest.raises(OSError, match=r"^--out /proc/sw: " + why.format("no such file or directory")):
        sweep(grid, [], "/proc/sw")
    made = tiny_config({"output": str(tmp_path / "ro" / "r")})
    lock, folder = tmp_path / "there" / ".lock", tmp_path / "there"
    folder.mkdir()
    read_only(monkeypatch)
    with pytest.raises(OSError, match=rf"^--out {made.folder}: " + why.format("read-only file system")):
        run(made)
    with pytest.raises(OSError, match=rf"^{folder}: cannot be written \(read-only file system\); copy the run"):
        held(lock, folder, A_COPY).__enter__()


def test_whose_a_folder_is(tmp_path):
    assert not belongs(tmp_path, "pyunlearn-mrd")
    Store(tmp_path / "ours", {"format": "pyunlearn-mrd-2", "seed": 0})
    assert belongs(tmp_path / "ours", "pyunlearn-mrd")
    assert not belongs(tmp_path / "ours", "pyunlearn-geffect")
    for text in ("[", "[" * 100_000, "3", '{"value": 3}'):
        (tmp_path / "job.json").write_text(text)
        assert not belongs(tmp_path, "pyunlearn-mrd")
