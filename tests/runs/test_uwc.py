"""pyunlearn calibrate uwc: a finished run's models mixed; resumable, and read as a run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

from pyunlearn.calibration import Tensors
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.load import load_model
from pyunlearn.runs import uwc as uwc_module
from pyunlearn.runs.compare import compare_runs
from pyunlearn.runs.config import RunConfig
from pyunlearn.runs.cru import (
    Hybrids,
    calibrate_cru,
)
from pyunlearn.runs.export import export
from pyunlearn.runs.pair import Pair, examine, opened
from pyunlearn.runs.run import load_result, run
from pyunlearn.runs.uwc import Mixtures, calibrate_uwc
from pyunlearn.training.settings import merge
from pyunlearn.training.stage import Interrupted

from ..resident import Peak
from .calibrated import weights


def test_uwc_keeps_what_was_asked_and_is_a_run_again(folder, tmp_path):
    result = calibrate_uwc(folder, target=0.9, on="retain", tolerance=0.05)
    assert {i / 10 for i in range(11)} <= result.search.scores.keys()
    scores = result.search.scores
    assert scores[result.a] >= 0.9 * scores[0.0] > scores[1.0]  # there was something to calibrate
    assert 0 < result.a < 1
    place = folder / "uwc"
    # the model that is written is the one that was measured
    table = {(row["set"], row["metric"]): row for row in load_result(place).table}
    assert table["retain", "extraction_strength"]["after"] == pytest.approx(scores[result.a], abs=1e-12)
    run_table = {(row["set"], row["metric"]): row for row in load_result(folder).table}
    assert run_table["retain", "extraction_strength"]["after"] == pytest.approx(scores[1.0], abs=1e-12)
    assert run_table["retain", "extraction_strength"]["before"] == pytest.approx(scores[0.0], abs=1e-12)
    assert table.keys() == run_table.keys()
    kept = json.loads((place / "uwc.json").read_text())
    assert (kept["a"], kept["u"]) == (result.a, 1 - result.a)
    assert [point["a"] for point in kept["curve"]] == sorted(scores)
    assert not (place / "work").exists()
    comparison = compare_runs([folder, place])
    assert [group.name for group in comparison.groups] == ["tiny", "tiny-uwc"]
    with pytest.raises(ValueError, match="or what a run was calibrated to; needs a run's own folder"):
        calibrate_uwc(place)
    assert comparison.differences["calibration.a"] == [None, result.a]
    export(place, tmp_path / "given")
    assert weights(tmp_path / "given") == weights(place / "checkpoint")
    assert f"calibration: method = uwc, a = {result.a}" in (tmp_path / "given" / "README.md").read_text()
    page = (place / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "(1 - a) before + a unlearned" in page


@pytest.mark.parametrize("model", ["checkpoint", "memorised"])
def test_a_model_that_was_changed_since_is_neither_calibrated_nor_given_away(finished, tmp_path, model):
    """What it does would be told beside numbers of the one before."""
    run = tmp_path / "run"
    shutil.copytree(finished("full"), run)
    file = run / model / "model.safetensors"
    written = bytearray(file.read_bytes())
    written[-1] ^= 1
    file.write_bytes(written)
    told = rf"{model}/model\.safetensors: is damaged, it is not what was written; make the model again"
    for calibrate in (calibrate_uwc, calibrate_cru):
        with pytest.raises(ValueError, match=told):
            calibrate(run)
    if model == "checkpoint":
        with pytest.raises(ValueError, match=told):
            export(run, tmp_path / "given")
        assert not (tmp_path / "given").exists()


def test_ends_are_the_runs_own_models(folder):
    with opened(folder, "uwc", None, "") as pair:
        mixtures = Mixtures(pair)
        assert model_fingerprint(mixtures.at(0.4)[0]) not in (
            weights(folder / "memorised"),
            weights(folder / "checkpoint"),
        )
        assert model_fingerprint(mixtures.at(1.0)[0]) == weights(folder / "checkpoint")
        assert model_fingerprint(mixtures.at(0.0)[0]) == weights(folder / "memorised")


def test_mixtures_of_an_adapter_are_those_of_merged_models(finished):
    with opened(finished("adapter"), "uwc", None, "") as pair:
        mixtures = Mixtures(pair)
        scaled = mixtures.at(0.4)[0]
        mixtures.scaled = False
        mixed = mixtures.at(0.4)[0]
        for one, other in zip(scaled.parameters(), mixed.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)


def test_two_models_are_never_whole_in_memory(tiny_settings, tmp_path):
    """Of many tensors, each small: the one that is mixed in place, and at any time a few tensors of the two."""
    short = {"max_steps": 1, "warmup": 0}
    changes = {"model": {"options": {"num_hidden_layers": 12, "vocab_size": 300}}, "memorise": short, "unlearn": short}
    changes |= {"evaluate": {"metrics": ["probability"]}, "output": str(tmp_path / "run")}
    run(RunConfig.model_validate(merge(tiny_settings, changes)))
    whole = sum(file.stat().st_size for file in (tmp_path / "run/checkpoint").glob("*.safetensors"))
    with opened(tmp_path / "run", "uwc", None, "") as pair, Peak(each=25) as peak:
        Mixtures(pair).at(0.4)
    assert 0.9 * whole < peak.bytes < 1.4 * whole


def test_every_point_is_one_reading_of_what_greedy_decoding_extracts(finished):
    """Methods' equivalence: the prefixes after which the model, writing greedily, says the rest."""
    with opened(finished("full"), "uwc", None, "") as pair:
        model, tokenizer = Mixtures(pair).at(0.6)
        sets = {"retain": pair.sets()["retain"]}
        read = examine(pair.job, model, tokenizer, sets, {"retain": ["extraction_strength"]})["retain"].summary
        written = examine(pair.job, model, tokenizer, sets, {"retain": ["written_extraction_strength"]})[
            "retain"
        ].summary
    assert read["extraction_strength"] == pytest.approx(written["written_extraction_strength"], abs=1e-12)
    assert 0 < read["extraction_strength"] < 1


def test_stopped_and_continued(folder, monkeypatch):
    whole = calibrate_uwc(folder, target=0.9, on="retain")
    model = weights(folder / "uwc" / "checkpoint")
    shutil.rmtree(folder / "uwc")
    means, measured = Pair.means, []

    def counted(self, *args):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append(1)
        return means(self, *args)

    monkeypatch.setattr(Pair, "means", counted)
    with pytest.raises(Interrupted, match="resume with: again"):
        calibrate_uwc(folder, target=0.9, on="retain", command="again")
    assert not (folder / "uwc" / "work").exists()
    assert not (folder / "uwc" / "table.json").exists()
    monkeypatch.setattr(Pair, "means", lambda self, *args: measured.append(1) or means(self, *args))
    result = calibrate_uwc(folder, target=0.9, on="retain")
    assert result.search == whole.search
    assert len(measured) == len(result.search.scores)  # none twice
    assert weights(folder / "uwc" / "checkpoint") == model
    again = calibrate_uwc(folder, target=0.9, on="retain")
    assert len(measured) == len(result.search.scores)
    assert again.search == whole.search


def test_what_may_mislead_is_told(finished):
    out = Console(record=True, width=200)
    result = calibrate_uwc(finished("full"), target=1.0, on="retain", points=2, tolerance=0.5, console=out)
    assert any("rehearsed" in warning for warning in result.warnings)
    assert any("retain rows: too few" in warning for warning in result.warnings)
    assert "pyunlearn compare" in out.export_text()
    known = uwc_module.warn(
        uwc_module.Search(0.0, 0.04, {0.0: 0.05, 1.0: 0.0}), {0.0: {"forget": {"extraction_strength": 1.0},
        "holdout": {"extraction_strength": 0.05}}}, "holdout", True, {"forget": 20},
    )  # fmt: skip
    assert ["knows little" in known[0], "nothing is forgotten" in known[1]] == [True, True]
    assert len(known) == 2


def test_bad_input_of_uwc(finished, tmp_path):
    path = finished("full")
    with pytest.raises(ValueError, match=r"target=1.2: needs a share"):
        calibrate_uwc(path, target=1.2)
    with pytest.raises(ValueError, match="--on=forget: the run has no such rows; needs one of holdout, retain"):
        calibrate_uwc(path, on="forget")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        calibrate_uwc(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no finished run"):
        calibrate_uwc(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "memorised")
    with pytest.raises(FileNotFoundError, match="memorised/, a model of the run, is gone"):
        calibrate_uwc(copy)


def test_files_that_name_tensors_otherwise(tiny, tiny_config, tmp_path):
    """Experts are one tensor in memory and many in files: read from copies, the same to the bit."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "num_local_experts": 3, "max_position_embeddings": 256}  # fmt: skip
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(tiny.tokenizer), **sizes))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    assert not Tensors(tmp_path / "model").hold(model)
    files = {}
    for name, items in (("forget", tiny.world.forget), ("retain", tiny.world.retain)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(item.to_json()) + "\n" for item in items))
    run(RunConfig.model_validate({
        "output": str(tmp_path / "run"), "model": {"name_or_path": str(tmp_path / "model")}, "data": files,
        "unlearn": {"epochs": 1, "learning_rate": 1e-3}, "evaluate": {"metrics": ["probability"]},
    }))  # fmt: skip
    with opened(tmp_path / "run", "uwc", None, "") as pair:
        mixtures = Mixtures(pair)
        for a, source in ((0.5, None), (1.0, tmp_path / "run" / "checkpoint"), (0.0, tmp_path / "model")):
            mixed = model_fingerprint(mixtures.at(a)[0])
            assert source is None or mixed == weights(source)
        assert set(Hybrids(pair, "layer").parts) >= {"layer 0", "layer 1"}


def test_models_of_different_shapes(finished, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(finished("full"), path)
    model, tokenizer = load_model(str(path / "checkpoint"))
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(60, 32))
    shutil.rmtree(path / "checkpoint")
    model.save_pretrained(path / "checkpoint")
    tokenizer.save_pretrained(path / "checkpoint")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight: has shape \(64, 32\) before"):
        calibrate_uwc(path, on="retain")
