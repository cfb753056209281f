"""Sweeps: a grid's runs are what they are alone, begin once, stand any stop, and end in a comparison."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

import pyunlearn.model.cache as cache_module
import pyunlearn.runs.job as job_module
import pyunlearn.runs.run as run_module
from pyunlearn.runs.config import ConfigError, RunConfig
from pyunlearn.runs.grid import make_cells, make_grid
from pyunlearn.runs.lock import InUse, held
from pyunlearn.runs.run import run
from pyunlearn.runs.sweep import Sweep, sweep, told_plan
from pyunlearn.training.folder import write_model
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

from ..tiny import TINY

ALIKE = {key: TINY[key] for key in ("model", "data", "memorise", "evaluate")}
SHORT = {"epochs": 2, "batch_size": 2, "warmup": 0}


def grid_of(recipes=("npo_kl", "tnpo_kl"), seeds=1, name="mine", run=None, **axes):
    whole = merge({**ALIKE, "num_threads": 1, "unlearn": SHORT}, run or {})
    return make_grid({"name": name, "run": whole, "axes": {"unlearn.recipe": list(recipes), **axes}, "seeds": seeds})


def go(grid, out, console=None, **options):
    return sweep(grid, make_cells(grid, out), out, console=console, **options)


def weights(folder):
    return (folder / "checkpoint" / "model.safetensors").read_bytes()


def evaluated(folder):
    return {path.name: path.read_text() for path in sorted((folder / "evaluation").iterdir())}


@pytest.fixture
def counted(monkeypatch):
    """How often what runs share is made, and each evaluated."""
    counts = Counter()

    def count(module, name, what):
        real = getattr(module, name)

        def made(*arguments, **options):
            counts[what(*arguments)] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, made)

    count(job_module, "memorise", lambda *_: "memorised")
    count(cache_module, "fill", lambda *_: "referred")
    count(run_module, "evaluate_sets", lambda stage, settings, folder, moment, *_: moment)
    count(run_module, "unlearn", lambda *_: "unlearned")
    anchors = dict(run_module.ANCHORS)

    def retrained(*arguments):
        counts["made retrained"] += 1
        return anchors["retrained"](*arguments)

    monkeypatch.setattr(run_module, "ANCHORS", {"retrained": retrained})
    return counts


def test_runs_are_what_they_are_alone_and_share_what_they_begin_with(tmp_path, counted, monkeypatch):
    monkeypatch.setenv("PYUNLEARN_CACHE", str(tmp_path / "cache"))
    grid = grid_of(seeds=2, run={"evaluate": {"anchors": ["retrained"]}})
    out = tmp_path / "out"
    result = go(grid, out)
    assert not result.failed
    # a start a seed; of it the references of the forget rows and, for kl, of the retain rows
    assert counted == {"memorised": 2, "before": 2, "retrained": 2, "made retrained": 2, "referred": 4, "unlearned": 4,
                       "after": 4}  # fmt: skip
    monkeypatch.setenv("PYUNLEARN_CACHE", str(tmp_path / "another"))
    for cell in result.cells:
        alone = tmp_path / "alone" / cell.name / str(cell.seed)
        one = run(RunConfig.model_validate({**cell.config.to_dict(), "output": str(alone)}))
        assert weights(cell.config.folder) == weights(alone)
        assert evaluated(cell.config.folder) == evaluated(alone)
        assert json.loads((cell.config.folder / "table.json").read_text())["table"] == one.table
        for stage in ("memorise", "unlearn"):
            assert losses(cell.config.folder, stage) == losses(alone, stage)
    inode = {os.stat(cell.config.folder / "memorised/model.safetensors").st_ino for cell in result.cells}
    assert len(inode) == 2  # on disk once a start

    comparison = result.comparison
    assert [group.name for group in comparison.groups] == ["npo_kl", "tnpo_kl"]
    assert all(group.seeds == [0, 1] for group in comparison.groups)
    rows = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert {row["name"] for row in rows} == {"npo_kl", "tnpo_kl"}
    assert all(row["runs"] == "2" and row["half_width_95"] for row in rows if row["moment"] == "after")
    assert (out / "compare.html").is_file()


def losses(folder, stage):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["stage"] == stage]


def test_what_is_finished_stays_and_a_grid_may_grow(tmp_path, counted):
    out = tmp_path / "out"
    go(grid_of(("npo_kl",)), out)
    pages = {path: path.stat().st_mtime_ns for path in out.rglob("table.json")}
    counted.clear()
    told = Console(record=True, width=200, file=io.StringIO())
    result = go(grid_of(("ga", "npo_kl"), seeds=[0, 3]), out, told)
    assert counted["unlearned"] == 3
    assert counted["memorised"] == 1  # of seed 3
    assert counted["referred"] == 2
    assert {path: path.stat().st_mtime_ns for path in pages} == pages
    text = told.export_text()
    assert "4 runs, 1 of them finished, 2 starts" in text
    begun = re.findall(r"begins (seed\d)-\w+: what (\d) runs? will start from \((.*)\)", text)
    assert begun == [("seed3", "2", "ga, seed 3 and 1 more")]  # not seed 0's
    assert [group.seeds for group in result.comparison.groups] == [[0, 3], [0, 3]]
    counted.clear()
    more = go(grid_of(("ga", "npo_kl"), seeds=[0, 3], run={"evaluate": {"anchors": ["retrained"]}}), out)
    assert counted == {"made retrained": 2, "retrained": 2}  # one of each start, for the runs that are there
    assert ("forget", "probability") in more.comparison.columns
    assert all(group.mean(("forget", "probability"), "retrained") for group in more.comparison.groups)
    counted.clear()
    smaller = go(grid_of(("ga",), seeds=[3]), out)
    assert not counted  # nothing was left to do
    assert [group.seeds for group in smaller.comparison.groups] == [[3]]


def test_other_folders_and_other_settings_are_refused(tmp_path):
    out = tmp_path / "out"
    go(grid_of(("ga",)), out)
    with pytest.raises(ValueError, match=r"--out: .* belongs to another job \(grid: 'mine' -> 'yours'\)"):
        go(grid_of(("ga",), name="yours"), out)
    with pytest.raises(ValueError, match=r"^ga, seed 0: .*/ga/seed0 was begun with other settings \(unlearn.ep"):
        go(grid_of(("npo_kl", "ga"), run={"unlearn": {"epochs": 3}}), out)
    assert not (out / "runs" / "npo_kl").exists()  # nothing was begun
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match=r"--out: .*mine holds other files"):
        go(grid_of(("ga",)), tmp_path / "mine")
    with held(out / ".lock", out), pytest.raises(InUse, match="is in use by process"):
        go(grid_of(("ga",)), out)


def test_other_data_of_the_same_name_are_no_run_of_this_folder(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": f"It is number {i}."} for i in range(6)]
    for name, own in (("forget", rows[:2]), ("retain", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    data = {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.jsonl"), "holdout": 1}
    files = {"run": {**ALIKE, "num_threads": 1, "unlearn": SHORT, "data": data}, "name": "mine"}
    out = tmp_path / "out"
    assert not go(make_grid({**files, "axes": {"unlearn.recipe": ["ga"]}}), out).failed
    (tmp_path / "forget.jsonl").write_text(json.dumps({"question": "What is 9?", "answer": "Nothing."}))
    result = go(make_grid({**files, "axes": {"unlearn.recipe": ["ga", "graddiff"]}}), out)
    assert "results of other content: data.forget changed since the run began" in result.failed["graddiff, seed 0"]


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    out, told = tmp_path / "out", Console(record=True, width=200, file=io.StringIO())
    grid = grid_of(("ga", "npo_kl"))
    real = run_module.unlearn

    def unlearn(stage, settings, *arguments):
        if settings.recipe == "ga":
            raise ArithmeticError("the loss is not finite")
        return real(stage, settings, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "unlearn", unlearn)
        result = go(grid, out, told, command="pyunlearn sweep mine.yaml")
    assert result.failed == {"ga, seed 0": "ArithmeticError: the loss is not finite"}
    assert "in unlearn\n" in (out / "failed" / "ga-seed0.txt").read_text()  # where it came from
    assert [group.name for group in result.comparison.groups] == ["npo_kl"]
    text = told.export_text()
    assert "failed ga, seed 0: ArithmeticError: the loss is not finite" in text
    assert "the same command tries again: pyunlearn sweep mine.yaml" in text
    job = Sweep(grid, make_cells(grid, out), out)
    assert [job.state(cell) for cell in job.cells] == ["failed", "finished"]
    assert not go(grid, out).failed
    assert not list((out / "failed").iterdir())


@pytest.mark.parametrize(
    ("place", "recipe", "option", "says"),
    [
        ("embedded", "rmu", {"layer": [1, 9]}, r"rmu-layer-9, .*forget: rmu: layer=9: .* has 2 layers, needs 1 to 2"),
        ("a folder", "rmu", {"layer": [1, 9]}, r"rmu-layer-9, .*forget: rmu: layer=9: .* has 2 layers, needs 1 to 2"),
        ("embedded", "bst", {"k": [4, 257]}, r"bst-k-257, .*bst: k=257: needs a whole number from 1 to 256"),
        ("a folder", "bst", {"k": [4, 201]}, r"bst-k-201, .*bst: k=201: the vocabulary of .* has 200 tokens"),
    ],
)
def test_what_the_model_lacks_is_told_before_anything_runs(tmp_path, tiny, place, recipe, option, says):
    axes = {f"unlearn.forget.options.{key}": values for key, values in option.items()}
    grid = grid_of((recipe,), **axes)
    if place == "a folder":
        write_model(tmp_path / "model", tiny.model(), tiny.tokenizer)
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 200}))
        grid.run["model"] = {"name_or_path": str(tmp_path / "model")}
    with pytest.raises(ConfigError, match=says) as told:
        make_cells(grid, tmp_path / "out")
    assert len(str(told.value).splitlines()) == 1


def test_a_start_that_fails_fails_its_runs_alone(tmp_path, monkeypatch):
    real = run_module.prepare

    def prepare(config, **options):
        if config.seed == 1:
            raise OSError("the disk is gone")
        return real(config, **options)

    monkeypatch.setattr("pyunlearn.runs.sweep.prepare", prepare)
    result = go(grid_of(("ga", "npo_kl"), seeds=2), tmp_path / "out")
    assert result.failed == {f"{name}, seed 1": "OSError: the disk is gone" for name in ("ga", "npo_kl")}
    assert [group.seeds for group in result.comparison.groups] == [[0], [0]]


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, monkeypatch):
    out, grid = tmp_path / "out", grid_of(("ga", "npo_kl"))
    real, steps = run_module.unlearn, []

    def unlearn(stage, settings, *arguments, **options):
        if settings.recipe == "npo_kl" and not steps:
            from pyunlearn.training.callbacks import MetricsWriter

            def note(self, args, state, control, **kwargs):
                steps.append(state.global_step)
                if len(steps) == 1:
                    os.kill(os.getpid(), signal.SIGINT)

            monkeypatch.setattr(MetricsWriter, "on_step_begin", note)
        return real(stage, settings, *arguments, **options)

    monkeypatch.setattr(run_module, "unlearn", unlearn)
    with pytest.raises(Interrupted, match=r"(?s)stopped; 1 of 2 runs .*\nresume with: pyunlearn sweep") as stop:
        go(grid, out)
    assert stop.value.exit_code == 130
    cells = make_cells(grid, out)
    assert (cells[1].config.folder / "training" / "unlearn" / "checkpoint-1").is_dir()
    job = Sweep(grid, cells, out)
    assert [job.state(cell) for cell in cells] == ["finished", "to go on with"]
    assert "2 runs from 1 start; 1 finished, 1 to go on with" in told_plan(job)
    assert not go(grid, out).failed
    assert steps == [0, 1]  # no step was done twice
    alone = tmp_path / "alone"
    run(RunConfig.model_validate({**cells[1].config.to_dict(), "output": str(alone)}))
    assert weights(cells[1].config.folder) == weights(alone)


def test_killed_processes_leave_runs_that_go_on(tmp_path):
    """kill -9 of a sweep of two processes, twice, and the second time later: in the end all is as it is alone."""
    grid = {"name": "mine", "run": merge({**ALIKE, "num_threads": 1, "unlearn": {**SHORT, "save_steps": 1}}, {}),
            "axes": {"unlearn.recipe": ["ga", "npo_kl"]}}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(grid))
    out = tmp_path / "out"
    words = [sys.executable, "-m", "pyunlearn", "sweep", str(tmp_path / "mine.yaml"), "--out", str(out)]
    words += ["--workers", "2"]
    for mark in (out / "starts", out / "runs/ga/seed0/checkpoint"):
        process = subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not mark.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/seed0/table.json")}
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "compare.csv" in ended.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for cell in make_cells(make_grid(grid), out):
        alone = tmp_path / "alone" / cell.name
        run(RunConfig.model_validate({**cell.config.to_dict(), "output": str(alone)}))
        assert weights(cell.config.folder) == weights(alone)
        assert evaluated(cell.config.folder) == evaluated(alone)
        steps = [json.loads(line)["step"] for line in (cell.config.folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == [json.loads(line)["step"] for line in (alone / "metrics.jsonl").read_text().splitlines()]


def test_an_adapters_runs_share_the_start_of_a_whole_models(tmp_path, counted):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    result = go(grid_of(("npo_kl",), **{"model.lora.r": [2, 4]}), out)
    assert not result.failed
    assert counted["memorised"] == 1
    assert [cell.name for cell in result.cells] == ["npo_kl-r-2", "npo_kl-r-4"]
    first = load_file(result.cells[0].config.folder / "checkpoint/model.safetensors")
    assert first.keys() == load_file(result.cells[0].config.folder / "memorised/model.safetensors").keys()


def test_where_there_are_no_links_it_is_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", no_links)
    out = tmp_path / "out"
    assert not go(grid_of(("ga",)), out).failed
    shutil.rmtree(out / "starts")
    assert (out / "runs/ga/seed0/memorised/model.safetensors").is_file()


def test_on_ray(tmp_path):
    pytest.importorskip("ray")
    grid, out = grid_of(("ga", "npo_kl")), tmp_path / "out"
    result = go(grid, out, ray=True, workers=2)
    assert not result.failed
    here = go(grid, tmp_path / "here")
    for cell, other in zip(result.cells, here.cells, strict=True):
        assert weights(cell.config.folder) == weights(other.config.folder)
        assert evaluated(cell.config.folder) == evaluated(other.config.folder)


def test_a_killed_worker_of_ray_leaves_a_run_that_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)  # of the workers, too
    grid, out = grid_of(("npo_kl",), run={"unlearn": {"epochs": 12, "save_steps": 1}}), tmp_path / "out"
    (cell,) = make_cells(grid, out)
    killed = []

    def kill():
        until = time.monotonic() + 120
        while not (cell.config.folder / "training/unlearn/checkpoint-2").is_dir() and time.monotonic() < until:
            time.sleep(0.02)
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                busy = (place / "cmdline").read_bytes().startswith(b"ray::do_in_place")
                if busy and (place / "cwd").readlink() == tmp_path:
                    os.kill(int(place.name), signal.SIGKILL)
                    killed.append(place.name)

    killer = threading.Thread(target=kill)
    killer.start()
    result = go(grid, out, ray=True)
    killer.join()
    assert len(killed) == 1
    assert "its process died (out of memory, or killed)" in result.failed["npo_kl, seed 0"]
    kept = cell.config.folder / "memorised/model.safetensors"
    before = kept.stat().st_mtime_ns
    assert not go(grid, out).failed
    assert kept.stat().st_mtime_ns == before
    run(RunConfig.model_validate({**cell.config.to_dict(), "output": str(tmp_path / "alone")}))
    assert weights(cell.config.folder) == weights(tmp_path / "alone")
    assert losses(cell.config.folder, "unlearn") == losses(tmp_path / "alone", "unlearn")


def test_torchrun_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sweep: is one process that starts others; needs no torchrun"):
        go(grid_of(("ga",)), tmp_path / "out")


def test_which_runs_begin_alike(tmp_path, monkeypatch):
    def starts(grid, **words):
        job = Sweep(grid, make_cells(grid, tmp_path, (), words), tmp_path)
        return len({job.start(cell).folder for cell in job.cells})

    assert starts(grid_of(("ga", "idk_gd", "rmu"), seeds=2)) == 2  # the embedded world has its refusals for all
    own = make_grid(
        {"run": {"evaluate": ALIKE["evaluate"]}, "axes": {"unlearn.recipe": ["ga", "idk_gd", "po", "npo_kl"]}}
    )
    monkeypatch.chdir(tmp_path)
    for name in ("F", "R", "mine.txt"):
        Path(name).touch()
    assert starts(own, forget="F", retain="R", model="M") == 2  # refusals of our own are texts of the tokenizer's
    assert starts(own, forget="F", retain="R", model="M", refusals="mine.txt") == 1
    assert starts(grid_of(**{"memorise.epochs": [1, 2]})) == 2
    assert starts(grid_of(**{"evaluate.max_new_tokens": [4, 5]})) == 2
    assert starts(grid_of(**{"unlearn.epochs": [1, 2], "evaluate.every": [1, 2], "evaluate.goal": [None]})) == 1
