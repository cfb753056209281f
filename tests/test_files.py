"""One atomic write: whatever stops it, a name holds all of the old content or all of the new."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyunlearn import _files


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_there_in_folders_made_for_it(tmp_path):
    path = tmp_path / "a" / "b" / "text"
    _files.write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    _files.write_json(path, {"ä": [1, 2.5, None]})
    assert "ä" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": [1, 2.5, None]}
    _files.write_json_lines(path, [{"a": 1}, {"b": "é"}])
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"b": "é"}\n'
    assert entries(path.parent) == ["text"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt):
        _files.write_file(path, fail)
    assert entries(tmp_path) == []
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        _files.write_file(path, fail)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["file"]


def test_what_a_killed_write_leaves_is_cleared(tmp_path):
    """And nothing else: not what a process that still runs is writing, nor a file of the user's."""
    die = """
import os, signal, sys
from pyunlearn._files import write_file
write_file(sys.argv[1], lambda new: (new.write_text("half"), os.kill(os.getpid(), signal.SIGKILL)))
"""
    path = tmp_path / "below" / "name with.dots"
    subprocess.run([sys.executable, "-c", die, str(path)], check=False)
    (tmp_path / ".mine.tmp").write_text("kept")
    assert [entry.startswith(".name with.dots.") for entry in entries(path.parent)] == [True]

    def look(new):
        new.write_text("whole")
        _files.remove_orphans(tmp_path)
        assert entries(path.parent) == [new.name]

    _files.write_file(path, look)
    assert entries(path.parent) == [path.name]
    assert (tmp_path / ".mine.tmp").read_text() == "kept"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_has_no_nan(value, tmp_path):
    _files.write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        _files.write_json(tmp_path / "file", value)
    assert (tmp_path / "file").read_text() == "1\n"
    _files.write_json_lines(tmp_path / "file", [{"x": 1.5, "y": value, "z": [True, "ß"]}])
    nothing = {"a": [None]} if isinstance(value, dict) else None
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"x": 1.5, "y": nothing, "z": [True, "ß"]}
    assert "ß" in text


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else "")
        fsync(descriptor)

    def spy_replace(source, target):
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    _files.write_text(tmp_path / "file", "new")
    assert len(steps) == 3
    assert steps[1] == "rename"
    if sys.platform == "linux":
        assert Path(steps[0]).name.startswith(".file.")
        assert steps[2] == str(tmp_path)
    steps.clear()
    _files.write_folder(tmp_path / "folder", fill("new"))
    assert steps.index("rename") == len(steps) - 2 == 4  # two files, the folder inside, the folder; rename; the parent


def fill(word):
    def write(folder):
        (folder / "inside").mkdir()
        (folder / "first").write_text(word)
        (folder / "inside" / "second").write_text(word)

    return write


def both(word):
    return {"first": word, "inside/second": word}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_whole(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(_files, "exchange", lambda one, other: False)
    path = tmp_path / "a" / "folder"
    for word in ("old", "new"):
        _files.write_folder(path, fill(word))
        assert content(path) == both(word)
        assert entries(path.parent) == ["folder"]

    def fail(temporary):
        (temporary / "first").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _files.write_folder(path, fail)
    assert content(path) == both("new")
    assert entries(path.parent) == ["folder"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    _files.write_folder(path, fill("old"))
    replace = os.replace

    def fail_for_the_new(source, target):
        if Path(source).suffix == ".tmp":
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(_files, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "replace", fail_for_the_new)
    with pytest.raises(OSError, match="no space"):
        _files.write_folder(path, fill("new"))
    assert content(path) == both("old")
    assert entries(tmp_path) == ["folder"]


# Loads _files.py alone, which is quick, and dies by SIGKILL before its `last`-th step on the disk.
KILLED = """
import importlib.util, os, shutil, signal, sys
from pathlib import Path

file, what, path, last, exchanges = sys.argv[1:]
spec = importlib.util.spec_from_file_location("files", file)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
steps = 0

def counted(call):
    def step(*args, **options):
        global steps
        steps += 1
        if steps == int(last):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return step

def fill(folder):
    (folder / "inside").mkdir()
    for name in ("first", "inside/second"):
        (folder / name).write_text("new")

if exchanges == "no":
    files.exchange = lambda one, other: False
for module, names in ((os, ("fsync", "replace", "unlink", "rmdir", "open")), (shutil, ("rmtree",)),
                      (files, ("exchange",)), (Path, ("write_text", "mkdir", "unlink"))):
    for name in names:
        setattr(module, name, counted(getattr(module, name)))
if what == "file":
    files.write_text(path, "new" * 1000)
else:
    files.write_folder(path, fill)
print(steps)
"""


def killed(what, path, last, exchanges="yes"):
    """Whether the writer was killed, and not done before its step `last`."""
    arguments = [sys.executable, "-c", KILLED, _files.__file__, what, str(path), str(last), exchanges]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode != 0


def test_a_file_whose_writer_is_killed(tmp_path):
    contents = []
    for last in range(1, 100):
        path = tmp_path / str(last) / "file"
        _files.write_text(path, "old")
        if not killed("file", path, last):
            break
        contents.append(path.read_text())
    assert set(contents) == {"old", "new" * 1000}
    assert sorted(contents, reverse=True) == contents  # old until the rename
    assert path.read_text() == "new" * 1000


def test_a_file_half_written_when_its_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    script = """if True:
        import os, runpy, signal, sys

        def write(temporary):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        runpy.run_path(sys.argv[1])["write_file"](sys.argv[2], write)
    """
    process = subprocess.run([sys.executable, "-c", script, _files.__file__, str(path)])
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("exchanges", ["yes", "no"])
def test_a_folder_whose_writer_is_killed(exchanges, tmp_path):
    """At whatever step: the old one or the new one is there, without exchanging names after `restore`; and the next
    write leaves nothing else."""
    words = []
    for last in range(1, 100):
        path = tmp_path / str(last) / "folder"
        _files.write_folder(path, fill("old"))
        if not killed("folder", path, last, exchanges):
            break
        if exchanges == "no" or sys.platform != "linux":
            _files.restore(path)
        words.append((path / "first").read_text())
        assert content(path) == both(words[-1])
        _files.write_folder(path, fill("newer"))
        assert content(path) == both("newer")
        assert entries(path.parent) == ["folder"]
    assert set(words) == {"old", "new"}
    assert sorted(words, reverse=True) == words
    assert content(path) == both("new")


def test_restore_touches_nothing_that_is_there(tmp_path):
    path = tmp_path / "folder"
    _files.restore(path)
    assert not path.exists()
    for place, word in ((path, "new"), (tmp_path / ".folder.old", "old")):
        place.mkdir()
        (place / "first").write_text(word)
    _files.restore(path)
    assert content(path) == {"first": "new"}
