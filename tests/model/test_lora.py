"""Fresh adapters, and adapter folders that are read as models."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyunlearn.data import collate
from pyunlearn.data.tiny import tiny_llama
from pyunlearn.model import lora
from pyunlearn.model.fingerprint import model_fingerprint
from pyunlearn.model.load import load_model
from pyunlearn.model.lora import add_adapter, base_of, does_nothing, find_adapter, merge, merged_names, saving, tried
from pyunlearn.mrd import mrd

from ..tiny import SIZES

COPY = {"targets": ["q_proj"], "modules_to_save": ["gate_proj"]}


def moved(adapted):
    """Away from the start, where an adapter does nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A base, an adapter on it that has learnt something, and the same merged by peft."""
    root = tmp_path_factory.mktemp("lora")
    base, adapter, merged = (root / name for name in ("base", "adapter", "merged"))
    tiny.model().save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    model = moved(add_adapter(tiny.model(), r=4, base=str(base)))
    model.save_pretrained(adapter, **saving(model))
    model.merge_and_unload().save_pretrained(merged)
    for folder in (adapter, merged):
        tiny.tokenizer.save_pretrained(folder)
    return SimpleNamespace(base=base, adapter=adapter, merged=merged)


def broken(folders, tmp_path, **settings):
    """A copy of the adapter, with these settings."""
    folder = tmp_path / "broken"
    shutil.copytree(folders.adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


# ---- a fresh one -----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(tiny):
    ids = torch.arange(3, 30)[None]
    plain, state = tiny.model()(ids).logits, torch.get_rng_state()
    first, again, other = (add_adapter(tiny.model(), r=4, alpha=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(ids).logits, plain)
    trained = {name: weight for name, weight in first.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7  # two factors, two blocks, the seven matrices of each
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    same = [torch.equal(weight, dict(again.named_parameters())[name]) for name, weight in trained.items()]
    assert all(same)
    assert not all(torch.equal(weight, dict(other.named_parameters())[name]) for name, weight in trained.items())
    assert first.peft_config["default"].lora_alpha == 8


def test_of_a_model_in_half_precision_it_is_in_float32(tiny):
    model = add_adapter(tiny.model().bfloat16(), targets=["q_proj"])
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert merge(moved(model)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], r"model\.lora\.targets='q_prj': did you mean q_proj"),
        (["q_proj", "mlp"], r"model\.lora\.targets='mlp': needs one of all-linear, embed_tokens, q_proj"),
        (["lm_head"], r"the adapter is on 'lm_head', whose weight is another layer's too"),
    ],
)
def test_targets_that_do_not_fit(tiny, targets, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(tiny.model(), targets=targets)


def test_options_are_pefts(tiny):
    model = add_adapter(tiny.model(), targets="q_proj", layers_to_transform=[1], use_rslora=True)
    assert {name.split(".")[4] for name, weight in model.named_parameters() if weight.requires_grad} == {"1"}
    assert model.peft_config["default"].use_rslora
    with pytest.raises(ValueError, match=r"model\.lora: peft does not take its settings: .*layers_to_transform"):
        add_adapter(tiny.model(), layers_to_transform=[7], targets=["q_proj"])


def test_one_that_is_tried_leaves_no_trace(tiny):
    model = tiny.model()
    model.model.embed_tokens.weight.requires_grad_(False)
    before, trained = model_fingerprint(model), [weight.requires_grad for weight in model.parameters()]
    modules = [(name, type(module)) for name, module in model.named_modules()]
    with tried(model) as adapted:
        assert does_nothing(adapted)
    assert model_fingerprint(model) == before
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not hasattr(model, "peft_config")


def test_what_does_nothing(tiny):
    assert not does_nothing(tiny.model())
    untied = tiny_llama(tiny.tokenizer, **SIZES, tie_word_embeddings=False)
    assert does_nothing(add_adapter(untied, targets=["embed_tokens", "lm_head", "q_proj"]))
    model = add_adapter(tiny.model())
    assert does_nothing(model)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert not does_nothing(model)
    assert not does_nothing(moved(add_adapter(tiny.model())))


def test_without_peft_it_is_told(tiny, monkeypatch):
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"model\.lora needs the peft package: pip install 'pyunlearn\[lora\]'"):
        add_adapter(tiny.model())


# ---- merged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, COPY], ids=["lora", "copy"])
def test_a_score_under_peft_is_that_of_the_merged_model(tiny, options):
    """What is shaken are the weights that the merged model has, and so is what gradients are taken of."""
    adapted = moved(add_adapter(tiny.model(), r=4, **options)).eval()
    plain = merge(copy.deepcopy(adapted)).eval()
    names = merged_names(adapted)
    assert merged_names(plain) is None
    assert sum(dict(adapted.named_parameters(remove_duplicate=False))[name].numel() for name in names) == sum(
        weight.numel() for _, weight in plain.named_parameters(remove_duplicate=False)
    )
    batches = [collate([tiny.forget[i] for i in range(4)], tiny.tokenizer.pad_token_id)]
    ours, theirs = (mrd(model, batches, "gradient", sigma=1e-5, progress=False).value for model in (adapted, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    everything = mrd(
        adapted, batches, "gradient", parameters=[name for name, _ in adapted.named_parameters()], progress=False
    )
    assert (everything.value > ours * 1.01).all()  # noise on the factors would count on top


def test_a_folder_is_read_merged(folders):
    """To the bits of what peft merges, as a plain model that is trained whole."""
    model, tokenizer = load_model(str(folders.adapter))
    expected, _ = load_model(str(folders.merged))
    base, _ = load_model(str(folders.base))
    assert type(model) is type(expected)
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert model_fingerprint(model) == model_fingerprint(expected) != model_fingerprint(base)
    assert tokenizer.get_vocab() == load_model(str(folders.base))[1].get_vocab()


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folders, tmp_path):
    folder = broken(folders, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    model, tokenizer = load_model(str(folder))
    assert tokenizer.get_vocab() == load_model(str(folders.base))[1].get_vocab()
    assert model_fingerprint(model) == model_fingerprint(load_model(str(folders.merged))[0])


@pytest.mark.parametrize("options", [COPY, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_other_kinds_of_adapters_are_read_too(tiny, folders, tmp_path, options):
    adapted = moved(add_adapter(tiny.model(), **options, base=str(folders.base)))
    adapted.save_pretrained(tmp_path / "copies", **saving(adapted))
    model, _ = load_model(str(tmp_path / "copies"))
    assert model_fingerprint(model) == model_fingerprint(merge(adapted))


def test_an_adapter_of_the_hub(folders, monkeypatch):
    there = {"adapter_config.json", "adapter_model.safetensors"}

    def cached_file(name, file, **options):
        if name == "someone/nobody":
            raise OSError("no such id")
        return str(folders.adapter / file) if name == "someone/adapter" and file in there else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert find_adapter("someone/adapter") == folders.adapter
    assert find_adapter("someone/model") is find_adapter("someone/nobody") is None
    model, _ = load_model("someone/adapter")
    assert model_fingerprint(model) == model_fingerprint(load_model(str(folders.merged))[0])
    there.remove("adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"is an adapter whose .* not to be had, and no other kind is loaded"):
        load_model("someone/adapter")


# ---- folders that cannot be read -------------------------------------------------------------------------------------


def test_a_base_that_is_not_to_be_had(folders, tmp_path):
    folder = broken(folders, tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError) as caught:
        load_model(str(folder))
    assert f"{folder}: is an adapter on '{tmp_path / 'gone'}', which is not to be had: " in str(caught.value)


def test_pickled_weights_are_refused_as_models_are(folders, tmp_path):
    folder = broken(folders, tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"the folder has no \.safetensors weights; no other kind is loaded \(pickle"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type='IA3', needs 'LORA'"),
        ({"base_model_name_or_path": None}, "has base_model_name_or_path=None, needs the folder or Hub id of its base"),
        ({"r": 2}, r"the adapter does not fit its base '.*' \(.*size mismatch"),
        ({"target_modules": ["c_attn"]}, r"the adapter does not fit its base '.*' \(.*c_attn"),
        ({"target_modules": ["q_proj"]}, r"has, and the base no place for, .* more; get the adapter's files again"),
    ],
)
def test_settings_that_do_not_fit(folders, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(broken(folders, tmp_path, **settings)))


def test_weights_that_are_missing(folders, tmp_path):
    folder = broken(folders, tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[2:]), file)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: lacks .*layers\.0.* and 1 more"):
        load_model(str(folder))


def test_a_configuration_that_is_no_json(folders, tmp_path):
    folder = broken(folders, tmp_path)
    Path(folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: is damaged, it is not JSON.*get the adapter's files"):
        load_model(str(folder))


def test_a_base_that_was_moved_with_its_adapter_is_the_one_beside_it(tmp_path):
    (tmp_path / "moved" / "memorised").mkdir(parents=True)
    (tmp_path / "moved" / "checkpoint").mkdir()
    elsewhere = tmp_path / "where it was" / "memorised"
    elsewhere.mkdir(parents=True)  # another's by now
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(elsewhere)}
    (tmp_path / "moved" / "checkpoint" / "adapter_config.json").write_text(json.dumps(settings))
    assert base_of(tmp_path / "moved" / "checkpoint") == str(tmp_path / "moved" / "memorised")
    (tmp_path / "moved" / "memorised").rmdir()
    assert base_of(tmp_path / "moved" / "checkpoint") == str(elsewhere)
