"""A model and a file in one line, what is missing from it, and the ways from there: resume, init, export, bench."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import pyunlearn as pu
from pyunlearn.model.load import load_model
from pyunlearn.runs import RunConfig, load_config
from pyunlearn.runs.request import run_config

from .test_cli import call  # noqa: F401 (fixture)

SHORT = ["unlearn.max_steps=1", "evaluate.rouge_samples=1", "evaluate.max_new_tokens=4", "num_threads=1"]
QUICK = [word for change in SHORT for word in ("--set", change)]


@pytest.fixture(scope="module")
def model_folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def files(tiny, tmp_path):
    """F.jsonl and R.jsonl in the working folder."""
    for name, items in (("F", tiny.world.forget), ("R", tiny.world.retain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item.to_json()) + "\n" for item in items))


def test_a_model_and_files_in_one_line(call, files, model_folder):  # noqa: F811
    words = ["--model", model_folder, "--forget", "F.jsonl", "--retain", "R.jsonl", "--recipe", "npo", *QUICK]
    code, text, errors = call("run", *words, "--strict")
    assert code == 3, errors  # nothing to forget, which is a goal missed
    run = Path("runs/F-npo")
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["memorise"] is None
    assert [term["name"] for term in written["unlearn"]["forget"] + written["unlearn"]["retain"]] == ["npo", "gd"]
    assert (run / "checkpoint" / "model.safetensors").is_file()
    assert not (run / "memorised").exists()
    again = f"run --model {model_folder} --forget F.jsonl --retain R.jsonl --recipe npo "
    assert re.search(rf"  pyunlearn {again}.* --strict --set memorise.epochs=5 --out runs/F-npo-2   # ", text)
    (run / "report.html").unlink()
    assert call("run", "--resume", str(run))[0] == 1
    assert (run / "report.html").is_file()  # by the folder alone
    code, _, errors = call("run", str(run))
    assert (code, "holds an unfinished run" in errors or "holds a finished run" in errors) == (2, True)

    # what measures takes the same words, and the run's folder for its model
    code, text, _ = call("evaluate", str(run), "--forget", "F.jsonl", "--metric", "probability")
    assert code == 0
    assert "prompt: chat, as in its run" in text
    assert f"pyunlearn compare {run} OTHER_RUN" in text
    assert call("evaluate", "F.jsonl", "--model", str(run / "checkpoint"), "--metric", "probability")[0] == 0
    words = ["--model", str(run / "checkpoint"), "--estimator", "gradient", "--out", "s.jsonl"]
    assert call("score", "F.jsonl", *words)[0] == 0
    assert len(Path("s.jsonl").read_text().splitlines()) == 8

    # and it can be given away
    code, text, errors = call("export", str(run), "--out", "given")
    assert code == 0, errors
    theirs, ours = load_model("given")[0], load_model(str(run / "checkpoint"))[0]
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    card = Path("given/README.md").read_text()
    keys = yaml.safe_load(card.split("---")[1])
    assert keys == {"library_name": "transformers", "tags": ["unlearning", "pyunlearn"]}
    assert "There was nothing to forget" in card
    assert (run / "table.md").read_text().strip() in card
    assert "8 forget" in card
    code, _, errors = call("export", str(run), "--out", "given")
    assert (code, "given: is there already" in errors) == (2, True)
    code, _, errors = call("export", str(run), "--out", "new", "--push", "nobody")
    assert (code, "--push=nobody: needs OWNER/NAME" in errors, Path("new").exists()) == (2, True, False)
    assert call("export", "F.jsonl", "--out", "new")[0] == 2


def test_an_export_is_pushed(call, monkeypatch, tmp_path):  # noqa: F811
    import huggingface_hub

    did = []

    class Hub:
        def create_repo(self, name, **options):
            did.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            did.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert call("run", "tiny.yaml")[0] == 1

    def unreachable(self, name, **options):
        raise RuntimeError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "create_repo", unreachable)
        code, _, errors = call("export", "runs/tiny", "--out", "given", "--push", "me/forgetful")
        assert (code, "--push=me/forgetful: the Hub cannot be reached" in errors) == (2, True)
        assert not Path("given").exists()
    assert call("export", "runs/tiny", "--out", "given")[0] == 0  # and what is there already is pushed
    code, text, _ = call("export", "runs/tiny", "--out", "given", "--push", "me/forgetful")
    assert code == 0
    assert "https://hub/me/forgetful" in text
    assert did[0] == ("me/forgetful", {"private": True, "exist_ok": True})
    assert "Question: QUESTION\nAnswer:" in Path("given/README.md").read_text()
    assert {"README.md", "model.safetensors", "tokenizer.json", "config.json"} <= {*did[1][1]}


def test_without_rows_to_retain(call, files, model_folder):  # noqa: F811
    code, text, errors = call("run", "F.jsonl", "--model", model_folder, "--recipe", "npo", *QUICK,
                              "--set", "evaluate.goal.forget_probability_below=1e-9")  # fmt: skip
    assert code == 1, errors
    written = yaml.safe_load(Path("runs/F-npo/config.yaml").read_text())
    assert written["unlearn"]["retain"] == []  # the recipe has gd
    assert "retain" not in json.loads(Path("runs/F-npo/evaluation/after.json").read_text())
    page = Path("runs/F-npo/report.html").read_text()
    assert "no rows to retain" in page
    assert "no rows to retain" in text
    code, _, errors = call("run", "F.jsonl", "--model", model_folder, "--set", "unlearn.retain=gd")
    assert (code, "unlearn.retain=['gd']: needs rows to retain: set data.retain=FILE" in errors) == (2, True)
    code, _, errors = call("run", "F.jsonl", "--model", model_folder, "--set", "geffect.every=1")
    assert (code, "geffect: is measured on what is forgotten and what is retained" in errors) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("run F.jsonl", ["F.jsonl: is to be forgotten, and by which model?",
                         "  pyunlearn run --model MODEL --forget F.jsonl --retain RETAIN.jsonl",
                         "embedded is a small"]),
        ("run --model ./m", ["needs --forget, too",
                             "  pyunlearn run --model ./m --forget FORGET.jsonl --retain RETAIN.jsonl"]),
        ("run --retain R.jsonl", ["needs --forget, too"]),
        ("run F.jsonl --forget R.jsonl", ["--forget=R.jsonl: what to forget is F.jsonl already"]),
        ("run recipe:npo --recipe ga", ["--recipe=ga: the recipe is recipe:npo already"]),
        ("run recipe:npp", ["unlearn.recipe='npp': did you mean npo"]),
        ("run npo", ["npo: no such file or folder; a recipe is asked for by recipe:npo"]),
        ("run G.jsonl", ["G.jsonl: no such file or folder; did you mean "]),
        ("run tiny.yaml --columns question=a", ["--columns=question=a: goes with --forget and --retain"]),
        ("run F.jsonl --model m --set data.forget=R.jsonl", ["--set data.forget=R.jsonl: both are data.forget"]),
        ("run F.jsonl --model m --out a --set output=b", ["--out=a and --set output=b: both are output"]),
        ("run recipe:", ["--recipe: is empty"]),
        ("run --gguf-file m.gguf", ["--gguf-file: needs --forget, too"]),
        ("run tiny.yaml --lora --set model.lora=null", ["--lora: and model.lora=null"]),
        ("run --set data.forget=F.jsonl --set evaluate.anchors=[retrained]",
         ["evaluate.anchors=[retrained]: there is nothing to train on but what is to be forgotten"]),
        ("evaluate recipe:npo --model m", ["recipe:npo: is a recipe, of which there is nothing to measure"]),
        ("run m", ["m: is a model; what is it to forget?", "--model m --forget FORGET.jsonl"]),
        ("run --set unlearn.lr=1", ["unlearn.lr: unknown key; did you mean learning_rate?"]),
        ("run --set report_to=wandb", ["report_to: unknown key; did you mean memorise.report_to or "]),
        ("run --set unlearn.output_dir=x", ["unlearn.output_dir: unknown key; did you mean output?"]),
        ("run --set unlearn.forget=GA", ["did you mean ga or wga?"]),
        ("run --set model.dtype=bf16", ["did you mean bfloat16"]),
        ("run --set unlearn.forget=null", ["unlearn: forget=[]: needs an objective"]),
        ("run --set data.retain=R.jsonl", ["data: retain: needs data.forget too"]),
        ("score F.jsonl", ["--model: which model?", "  pyunlearn score --model MODEL --data F.jsonl"]),
        ("score m", ["--data: which questions and answers?", "  pyunlearn score --model m --data FILE.jsonl"]),
        ("score --limit 3", ["--limit: of --model and --data, which are not given"]),
        ("score F.jsonl --model m --set seed=1", ["--set seed=1: goes with a run's configuration"]),
        ("score tiny.yaml --model m", ["tiny.yaml: is a configuration, which is given already or does not go with"]),
        ("evaluate", ["--model: which model?", "  pyunlearn evaluate --model MODEL --data FILE.jsonl"]),
        ("evaluate tiny.yaml --data F.jsonl", ["tiny.yaml: is a configuration"]),
        ("geffect", ["Missing argument 'RUN'"]),
        ("init tiny.yaml", ["tiny.yaml: is there already"]),
        ("init --forget F.jsonl", ["and by which model?"]),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_told(call, files, words, told):  # noqa: F811
    Path("m").mkdir()
    Path("m/config.json").write_text("{}")
    code, _, errors = call(*words.split())
    assert code == 2
    for part in told:
        assert part in errors
    assert "Traceback" not in errors


def test_words_are_laid_under_what_a_file_says(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {name_or_path: m, lora: {r: 4}}\ndata: {forget: a, retain: b}\n")
    assert run_config(str(tmp_path / "own.yaml"), lora=True).model.lora.r == 4
    config = run_config(None, model="m", forget="a", retain="b", columns="question=q,answer=w", lora=True)
    assert config.data.forget.columns == config.data.retain.columns == {"question": "q", "answer": "w"}
    assert config.model.lora.r == 8


def test_a_run_is_evaluated_in_its_own_prompt(call, files, model_folder):  # noqa: F811
    code, _, errors = call("run", "F.jsonl", "--model", model_folder, "--recipe", "npo", "--prompt", "plain", *QUICK)
    assert code == 1, errors
    for words in (["runs/F-npo"], ["--model", "runs/F-npo/checkpoint"]):
        code, text, _ = call("evaluate", *words, "--data", "F.jsonl", "--metric", "probability", "--out", "after.jsonl")
        assert (code, "as in its run" in text) == (0, True)
        records = [json.loads(line) for line in Path("after.jsonl").read_text().splitlines()]
        run = [json.loads(line) for line in Path("runs/F-npo/evaluation/after-forget.jsonl").read_text().splitlines()]
        assert [row["nll"] for row in records] == pytest.approx([row["nll"] for row in run], rel=1e-5)
    code, _, errors = call("evaluate", "runs/F-npo")
    assert (code, "--data: which questions and answers?" in errors, "--model runs/F-npo/checkpoint" in errors) == (
        2, True, True,
    )  # fmt: skip
    code, _, errors = call("geffect", "runs/F-npo")
    assert (code, "has no rows to retain" in errors) == (2, True)
    code, text, errors = call("compare", "runs/F-npo", "--out", "compared")
    assert code == 0, errors
    assert "what they cost was not measured" in Path("compared/compare.html").read_text()


def test_a_mistyped_command_meets_a_near_one(call):  # noqa: F811
    code, _, errors = call("comapre")
    assert (code, "Did you mean" in errors, "compare" in errors) == (2, True, True)


def test_null_is_no_retain_term(call):  # noqa: F811
    assert load_config(None, ["unlearn.retain=null"]).unlearn.retain == []


def test_files_are_the_source_where_there_are_any():
    config = load_config(None, ["data.forget=a.jsonl", "data.retain=b.jsonl"])
    assert config.data.source == "files"
    assert [term.name for term in config.unlearn.forget] == ["idk", "dpo"]


def test_paths_are_taken_as_they_are():
    config = run_config(None, model="2024", forget="1e5", retain="a: b.jsonl", out="[x]")
    assert (config.model.name_or_path, config.data.forget.path, config.output) == ("2024", "1e5", "[x]")
    assert (config.data.retain.path, config.name) == ("a: b.jsonl", "1e5")
    assert run_config(None, ["data.forget.limit=3"], model="m", forget="f.jsonl").data.forget.limit == 3


def test_every_recipe_on_the_embedded_demo_has_a_folder_of_its_own():
    assert [run_config(source).name for source in (None, "recipe:bst", "recipe:npo+mrd")] == [
        "demo", "demo-bst", "demo-npo_mrd",
    ]  # fmt: skip
    assert run_config(recipe="flat").name == "demo-flat"
    assert run_config("recipe:bst", ["name=mine"]).name == "mine"


def test_a_written_configuration_is_whole_and_reads_as_what_was_asked(call, files, model_folder):  # noqa: F811
    code, text, errors = call("init", "mine.yaml", "--model", model_folder, "--forget", "F.jsonl", "--recipe", "npo",
                              "--set", "unlearn.learning_rate=3e-5", "--set", "seed=3")  # fmt: skip
    assert code == 0, errors
    assert "next: pyunlearn run mine.yaml" in text
    asked = run_config(
        None, ["unlearn.learning_rate=3e-5", "seed=3"], recipe="npo", model=model_folder, forget="F.jsonl"
    )
    assert load_config("mine.yaml").to_dict() == asked.to_dict()
    lines = Path("mine.yaml").read_text().splitlines()
    for name in ("max_steps", "gguf_file", "refusals", "every", "sampling", "geffect", "memorise"):
        assert any(re.match(rf" *# {name}:", line) for line in lines), name
    # every key may be had by taking the mark away
    bare = [re.sub(r"^( *)# (?=\w+:)", r"\1", line) for line in lines if re.match(r" *(# )?\w+:", line)]
    everything = yaml.safe_load("\n".join(bare))
    assert everything.keys() == RunConfig.model_fields.keys()
    assert RunConfig.model_validate(everything).to_dict() == asked.to_dict()


def test_help_imports_no_torch():
    program = "import sys; from pyunlearn.cli import app\ntry: app(['run', '--help'])\nexcept SystemExit: pass\n" \
        "print(sorted({'torch', 'transformers', 'numpy', 'scipy', 'matplotlib'} & sys.modules.keys()))"  # fmt: skip
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--forget" in told
    assert told.splitlines()[-1] == "[]"


def test_names_are_imported_when_they_are_asked_for():
    import pyunlearn.mrd as module

    assert callable(pu.mrd)
    assert pu.mrd is sys.modules["pyunlearn.mrd"].mrd
    assert module is pu.mrd
    assert {*pu.__all__} <= {*dir(pu)}
    for name in pu.__all__:
        assert getattr(pu, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'npo'"):
        pu.npo  # noqa: B018
    with mock.patch.object(pu, "mrd", len):
        assert pu.mrd is len
    assert pu.mrd is sys.modules["pyunlearn.mrd"].mrd


def test_benchmarks_are_a_command(call, capsys):  # noqa: F811
    code, text, _ = call("bench", "--help")
    assert code == 0
    assert text.startswith("usage: pyunlearn bench")
    code, _, errors = call("bench", "evidenc")
    assert (code, "did you mean evidence?" in errors) == (2, True)
