from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyunlearn.model.load import load_model, with_random_weights
from pyunlearn.runs.sections import ModelConfig


@pytest.fixture
def saved(tiny, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_back_what_was_saved(tiny, saved):
    model, tokenizer = load_model(str(saved))
    for ours, theirs in zip(model.parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not model.training
    assert tokenizer.get_vocab() == tiny.tokenizer.get_vocab()
    half, _ = load_model(str(saved), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_the_embedded_model_is_a_function_of_texts_and_seed(tiny):
    options = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 300}
    first, _ = load_model(options=options, texts=tiny.world.texts, seed=1)
    again, _ = load_model(options=options, texts=tiny.world.texts, seed=1)
    other, _ = load_model(options=options, texts=tiny.world.texts, seed=2)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.shape == (300, 16)
    with pytest.raises(ValueError, match="trains its tokenizer on the run's data"):
        load_model()


def test_random_weights_are_those_of_a_new_model(tiny):
    model = tiny.model().to(torch.bfloat16).train()
    state = torch.get_rng_state()
    one, same, other = (with_random_weights(model, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.dtype, one.training, model.training) == (torch.bfloat16, False, True)
    assert {**one.config.to_dict(), "dtype": None} == {**model.config.to_dict(), "dtype": None}
    weights = [each.model.embed_tokens.weight for each in (one, same, other, model)]
    assert [torch.equal(weights[0], each) for each in weights] == [True, True, False, False]
    assert weights[0].float().std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert one.get_output_embeddings().weight is weights[0]  # tied, as the model's are


def test_a_configuration_holds_its_arguments(tiny):
    config = ModelConfig(options={"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2})
    assert load_model(**config.loading(), texts=tiny.world.texts)[0].lm_head.weight.size(1) == 16
    with pytest.raises(ValueError, match="are sizes of the embedded model"):
        ModelConfig(name_or_path="x", options={"hidden_size": 16})


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny, saved, tmp_path):
    from pyunlearn.data.tiny import tiny_llama

    tiny_llama(300, hidden_size=16, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"makes ids up to 383 .* the model has 300 embedding rows"):
        load_model(str(tmp_path / "small"), tokenizer=str(saved))


def test_a_tokenizer_without_padding_gets_one(tiny, saved):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(saved)
    bare.pad_token = None
    bare.save_pretrained(saved)
    assert load_model(str(saved))[1].pad_token == bare.eos_token


def test_what_is_missing_is_named(saved, tmp_path, monkeypatch):
    def told(error, message, **config):
        with pytest.raises(error, match=message):
            load_model(**config)

    told(FileNotFoundError, r"no such folder: .*modle; did you mean model\?", name_or_path=str(tmp_path / "modle"))
    told(FileNotFoundError, "no config.json there; for a GGUF file in it", name_or_path=str(tmp_path))
    told(ValueError, "is a file; needs a folder", name_or_path=str(saved / "config.json"))
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    told(
        ValueError,
        r"no .safetensors weights; no other kind .*: convert them .*save_pretrained",
        name_or_path=str(saved),
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told(
        FileNotFoundError,
        "not a folder here and not available from the Hub",
        name_or_path="nobody/no-such-model",
    )


def change(saved, **weights):
    """The model file with other weights: None takes one out."""
    file = saved / "model.safetensors"
    tensors = load_file(file) | weights
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, {"format": "pt"})


def test_weights_that_are_missing_or_of_another_shape_are_named(saved, caplog):
    gate = "model.layers.1.mlp.gate_proj.weight"
    change(saved, **{gate: None, "model.norm.weight": None})
    with pytest.raises(ValueError, match=f"its files lack {gate}, model.norm.weight, which would be random"):
        load_model(str(saved))
    change(saved, **{gate: torch.ones(3, 32), "model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=rf"{gate} has shape \(3, 32\) in its files, config.json needs \(64, 32\)"):
        load_model(str(saved))
    change(saved, **{gate: torch.ones(64, 32), "model.layers.7.extra": torch.ones(3)})
    assert torch.equal(load_model(str(saved))[0].get_parameter(gate), torch.ones(64, 32))
    assert "its files have model.layers.7.extra, for which the model has no place" in caplog.text


def test_a_tied_head_is_not_missing(tiny, saved):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")  # the tiny model's is tied
    model, _ = load_model(str(saved))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model.safetensors", "/etc/m.safetensors", "a\\b.safetensors", 3]
)
def test_an_index_names_safetensors_in_its_folder_only(saved, name):
    file = saved / "model.safetensors"
    file.rename(saved / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(saved / "part.safetensors"), "part.safetensors")}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(str(saved))
    index["weight_map"]["model.norm.weight"] = name
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index.json: names the file {re.escape(repr(name))}, needs .safetensors"):
        load_model(str(saved))


def test_a_mistyped_folder_waits_for_no_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    near = f"{saved.parent.name}/modle"  # might be a Hub id
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: pytest.fail("the Hub"))
    with pytest.raises(FileNotFoundError, match=f"no such folder: {near}; did you mean model"):
        load_model(near)


def test_one_error_for_what_the_hub_does_not_have(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    with pytest.raises(FileNotFoundError) as told:
        load_model("modle")
    assert str(told.value).count("not a folder here") == 1
    assert str(told.value).endswith("; did you mean model?")
    assert told.value.__cause__ is None


def test_gguf_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the gguf package: pip install 'pyunlearn\[gguf\]'"):
        load_model(gguf_file="m.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "model-q4.gguf").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model-q8.gguf; did you mean model-q4.gguf\?"):
        load_model(gguf_file=str(tmp_path / "model-q8.gguf"))
    with pytest.raises(FileNotFoundError, match=r"no such file: .*other.gguf"):
        load_model(str(tmp_path), gguf_file="other.gguf")
