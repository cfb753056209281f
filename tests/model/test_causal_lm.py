"""A model taken apart: the same inside whatever is around it, and a head that is proved once."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyunlearn.data.tiny import tiny_llama
from pyunlearn.model.causal_lm import CausalLM
from pyunlearn.model.forward import supervised_stats
from pyunlearn.model.load import load_model

from .test_forward import SIZES, Adapter, Doubled, make
from .zoo import ZOO
from .zoo import make as make_of_zoo


class Held(nn.Module):
    """As DDP and DeepSpeed hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "none": [],
    "compiled": [compiled],
    "data parallel": [nn.DataParallel],
    "held": [Held],
    "peft": [lora],
    "peft, held": [lora, Held],
    "held, compiled": [Held, compiled],
    "compiled, held": [compiled, Held],
    "peft, compiled, held": [lora, compiled, Held],
}


@pytest.mark.parametrize("names", WRAPPERS)
def test_wrappers_are_seen_through(names):
    model = make("llama")
    around = model
    for wrap in WRAPPERS[names]:
        around = wrap(around)
    lm = CausalLM.of(around)
    assert lm.given is around
    assert lm.called is (around._orig_mod if names.endswith("compiled") else around)
    assert lm.inner is model
    assert lm.name == "LlamaForCausalLM"
    assert isinstance(lm.alone, peft.PeftModel if "peft" in names else LlamaForCausalLM)
    assert lm.head_layer is model.lm_head
    assert lm.blocks is model.model.layers
    assert (lm.depth, lm.context_length, lm.vocab_size) == (2, 64, 61)
    assert lm.device == torch.device("cpu")
    assert lm.wrapped is any(word in names for word in ("held", "data parallel"))
    assert not lm.sharded
    assert CausalLM.of(lm) is lm


def test_a_wrapper_that_passes_attributes_on(batch):
    model = make("llama")
    lm = CausalLM.of(Adapter(model))
    assert lm.blocks is model.model.layers
    assert torch.equal(supervised_stats(lm, batch)[0].logp, supervised_stats(model, batch)[0].logp)


def test_what_is_no_causal_lm():
    with pytest.raises(TypeError, match=r"needs a transformers causal LM \(get_output_embeddings\), got Held"):
        CausalLM.of(Held(nn.Linear(2, 2)))
    model = make("llama")
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(TypeError, match="LlamaForCausalLM: needs a ModuleList of its 2 layers"):
        _ = CausalLM.of(model).blocks


class Counting(LlamaForCausalLM):
    calls = 0

    def forward(self, *args, **kwargs):
        Counting.calls += 1
        return super().forward(*args, **kwargs)


def test_the_head_is_proved_once_a_model(monkeypatch):
    monkeypatch.setattr(Counting, "calls", 0)
    model = Counting(LlamaConfig(**SIZES))
    for _ in range(3):
        CausalLM.of(model).check_head()
        CausalLM.of(Held(model)).check_head()
    assert Counting.calls == 1
    CausalLM.of(copy.deepcopy(model)).check_head()  # another model
    assert Counting.calls == 2
    model.lm_head = nn.Linear(32, 61)
    CausalLM.of(model).check_head()
    assert Counting.calls == 3
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # another forward, to be proved too
    CausalLM.of(model).check_head()
    assert Counting.calls == 4
    model.config.logit_scale = 2.0  # which a Llama knows nothing of
    for _ in range(2):
        with pytest.raises(ValueError, match="its logits are not those of its output layer"):
            CausalLM.of(model).check_head()


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_proved(name):
    for dtype in (torch.float32, torch.bfloat16):
        CausalLM.of(make_of_zoo(name, dtype)).check_head()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_models_that_look_ahead_are_refused(dtype):
    torch.manual_seed(0)
    config = transformers.BertGenerationConfig(**SIZES)  # which no configuration tells
    for ahead in (False, True):
        config.is_decoder = not ahead
        lm = CausalLM.of(transformers.BertGenerationDecoder(config).to(dtype))
        if ahead:
            with pytest.raises(ValueError, match="Decoder: is not causal, its logits of a token change with the token"):
                lm.check_head()
        else:
            lm.check_head()


TINY = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
OTHERS = {
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**TINY)), "T5Config is an encoder-"),
    "bert": (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES)), "BertConfig is an encoder, in "),
    "modernbert": (
        lambda: transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SIZES)),
        r"ModernBertConfig is an encoder, in which a token sees those after it \(is_decoder=False\)",
    ),
    "gemma3": (
        lambda: transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config={**SIZES, "head_dim": 8},
                vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
            )
        ),
        r"Gemma3Config is of more than text \(vision_config\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_causal_lm_of_text_is_refused(kind, tmp_path, monkeypatch):
    build, message = OTHERS[kind]
    model = build()
    with pytest.raises(TypeError, match=f"{type(model).__name__}: its {message}.*; needs a decoder-only causal LM"):
        CausalLM.of(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("pyunlearn.model.load.load_weights", lambda *args, **options: pytest.fail("weights"))
    with pytest.raises(TypeError, match=f"model '{tmp_path}': its {message}"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Electra", "Bart"])
def test_their_decoders_are_taken(kind):
    made = getattr(transformers, {"Bert": "BertLMHeadModel"}.get(kind, f"{kind}ForCausalLM"))
    sizes = {**SIZES, "type_vocab_size": 2}
    if kind == "Bart":
        sizes = {"vocab_size": 9, "d_model": 8, "decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 2}
    CausalLM.of(made(getattr(transformers, f"{kind}Config")(**sizes, is_decoder=True))).check_head()


def test_a_kind_that_writes_nothing_is_told(tmp_path):
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="transformers has no causal LM of the kind vit; needs a model that writes"):
        load_model(str(tmp_path))


def test_proofs_keep_no_model_alive():
    from pyunlearn.model import causal_lm

    CausalLM.of(make("llama")).check_head()
    gc.collect()
    before = len(causal_lm._PROVEN)
    model = make("llama")
    CausalLM.of(model).check_head()
    assert len(causal_lm._PROVEN) == before + 1
    del model
    gc.collect()
    assert len(causal_lm._PROVEN) == before


def test_a_failed_proof_is_tried_again():
    torch.manual_seed(0)
    lm = CausalLM.of(Doubled(LlamaConfig(**SIZES)))
    for _ in range(2):
        with pytest.raises(ValueError, match="Doubled: its logits"):
            lm.check_head()


def test_a_tokenizer_has_to_fit(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}

    def check(rows):
        CausalLM.of(tiny_llama(rows, **small)).check_tokenizer(tokenizer)

    check(len(tokenizer))
    check(len(tokenizer) + 24)  # padded rows
    tokenizer.add_tokens(["<new>"])
    largest = len(tokenizer) - 1
    with pytest.raises(ValueError, match=rf"ids up to {largest} \('<new>'\), the model has {largest} embedding rows"):
        check(largest)


def test_context_length():
    model = tiny_llama(300, hidden_size=16, num_hidden_layers=1, max_position_embeddings=77)
    assert CausalLM.of(model).context_length == 77
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    assert CausalLM.of(model).context_length is None
