"""Megatron's hybrid models, of Mamba's mixers, attention and MLPs, that run forward on a processor.

Its two kernels are not there. What stands for them is what they compute, written as the sums that define it (Mamba-2's
selective state space, one token after the other), so that logits can be compared with transformers' own model.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from tests.engines.megatron import mixers


class GatedNorm(torch.nn.Module):
    """mamba_ssm's RMSNorm: of each group by itself, after the gate."""

    def __init__(self, size: int, *, eps: float, group_size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        self.eps, self.group = eps, group_size

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gated = (x * torch.nn.functional.silu(z)).unflatten(-1, (-1, self.group))
        return self.weight * torch.nn.functional.rms_norm(gated, (self.group,), eps=self.eps).flatten(-2)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """mamba_ssm's mamba_chunk_scan_combined. x: (batch, length, heads, width); dt: (batch, length, heads); A, D,
    dt_bias: (heads,); B, C: (batch, length, groups, state)."""
    heads = x.shape[2]
    B, C = (value.repeat_interleave(heads // value.shape[2], dim=2) for value in (B, C))
    step = torch.nn.functional.softplus(dt + dt_bias)
    state = x.new_zeros(*x.shape[:1], heads, x.shape[3], B.shape[3])
    out = []
    for t in range(x.shape[1]):
        grown = torch.einsum("bh,bhp,bhn->bhpn", step[:, t], x[:, t], B[:, t])
        state = state * torch.exp(step[:, t] * A)[..., None, None] + grown
        out.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def _spec(mixer: Any, block: Any, layer: Any) -> ModuleSpec:
    """The stack that Megatron makes of Transformer Engine's modules, of its own ones."""
    linear = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    feed = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    add = get_bias_dropout_add
    submodules = block.MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=layer.MambaLayer,
            submodules=layer.MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(module=mixer.MambaMixer, submodules=mixer.MambaMixerSubmodules(**linear)),
                mamba_bda=add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(module=SelfAttention, params=causal, submodules=attention),
                self_attn_bda=add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm, mlp=ModuleSpec(module=MLP, submodules=feed), mlp_bda=add
            ),
        ),
    )
    return ModuleSpec(module=block.MambaStack, submodules=submodules)


def model(pattern: str, config: dict[str, Any]) -> Any:
    """A model for its logits. pattern: a letter for each layer, as Megatron's hybrid_override_pattern; config: of
    TransformerConfig."""
    mixer = mixers.module(RMSNorm=GatedNorm, mamba_chunk_scan_combined=scan)
    block = importlib.import_module("megatron.core.ssm.mamba_block")
    layer = importlib.import_module("megatron.core.ssm.mamba_layer")
    hybrid = importlib.import_module("megatron.core.models.mamba.mamba_model")
    block.TENorm = WrappedTorchNorm
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    given = TransformerConfig(
        num_layers=len(pattern),
        use_cpu_initialization=True,
        use_mamba_mem_eff_path=False,
        activation_func=squared_relu,
        gated_linear_unit=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **config,
    )
    made = hybrid.MambaModel(
        given,
        _spec(mixer, block, layer),
        vocab_size=64,
        max_sequence_length=32,
        hybrid_override_pattern=pattern,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return made.eval()


def by_transformer_engine(pattern: str, key: str) -> str:
    """A key of these classes as Transformer Engine's have it, where a norm is inside the linear layer after it."""
    for number, letter in enumerate(pattern):
        own, theirs = {
            "M": ("norm.", "mixer.in_proj.layer_norm_"),
            "*": ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
            "-": ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        }[letter]
        start = f"decoder.layers.{number}."
        if key.startswith(start + own):
            return start + theirs + key.removeprefix(start + own)
    return key
