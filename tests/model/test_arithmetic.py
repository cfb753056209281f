"""Task-vector negation, streamed, against the equation on two whole models."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyunlearn.data.tiny import tiny_llama, train_tokenizer
from pyunlearn.model import arithmetic
from pyunlearn.model.arithmetic import negate, negate_adapter
from pyunlearn.model.lora import add_adapter, merge

TOKENIZER = train_tokenizer(["a few words of text", "and some more"], vocab_size=300)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def pair(tmp_path, **options):
    """(model, one that was trained further, its folder)."""
    model = tiny_llama(TOKENIZER, **SIZES, **options)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    other.save_pretrained(tmp_path / "other")
    return model, other, tmp_path / "other"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_weight_is_the_equations(tmp_path, tied, dtype):
    model, other, folder = pair(tmp_path, tie_word_embeddings=tied)
    model, other = model.to(dtype), other.to(dtype)
    other.save_pretrained(folder)
    before = {name: weight.detach().double().clone() for name, weight in model.named_parameters()}
    change = negate(model, folder, 5.0)
    differences = []
    for name, weight in model.named_parameters():
        wanted = before[name] - 5.0 * (other.get_parameter(name).double() - before[name])
        torch.testing.assert_close(
            weight.double(), wanted.to(dtype).double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7
        )
        differences.append((wanted - before[name]).abs().flatten())
    assert change == pytest.approx(float(torch.cat(differences).mean()), rel=1e-2)
    assert change > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strength_0_is_the_model_to_the_bit(tmp_path, dtype):
    model, _, folder = pair(tmp_path)
    model.to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert negate(model, folder, 0.0) == 0
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_one_tensor_of_the_other_model_at_a_time(tmp_path, monkeypatch):
    model, _, folder = pair(tmp_path)
    alive, original = [], arithmetic.safe_open

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = original(*args, **kwargs)

        def __enter__(self):
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def keys(self):
            return self.opened.keys()

        def get_slice(self, name):
            return self.opened.get_slice(name)

        def get_tensor(self, name):
            alive.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(arithmetic, "safe_open", Watched)
    negate(model, folder, 1.0)
    assert sorted(alive) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_what_does_not_fit_is_told_before_anything_changes(tmp_path, wrong):
    model, _, folder = pair(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.norm.weight"  # the last of them
    if wrong == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    before = copy.deepcopy(model.state_dict())
    message = f"no {name}" if wrong == "missing" else rf"{name} has shape \(3,\), needs that of the model, \(16,\)"
    with pytest.raises(ValueError, match=message):
        negate(model, folder, 1.0)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def trained_adapter(**options):
    model = tiny_llama(TOKENIZER, **SIZES)
    adapted = add_adapter(copy.deepcopy(model), r=2, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    return model, adapted


def test_an_adapter_is_scaled_as_its_merged_weights_are(tmp_path):
    model, adapted = trained_adapter()
    merge(copy.deepcopy(adapted)).save_pretrained(tmp_path / "merged")
    assert negate_adapter(adapted, 3.0) > 0
    negate(model, tmp_path / "merged", 3.0)
    for name, weight in merge(adapted).named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_strength_0_does_nothing():
    model, adapted = trained_adapter()
    negate_adapter(adapted, 0.0)
    assert all(torch.equal(w, model.get_parameter(name)) for name, w in merge(adapted).named_parameters())


def test_other_adapters_are_refused():
    _, adapted = trained_adapter(use_dora=True)
    with pytest.raises(ValueError, match="is no factor of plain LoRA"):
        negate_adapter(adapted, 1.0)
