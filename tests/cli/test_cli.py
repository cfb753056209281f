from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.text import Text
from typer.testing import CliRunner

import pyunlearn
from pyunlearn import objectives, recipes
from pyunlearn.cli import app
from pyunlearn.cli.shared import command_line
from pyunlearn.metrics import METRICS
from pyunlearn.store import Store
from pyunlearn.training.callbacks import MetricsWriter

TINY = {
    "num_threads": 1,
    "model": {
        "options": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 384,
        }
    },
    "data": {"num_authors": 4, "questions_per_author": 2, "forget_fraction": 0.25, "num_unknown": 0},
    "memorise": {"epochs": 1, "batch_size": 4},
    "unlearn": {"forget": "wga", "retain": "kl", "epochs": 4, "batch_size": 2},
    "evaluate": {"rouge_samples": 1, "max_new_tokens": 4},
}  # fmt: skip


@pytest.fixture
def call(tmp_path, monkeypatch):
    """`call("run", "tiny.yaml")` in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "name": "tiny"}))

    def invoke(*arguments):
        monkeypatch.setattr("sys.argv", ["pyunlearn", *arguments])
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_version_and_help(call):
    assert call("--version") == (0, f"pyunlearn {pyunlearn.__version__}\n", "")
    code, text, _ = call("--help")
    assert code == 0
    for command in ("run", "init", "score", "geffect", "evaluate", "calibrate", "compare", "reliability", "sweep",
                    "export", "bench", "metrics", "objectives", "recipes", "doctor"):  # fmt: skip
        assert re.search(rf"^\W*{command} ", text, re.MULTILINE), command
    code, text, _ = call("run", "--help")
    assert code == 0
    for word in ("--set", "--resume", "--overwrite", "--retrain", "Examples", "pyunlearn run --resume"):
        assert word in text


COMMANDS = [("run",), ("init",), ("score",), ("geffect",), ("evaluate",), ("calibrate", "uwc"), ("calibrate", "cru"),
            ("compare",), ("reliability",), ("sweep",), ("export",), ("recipes",)]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_examples_stand_in_80_columns_as_they_are_written(call, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"pyunlearn.cli.{command[0]}")
    own = {"uwc": "UWC_EXAMPLES", "cru": "CRU_EXAMPLES"}.get(command[-1], "EXAMPLES")
    text = call(*command, "--help")[1]
    shown = [line.strip() for line in text.partition("Examples")[2].splitlines() if line.strip()]
    written = Text.from_markup(getattr(module, own)).plain.splitlines()[1:]
    assert shown == [line.strip() for line in written if line.strip()]
    assert all(len(line) < 80 for line in written)


def test_recipes_lists_every_one_and_shows_one_whole(call):
    code, text, _ = call("recipes")
    assert code == 0
    for name in recipes.names():
        assert re.search(rf"\W{name}\W", text), name
    assert re.search(r"\Wcga\W+ga\W+mrd, one an\W+", text)
    assert re.search(r"\Wzephyr-7b-beta-wmdp\W+bss, bst, graddiff, npo, rmu_rr\W", text)
    code, text, _ = call("recipes", "wga_kl")
    command, _, rest = text.partition("\n")
    assert (code, command.partition(" --")[0]) == (0, "# pyunlearn run recipe:wga_kl")
    assert yaml.safe_load(rest) == recipes.read("wga_kl")._asdict()
    assert "*" not in rest  # every value is written out
    code, text, _ = call("recipes", "wga_kl+mrd@phi-1.5-forget10")
    shown = yaml.safe_load(text)
    assert (shown["source"], shown["unlearn"]["sampling"]) == ("arXiv:2502.19301, Section 5", {"by": "mrd"})
    assert shown["unlearn"] == recipes.recipe("wga_kl+mrd@phi-1.5-forget10")
    code, text, _ = call("recipes", "undial@llama-2-7b-lora")
    assert yaml.safe_load(text)["model"] == {"lora": {"r": 8, "alpha": 16}}
    code, text, _ = call("recipes", "refuse+mrd")
    assert yaml.safe_load(text)["published"] == "none: its sources give no settings for a model and a data set"
    code, _, error = call("recipes", "wga_lk")
    assert (code, "did you mean wga_kl" in error) == (2, True)
    code, _, error = call("run", "recipe:npo_lk")
    assert (code, "'npo_lk': did you mean npo_kl" in error) == (2, True)


def test_a_sweep_is_planned_run_and_compared(call, tmp_path):
    grid = {"name": "small", "run": {**TINY, "num_threads": 1}, "axes": {"unlearn.recipe": ["ga", "npo_kl"]}}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    code, text, _ = call("sweep", "grid.yaml", "--plan")
    assert (code, Path("runs").exists()) == (0, False)
    assert "small: 2 runs from 1 start; 2 to run; in runs/small" in text
    code, text, _ = call("sweep", "grid.yaml")
    assert code == 0
    assert re.search(r"done npo_kl, seed 0: forget probability 0\.\d+ -> 0\.\d+, holdout probability", text)
    assert re.search(r"\Wnpo_kl\W+1\W+there was nothing to forget\W+0\.\d+", text)
    assert "runs/small/compare.csv" in text
    code, text, _ = call("sweep", "grid.yaml", "--plan")
    assert "2 runs from 1 start; 2 finished" in text
    for words, told in (
        (["--set", "unlearn.epochs=-1"], "ga, seed 0 and 1 more: unlearn.epochs: needs a number above 0, got -1"),
        (["--set", "unlearn.recipe=ga"], "unlearn.recipe is an axis of the grid"),
        (["--set", "unlearn.epochs=9"], "was begun with other settings (unlearn.epochs: 4"),
    ):
        code, _, error = call("sweep", "grid.yaml", *words)
        assert (code, told in error) == (2, True), error
    assert call("sweep", "grid:uwcc")[0] == 2
    code, _, error = call("sweep", "grid.yaml", "--out", "another", "--set", "unlearn.train_only=nothing")
    assert (code, "ga, seed 0 and 1 more: unlearn.train_only=" in error) == (2, True), error
    code, text, _ = call("sweep", "grid.yaml", "--out", "another", "--set", "unlearn.learning_rate=1e30")
    assert (code, "failed ga, seed 0: " in text) == (1, True)


def test_objectives_lists_every_one(call):
    code, text, _ = call("objectives")
    assert code == 0
    for name in objectives.names():
        assert re.search(rf"\W{name}\W", text), name
    assert re.search(r"\Wwtnpo\W+g_effect_code\W+beta = 4.0, epsilon = 1e-05; reduction =\W+token_mean\W", text)
    assert re.search(r"\Wap\W+paper\W+reduction = sequence_mean\W", text)


def test_metrics_lists_every_one(call):
    code, text, _ = call("metrics")
    assert "verbmem/forget {prompt, gt}" in text  # what a benchmark's folder holds
    assert code == 0
    for name, metric in METRICS.items():
        assert re.search(rf"^\W*{name}\W", text, re.MULTILINE), name
        assert all(f"{option} = {default}" in text for option, default in metric.options.items())
    assert re.search(r"cosine_similarity\W+max\(0, cosine\).*embedder, \(before\)", text)


def test_a_run_then_an_evaluation_of_its_model(call, tmp_path):
    code, text, _ = call("run", "tiny.yaml")
    assert code == 1  # a goal was missed
    assert "verdict: there was nothing to forget" in text
    assert re.search(r"forget\W+probability\W+0\.\d{4}", text)
    assert "forget probability" in text
    assert "runs/tiny/report.html" in text
    assert text.count("  pyunlearn ") == 4  # what to try next
    assert "  pyunlearn run tiny.yaml --set memorise.learning_rate=0.006 --out runs/tiny-2   # " in text
    assert "  pyunlearn run tiny.yaml --retrain --resume " in text
    assert call("run", "tiny.yaml", "--set", "evaluate.goal=null", "--set", "name=unasked")[0] == 0
    data = tmp_path / "questions.jsonl"
    data.write_text((tmp_path / "runs/tiny/evaluation/after-forget.jsonl").read_text())
    out = tmp_path / "records.jsonl"
    code, text, _ = call(
        "evaluate",
        "--model",
        "runs/tiny/checkpoint",
        "--data",
        str(data),
        "--rouge-samples",
        "0",
        "--out",
        str(out),
    )
    assert code == 0
    again = call("evaluate", "--model", "runs/tiny/checkpoint", "--data", str(data), "--rouge-samples", "0",
                 "--variant", "open_unlearning", "--out", "theirs.jsonl")  # fmt: skip
    assert again[0] == 0
    theirs = [json.loads(line) for line in Path("theirs.jsonl").read_text().splitlines()]
    for record in theirs:  # the last token does not count
        hits = record["memorization_accuracy"] * (record["num_tokens"] - 1)
        assert hits == pytest.approx(round(hits), abs=1e-9)
    probability = float(re.search(r"probability\W+(0\.\d+)", text)[1])
    summary = json.loads((tmp_path / "runs/tiny/evaluation/after.json").read_text())["forget"]
    assert probability == pytest.approx(summary["probability"], abs=1e-4)
    assert "rouge_l" not in text
    assert not any("generated" in record for record in theirs)  # nothing is written
    code, _, errors = call("evaluate", "--model", "runs/tiny/checkpoint", "--data", str(data), "--metric", "fluency",
                           "--rouge-samples", "0")  # fmt: skip
    assert (code, "writes nothing, and fluency is of written answers" in errors) == (2, True)
    code, text, _ = call(
        "evaluate", "--model", "runs/tiny/checkpoint", "--data", str(data), "--metric", "fluency", "--metric",
        "token_entropy", "--rouge-samples", "1",
    )  # fmt: skip
    assert code == 0
    assert re.findall(r"(\w+)\W+\d\.\d{4}", text) == ["fluency", "token_entropy"]
    assert re.search(r"fluency [│ ]*\d\.\d{4} [│ ]*1 ", text)  # one sample, which has no interval
    code, text, _ = call("evaluate", "--model", "runs/tiny/checkpoint", "--data", str(data), "--metric", "probability")
    low, high = map(float, re.search(r"probability\W+0\.\d{4} │ (0\.\d{4}) to (0\.\d{4}) │ \d+ ", text).groups())
    assert low <= probability <= high
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["question"] for record in records] == [json.loads(line)["question"] for line in data.open()]


def test_ctrl_c_exits_with_130_and_resume_finishes(call, monkeypatch, tmp_path):
    original = MetricsWriter.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs, **kwargs)
        if self.stage == "unlearn" and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "on_log", on_log)
        code, _, errors = call("run", "tiny.yaml", "--set", "seed=3")
    assert code == 130
    assert "stopped in unlearn at step 2 of 4, checkpoint saved" in errors
    assert "resume with: pyunlearn run tiny.yaml --set seed=3 --resume\n" in errors
    assert "Traceback" not in errors
    code, text, _ = call("run", "tiny.yaml", "--set", "seed=3", "--resume")
    assert code == 1  # its goals are missed
    assert "evaluate before" not in text
    assert (tmp_path / "runs/tiny/report.html").is_file()


def test_a_score_stopped_and_continued(call, monkeypatch, tmp_path):
    put = Store.put

    def stop(*arguments):
        value = put(*arguments)
        os.kill(os.getpid(), signal.SIGINT)
        return value

    arguments = ["score", "tiny.yaml", "--num-draws", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", stop)
        code, _, errors = call(*arguments, "--overwrite")
    assert code == 130
    assert "resume with: pyunlearn score tiny.yaml --num-draws 3\n" in errors
    assert "Traceback" not in errors
    assert len(list((tmp_path / "runs/tiny/scores.state").glob("*.safetensors"))) == 1
    code, text, _ = call(*arguments)
    assert code == 0
    assert "so that there is something to forget" not in text
    assert "algorithm1 of 2 samples, " in text
    assert "twice the sigma gives" in text
    assert len((tmp_path / "runs/tiny/scores.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "runs/tiny/scores.html").is_file()
    model, data = "runs/tiny/memorised", "runs/tiny/scores.jsonl"
    code, text, _ = call("score", "--model", model, "--data", data, "--estimator", "gradient", "--limit", "1")
    assert code == 0
    assert "gradient of 1 sample, " in text
    assert "try next\n  pyunlearn run --model runs/tiny/memorised --forget runs/tiny/scores.jsonl" in text
    for typed, told in (
        (("--estimator", "gradient", "--num-draws", "7"), "--num-draws 7: --estimator gradient draws no noise; leave"),
        (("--num-draws", "1"), "--num-draws 1: needs 2 at least, for a standard error"),
        (("--sigma", "-1"), "--sigma -1.0: needs a finite number > 0"),
        (("--estimator", "gradien"), "--estimator gradien: did you mean gradient"),
    ):
        code, _, errors = call("score", "--model", model, "--data", data, *typed)
        assert code == 2
        assert told in " ".join(errors.split())
    assert (tmp_path / "scores.html").is_file()


def test_a_g_effect_along_a_run(call, tmp_path):
    code, text, _ = call("geffect", "--help")
    assert code == 0
    for word in (
        "dot product of their gradients",
        "writes RUN/geffect",
        "--pointwise",
        "unlearn.keep_steps=5",
        "goes on",
    ):
        assert word in " ".join(text.split()), word
    code, _, errors = call("run", "tiny.yaml", "--set", "unlearn.keep_steps=2", "--set", "geffect.every=4")
    assert code == 1, errors  # its goals are missed
    code, text, _ = call("geffect", "runs/tiny", "--forget-samples", "1")
    assert code == 0
    assert "G-effect of the whole objective" in text
    assert re.findall(r"^\W+(\d+) \W", text, re.MULTILINE) == ["0", "2", "4"]
    stored = json.loads((tmp_path / "runs/tiny/geffect/geffect.json").read_text())
    assert stored["settings"]["forget_samples"] == 1
    assert "numbers runs/tiny/geffect/geffect.json" in text
    for words in ("unlearning (wanted < 0)", "retaining (wanted >= 0)", "forget NLL, nats a token", "The objective "):
        assert words in " ".join(text.split())
    assert "try next" in text
    assert "pyunlearn compare runs/tiny OTHER_RUN" in text
    last = stored["rows"][-1]["geffect"]["total"]["retain"]
    assert ("still costs retained rows" in text) == (last < 0)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["run"], "pyunlearn run"),
        (["run", "--overwrite", "a b.yaml", "-s", "unlearn.retain=[kl, gd]", "--resume"],
         "pyunlearn run 'a b.yaml' -s 'unlearn.retain=[kl, gd]'"),
        (["score", "--limit", "3", "--overwrite"], "pyunlearn score --limit 3"),
    ],
)  # fmt: skip
def test_the_command_is_as_typed_and_quoted_and_leaves_out_what_throws_work_away(monkeypatch, typed, line):
    monkeypatch.setattr("sys.argv", ["/anywhere/pyunlearn", *typed])
    assert command_line() == line


@pytest.mark.parametrize("module", ["pyunlearn", "pyunlearn.cli"])
def test_as_a_module(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"pyunlearn {pyunlearn.__version__}\n"), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.yaml"], "configuration 'missing.yaml': no such file"),
        (["run", "--set", "unlearn.forget=wag"], "objective='wag': did you mean wga? needs one of ga,"),
        (["run", "--set", "unlearn.learnin_rate=1"], "did you mean learning_rate?"),
        (["run", "tiny.yaml", "--resume"], "--resume: there is no run in runs/tiny; leave --resume out, and it begins"),
        (["run", "tiny.yaml", "--resume", "--overwrite"], "--resume goes on with a run and --overwrite begins it anew"),
        (["run", "tiny.yaml", "--set", "model.name_or_path=./nowhere"], "options=['hidden_size',"),
        (
            ["run", "--set", "model.name_or_path=./nowhere", "--set", "data.num_authors=3"],
            "no such folder: ./nowhere",
        ),
        (["evaluate", "--model", "./nowhere", "--data", "missing.jsonl"], "no such file: missing.jsonl"),
        (["evaluate", "--model", "./nowhere", "--data", "one.jsonl"], "no such folder: ./nowhere"),
        (
            ["evaluate", "--model", "x", "--data", "one.jsonl", "--variant", "sufix"],
            "variant='sufix': did you mean suffix?",
        ),
        (
            ["evaluate", "--model", "x", "--data", "one.jsonl", "--metric", "rouge"],
            "metric='rouge': did you mean rouge_l or rouge_1?",
        ),
        (
            ["evaluate", "--model", "x", "--data", "one.jsonl", "--metric", "cosine_similarity"],
            "cosine_similarity needs evaluate.embedder",
        ),
        (
            ["evaluate", "--model", "x", "--data", "one.jsonl", "--judge", "http://h/v1"],
            "--judge and --judge-model go together",
        ),
        (["score", "--model", "./nowhere", "--data", "one.jsonl"], "no such folder: ./nowhere"),
        (["calibrate", "uwc", "nowhere"], "RUN: no such folder: nowhere"),
        (["calibrate", "cru", ".", "--component", "layers"], "did you mean layer"),
        (["reliability", "nowhere"], "RUN: no such folder: nowhere"),
        (["geffect", "nowhere"], "RUN: no such folder: nowhere"),
        (["geffect", "."], "RUN='.': is not a run folder (no config.yaml); make one with pyunlearn run"),
        (["run", "--set", "geffect.every=0"], "geffect.every: needs 1 at least, got 0"),
        (["run", "--set", "geffect.evry=1"], "did you mean every?"),
        (
            ["score", "tiny.yaml", "--estimator", "newton"],
            "did you mean definition? needs one of algorithm1, definition,",
        ),
        (["score", "tiny.yaml", "--estimator", "algoritm1"], "did you mean algorithm1? needs one of algorithm1,"),
        (["score", "tiny.yaml", "--labels", "everything"], "--labels everything: needs one of answers, all"),
        (["score", "tiny.yaml", "--sigma", "0"], "--sigma 0.0: needs a finite number > 0"),
        (["score", "tiny.yaml", "--num-draws", "1"], "--num-draws 1: needs 2 at least"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(call, tmp_path, arguments, message):
    (tmp_path / "one.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    code, _, errors = call(*arguments)
    assert code == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    with pytest.raises((ValueError, OSError)):
        call(*arguments, "--debug")


def test_a_folder_of_another_run_is_told_and_overwritten_on_demand(call):
    assert call("run", "tiny.yaml")[0] == 1
    code, _, errors = call("run", "tiny.yaml", "--set", "seed=1")
    assert code == 2
    assert "another configuration (seed: 0 -> 1); choose --out FOLDER or --overwrite" in errors
    assert call("run", "tiny.yaml", "--set", "seed=1", "--overwrite")[0] == 1
