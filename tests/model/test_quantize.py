"""What is handed to transformers for quantised weights, and what is told where they cannot be had."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pyunlearn.model import load, quantize
from pyunlearn.model.load import load_model


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def given(monkeypatch):
    """What from_pretrained is called with; quantising itself is left out."""
    calls, original = [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(source, **options):
        calls.append(options.pop("quantization_config", None))
        return original(source, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return calls


def test_the_configuration_is_qloras(folder, given, monkeypatch):
    monkeypatch.setattr(load, "check_quantize", lambda kind: None)
    load_model(str(folder), quantize="nf4", dtype="bfloat16")
    load_model(str(folder), quantize="int8")
    load_model(str(folder))
    four, eight, none = given
    assert isinstance(four, BitsAndBytesConfig)
    assert (four.load_in_4bit, four.load_in_8bit, four.bnb_4bit_quant_type) == (True, False, "nf4")
    assert (four.bnb_4bit_use_double_quant, four.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert (eight.load_in_4bit, eight.load_in_8bit) == (False, True)
    assert none is None


def test_without_bitsandbytes_nothing_is_loaded(folder, given, monkeypatch):
    find_spec = quantize.importlib.util.find_spec
    monkeypatch.setattr(
        quantize.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"model\.quantize=nf4 needs the bitsandbytes package: pip install bitsandb"):
        load_model(str(folder), quantize="nf4")
    assert given == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="tells what a machine without a GPU is told")
def test_without_a_gpu_it_is_told(folder, given, monkeypatch):
    module = ModuleType("bitsandbytes")
    module.supported_torch_devices = {"cpu", "cuda", "xpu"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: module)
    with pytest.raises(ValueError, match=r"=int8: needs a GPU that bitsandbytes trains on \(cuda, xpu\), here is cpu"):
        load_model(str(folder), quantize="int8")
    assert given == []
