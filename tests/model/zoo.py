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

MLA = {  # DeepSeek's attention
    **EXPERTS,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
# more, of the same ways
MORE: dict[str, Callable[[], tuple[type, Any]]] = {
    "phi3": lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**SIZES)),
    "olmo2": lambda: (hf.Olmo2ForCausalLM, hf.Olmo2Config(**SIZES)),
    "granite": lambda: (hf.GraniteForCausalLM, hf.GraniteConfig(**SIZES, logits_scaling=8.0)),
    "smollm3": lambda: (hf.SmolLM3ForCausalLM, hf.SmolLM3Config(**SIZES)),
    "stablelm": lambda: (hf.StableLmForCausalLM, hf.StableLmConfig(**SIZES)),
    "cohere": lambda: (hf.CohereForCausalLM, hf.CohereConfig(**SIZES, logit_scale=0.25)),
    "qwen3_moe": lambda: (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8)),
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=64),
    ),
    "deepseek_v2": lambda: (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(**MLA, n_routed_experts=4)),
    "deepseek_v3": lambda: (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(**MLA, n_routed_experts=4)),
    "mamba2": lambda: (
        hf.Mamba2ForCausalLM,
        hf.Mamba2Config(
            vocab_size=V, hidden_size=32, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1,
            chunk_size=8,
        ),
    ),
    "jamba": lambda: (
        hf.JambaForCausalLM,
        hf.JambaConfig(
            **SIZES, mamba_d_state=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        ),
    ),
    "bamba": lambda: (
        hf.BambaForCausalLM,
        hf.BambaConfig(**SIZES, mamba_d_state=4, mamba_n_heads=4, mamba_d_head=16, attn_layer_indices=[1]),
    ),
}  # fmt: skip


FLOAT32_AT_MOST = ("mixtral", "qwen2_moe")  # torch multiplies grouped experts in nothing wider


def kinds(*kinds: tuple[torch.dtype, str | None]) -> list[tuple[str, torch.dtype, str | None]]:
    """(name, dtype, attention) of all that transformers can compute."""
    return [(name, *kind) for name in ZOO for kind in kinds if kind[0] != torch.float64 or name not in FLOAT32_AT_MOST]


def make(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **changes: Any) -> Any:
    """One of ZOO or MORE whose logits are far from uniform. attention: "eager" or "sdpa"; None: the model's own choice.

    changes: of its configuration.
    """
    torch.manual_seed(0)
    kind, config = (ZOO | MORE)[name]()
    for key, value in changes.items():
        if hasattr(config, key):
            setattr(config, key, value)
    if attention is not None:
        config._attn_implementation = attention
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype)
