"""Tiny causal LMs of many architectures: every way in which a model may know where a token stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

V = 61
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {**SIZES, "head_dim": 8, "sliding_window": 4}
EXPERTS = {**SIZES, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROPE = {"rope_theta": 10000.0}
LONG = {**ROPE, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [6.0, 5.0, 4.0, 3.0]}

ZOO: dict[str, Callable[[], tuple[type, Any]]] = {
    # learned, absolute positions
    "gpt2": lambda: (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(**SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    ),
    "gpt_bigcode": lambda: (
        hf.GPTBigCodeForCausalLM,
        hf.GPTBigCodeConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ),
    # rotary
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**SIZES)),
    "qwen2": lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**SIZES, head_dim=8)),
    "phi": lambda: (hf.PhiForCausalLM, hf.PhiConfig(**SIZES)),
    "gpt_neox": lambda: (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SIZES)),
    "gptj": lambda: (
        hf.GPTJForCausalLM,
        hf.GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8),
    ),
    "longrope": lambda: (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**SIZES, original_max_position_embeddings=12, rope_parameters=dict(LONG)),
    ),
    "dynamic": lambda: (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **SIZES
            | {"max_position_embeddings": 12, "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}}
        ),
    ),
    # of a window
    "mistral": lambda: (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=4)),
    "gemma2": lambda: (hf.Gemma2ForCausalLM, hf.Gemma2Config(**GEMMA)),
    "gemma3": lambda: (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GEMMA)),
    # biases of attention by distance
    "bloom": lambda: (hf.BloomForCausalLM, hf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": lambda: (hf.FalconForCausalLM, hf.FalconConfig(**SIZES, alibi=True)),
    "mpt": lambda: (hf.MptForCausalLM, hf.MptConfig(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)),
    # recurrent: no positions
    "mamba": lambda: (
        hf.MambaForCausalLM,
        hf.MambaConfig(vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2),
    ),
    "rwkv": lambda: (hf.RwkvForCausalLM, hf.RwkvConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2)),
    # experts
    "mixtral": lambda: (hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": lambda: (
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    ),
}


FLOAT32_AT_MOST = ("mixtral", "qwen2_moe")  # torch multiplies grouped experts in nothing wider


def kinds(*kinds: tuple[torch.dtype, str | None]) -> list[tuple[str, torch.dtype, str | None]]:
    """(name, dtype, attention) of all that transformers can compute."""
    return [(name, *kind) for name in ZOO for kind in kinds if kind[0] != torch.float64 or name not in FLOAT32_AT_MOST]


def make(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """One of ZOO whose logits are far from uniform. attention: "eager" or "sdpa"; None: the model's own choice."""
    torch.manual_seed(0)
    kind, config = ZOO[name]()
    if attention is not None:
        config._attn_implementation = attention
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype)
