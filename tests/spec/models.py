"""Tiny real transformers models of every family in the catalogue, of odd sizes, so that no two axes agree by chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import nn

_HEADS = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 20}
_COMMON = {**_HEADS, "num_hidden_layers": 2, "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {**_COMMON, "head_dim": 10}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT2 = {"n_embd": 24, "n_head": 4, "n_layer": 2, "vocab_size": 101, "n_positions": 17, **_IDS}
_NEOX = {
    "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 101, "intermediate_size": 20,
    **_IDS,
}  # fmt: skip
_DEEPSEEK = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "vocab_size": 101, "intermediate_size": 20, "moe_intermediate_size": 14,
    "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 3,
    "q_lora_rank": 11, "kv_lora_rank": 13, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 7, **_IDS,
}  # fmt: skip
_T5 = {"d_model": 24, "d_kv": 10, "num_heads": 4, "d_ff": 20, "num_layers": 2, "vocab_size": 101, **_IDS}


@dataclass(frozen=True)
class Model:
    """A family's model: the spec that is for it, and how to make its config and module."""

    spec: str
    config: Callable[..., Any]
    module: Callable[..., nn.Module]
    sizes: dict[str, Any]

    def make_config(self, **more: Any) -> Any:
        return self.config(**{**self.sizes, **more})

    def make(self, device: str = "meta", **more: Any) -> nn.Module:
        with torch.device(device):
            return self.module(self.make_config(**more)).eval()


MODELS = {
    "gpt2": Model("gpt2", t.GPT2Config, t.GPT2LMHeadModel, _GPT2),
    "gpt2-untied": Model(
        "gpt2", t.GPT2Config, t.GPT2LMHeadModel, {**_GPT2, "n_inner": 20, "tie_word_embeddings": False}
    ),
    "gpt_neox": Model("gpt_neox", t.GPTNeoXConfig, t.GPTNeoXForCausalLM, _NEOX),
    "gpt_neox-nobias": Model(
        "gpt_neox",
        t.GPTNeoXConfig,
        t.GPTNeoXForCausalLM,
        {**_NEOX, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "bloom": Model(
        "bloom",
        t.BloomConfig,
        t.BloomForCausalLM,
        {"hidden_size": 24, "n_head": 4, "n_layer": 2, "vocab_size": 101, **_IDS},
    ),
    "llama": Model("llama", t.LlamaConfig, t.LlamaForCausalLM, _WIDE),
    "llama-bias-tied": Model(
        "llama",
        t.LlamaConfig,
        t.LlamaForCausalLM,
        {**_COMMON, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": Model("llama", t.MistralConfig, t.MistralForCausalLM, _WIDE),
    "qwen2": Model("qwen2", t.Qwen2Config, t.Qwen2ForCausalLM, _COMMON),
    "qwen3": Model("qwen3", t.Qwen3Config, t.Qwen3ForCausalLM, _WIDE),
    "qwen3-bias-tied": Model(
        "qwen3", t.Qwen3Config, t.Qwen3ForCausalLM, {**_WIDE, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "mixtral": Model("mixtral", t.MixtralConfig, t.MixtralForCausalLM, {**_WIDE, "num_local_experts": 5}),
    "qwen3_moe": Model(
        "qwen3_moe",
        t.Qwen3MoeConfig,
        t.Qwen3MoeForCausalLM,
        {**_WIDE, "num_experts": 5, "moe_intermediate_size": 14, "mlp_only_layers": [1]},
    ),
    "deepseek_v3": Model("deepseek_v3", t.DeepseekV3Config, t.DeepseekV3ForCausalLM, _DEEPSEEK),
    "deepseek_v3-noqrank": Model(
        "deepseek_v3",
        t.DeepseekV3Config,
        t.DeepseekV3ForCausalLM,
        {**_DEEPSEEK, "q_lora_rank": None, "attention_bias": True},
    ),
    "nemotron_h": Model(
        "nemotron_h",
        t.NemotronHConfig,
        t.NemotronHForCausalLM,
        {
            **{key: value for key, value in _WIDE.items() if key != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "mamba_num_heads": 6,
            "mamba_head_dim": 5,
            "n_groups": 3,
            "ssm_state_size": 7,
            "conv_kernel": 4,
        },
    ),
    "phi3": Model("phi3", t.Phi3Config, t.Phi3ForCausalLM, {**_COMMON, "original_max_position_embeddings": 16}),
    "t5": Model("t5", t.T5Config, t.T5ForConditionalGeneration, _T5),
    "t5-gated": Model("t5", t.T5Config, t.T5ForConditionalGeneration, {**_T5, "feed_forward_proj": "gated-gelu"}),
}


def config_of(module: nn.Module) -> dict[str, Any]:
    """The config as config.json would have it."""
    return json.loads(module.config.to_json_string())


@dataclass(frozen=True)
class Names:
    """A module's tensors: parameters and buffers that are saved, with their shapes; tied names; buffers."""

    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    buffers: frozenset[str]


def names_of(module: nn.Module) -> Names:
    """What the module itself says: the names in its state_dict, which of them are one tensor, which are buffers."""
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            aliases[name] = owners[id(parameter)]
        else:
            owners[id(parameter)] = name
            shapes[name] = tuple(parameter.shape)
    buffers = {n: tuple(b.shape) for n, b in module.named_buffers()}
    return Names({**shapes, **buffers}, aliases, frozenset(buffers))
