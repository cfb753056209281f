"""Tiny models of the ways that architectures treat their heads, and a batch."""

import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

V = 61


SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GPT2_SIZES = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2_tied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "gemma2_softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
    "cohere_logit_scale": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite_logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "phi_bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
}


def make(name, seed=0):
    """A tiny model whose logits are far from uniform, so that softcaps, scales and biases show."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make_batch():
    """Three right-padded rows of 9, 6 and 4 tokens; the first 4, 3 and 2 are prompt."""
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, length) in enumerate([(4, 9), (3, 6), (2, 4)]):
        labels[row, :prompt] = -100
        labels[row, length:], mask[row, length:], ids[row, length:] = -100, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "index": torch.arange(3)}


class LoraLinear(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight  # as peft's layers have
