"""How a result came about: what is recorded, and what a page says of it."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime

import pytest

from pyunlearn import __version__
from pyunlearn.data import QA
from pyunlearn.runs import provenance
from pyunlearn.runs.data import RunData
from pyunlearn.runs.files_config import FilesConfig
from pyunlearn.runs.folder import RunFolder
from pyunlearn.runs.provenance import Attempt, commit, describe, duration, keep_attempt, read_attempts

PAIRS = [QA("Who?", "Ada.")] * 3
DATA = RunData(PAIRS, PAIRS[:2], [], [], sets={"others": PAIRS[:1]})


def test_what_is_recorded(tmp_path):
    record = Attempt("pyunlearn run").record(DATA)
    assert datetime.fromisoformat(record["began"]).tzinfo is not None
    assert 0 <= record["seconds"] < 60
    assert record["peak_memory"]["main memory"] > 50e6  # torch alone is more
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["pyunlearn"] == __version__
    assert record["data"] == {"forget": 3, "retain": 2, "others": 1}
    folder = RunFolder(tmp_path)
    assert read_attempts(folder) == []
    for _ in range(2):
        keep_attempt(folder, record)
    assert read_attempts(folder) == [record, record]
    assert json.loads(folder.provenance.read_text()) == [record, record]


def test_what_a_page_says(tiny_config):
    config = tiny_config({"seed": 3})
    record = Attempt("pyunlearn run --set seed=3").record(DATA)
    first = {**record, "seconds": 50.0, "began": "2026-01-02T03:04:05+00:00", "peak_memory": {"main memory": 2 * 10**9}}
    last = {**record, "seconds": 20.0, "processes": 2, "peak_memory": {"main memory": 10**9, "GPU memory": 5 * 10**9}}
    last["machine"] = {"cpu": "A CPU", "cores": 8, "gpus": ["H200", "H200"]}
    told = describe(config, [first, last], {"steps": "6"})
    assert told["command"] == "pyunlearn run --set seed=3"
    assert told["data"] == "embedded, 4 authors made up here; 3 forget, 2 retain, 1 others"
    assert told["model"].startswith("embedded, a small Llama built here, hidden_size=32, ")
    assert told["model"].endswith("float32, memorised over 3 epochs")
    stopped = config.model_copy(update={"memorise": config.memorise.model_copy(update={"max_steps": 60})})
    assert describe(stopped, [])["model"].endswith("float32, memorised over 60 steps")
    assert (told["seed"], told["steps"]) == ("3", "6")
    assert told["began"] == "2026-01-02 03:04:05+00:00"
    assert told["wall time"] == "1 min 10 s in 2 attempts"
    assert told["peak memory"] == "2.00 GB main memory, 5.00 GB GPU memory"
    assert told["machine"] == "A CPU, 8 cores, 2 x H200, 2 processes"
    assert f"pyunlearn {__version__}" in told["versions"]
    assert describe(config, []).keys() == {"model", "seed"}  # a run from before anything was recorded


def test_files_have_their_names():
    config = FilesConfig.of("folder/model", "data.jsonl", name="forget10", limit=5, gguf_file="m.gguf")
    told = describe(config, [Attempt("pyunlearn score").record(DATA)])
    assert told["model"] == "folder/model, m.gguf, float32"
    assert told["data"].startswith("data.jsonl forget10 the first 5; 3 forget")


@pytest.mark.parametrize("error", [OSError("no git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(provenance.subprocess, "run", fail)
    commit.cache_clear()
    assert commit() == {}
    commit.cache_clear()


def test_the_commit_is_this_checkouts(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pyunlearn" / "runs" / "provenance.py"))
    commit.cache_clear()
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit() == {"commit": head[:12]}
    (tmp_path / "file").write_text("2")
    commit.cache_clear()
    assert commit() == {"commit": f"{head[:12]}+"}
    commit.cache_clear()


def test_durations():
    assert [duration(each) for each in (0.04, 59.9, 60, 3599.6, 3600)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "1 h 0 min", "1 h 0 min",
    ]  # fmt: skip
