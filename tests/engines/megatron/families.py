"""Families of models that transformers and Megatron-Core both have: small ones of each, for the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64, "tie_word_embeddings": True}


_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
_LATENT_MEGATRON = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
    "qk_layernorm": True,
    "num_query_groups": 4,
    "num_moe_experts": 8,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
}
_GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
_SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


_HYBRID = {
    "hidden_size": 32,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 4,
    "conv_kernel": 4,
    "chunk_size": 8,
    "vocab_size": 64,
    "time_step_min": 1e-20,  # Megatron has no least step
    "max_position_embeddings": 32,
}
_HYBRID_MEGATRON = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 4,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}


@dataclass(frozen=True)
class Family:
    """config: what transformers' config class is given. megatron: what Megatron's is given besides."""

    config: Mapping[str, Any]
    megatron: Mapping[str, Any]


FAMILIES: Mapping[str, Family] = {
    "llama": Family(_SIZES, {}),
    "mistral": Family({**_SIZES, "sliding_window": None}, {}),
    "qwen2": Family(_SIZES, {"add_qkv_bias": True}),
    "qwen3": Family({**_SIZES, "head_dim": 16}, {"qk_layernorm": True, "kv_channels": 16}),
    "mixtral": Family({**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}, {"num_moe_experts": 4}),
    "qwen3_moe": Family(
        {**_SIZES, **_MOE, "head_dim": 16},
        {"qk_layernorm": True, "kv_channels": 16, "num_moe_experts": 4, "moe_ffn_hidden_size": 24},
    ),
    "gpt2": Family(_GPT2, {}),
    "deepseek_v2": Family(
        {**_SIZES, **_LATENT, "topk_method": "greedy"}, {**_LATENT_MEGATRON, "moe_router_pre_softmax": True}
    ),
    "deepseek_v3": Family(
        {**_SIZES, **_LATENT, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
        {**_LATENT_MEGATRON, **_GROUPS, **_SIGMOID},
    ),
    "nemotron_h": Family(_HYBRID, _HYBRID_MEGATRON),
}


EXPERTS = ("mixtral", "qwen3_moe")
# Layers of several kinds, by the letters that Megatron has for them.
HYBRID = {"nemotron_h": "M-*M-"}
LATENT = ("deepseek_v2", "deepseek_v3")
# What Megatron's own classes call a norm of latent attention -> what Transformer Engine's do, which are trained.
_LATENT_NORMS = {
    ".q_layernorm.": ".linear_q_up_proj.layer_norm_",
    ".kv_layernorm.": ".linear_kv_up_proj.layer_norm_",
    ".layers.0.pre_mlp_layernorm.": ".layers.0.mlp.linear_fc1.layer_norm_",
}


def by_transformer_engine(family: str, key: str) -> str:
    """A key of Megatron's own classes as Transformer Engine's have it."""
    if family in EXPERTS:
        return key.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
    for own, theirs in _LATENT_NORMS.items() if family in LATENT else ():
        key = key.replace(own, theirs)
    return key


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and the labels of a step, the same on every rank."""
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(100 + number))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_model(name: str) -> Any:
    """A model of transformers with seeded weights, every one of them random."""
    import transformers

    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name].config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        biases = [value for key, value in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for parameter in (*model.parameters(), *biases):
            parameter.normal_(0.0, 0.2)
    return model.float().eval()


def megatron_model(name: str, make: Callable[..., Any]) -> Any:
    """The same model of Megatron's. make: its GPTModel of (TransformerConfig's arguments, the others)."""
    family = FAMILIES[name]
    gpt = name == "gpt2"
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 4 if gpt else 2,
        "ffn_hidden_size": 128 if gpt else 48,
        "layernorm_epsilon": 1e-5 if gpt else 1e-6,
        "normalization": "LayerNorm" if gpt else "RMSNorm",
        "gated_linear_unit": not gpt,
        "add_bias_linear": gpt,
        "activation_func": partial(torch.nn.functional.gelu, approximate="tanh") if gpt else torch.nn.functional.silu,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
    }
    positions = "learned_absolute" if gpt else "rope"
    return make({**sizes, **family.megatron}, position_embedding_type=positions, share_embeddings=gpt)
