"""Tiny causal LMs in float64 throughout: transformers' own RMSNorm goes through float32, which hides the digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

V = 37
LLAMA = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2, tied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
}


class Float64RMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def make_model(name: str, noise: float = 0.2, seed: int = 0) -> nn.Module:
    """One of MODELS, its initial weights moved by `noise` so that nothing is uniform, zero or one."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    for path, module in list(model.named_modules()):
        if type(module) is LlamaRMSNorm:
            model.set_submodule(path, Float64RMSNorm(module.weight.numel(), module.variance_epsilon))
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model
