"""The specs' cuts are DeepSpeed's AutoTP cuts: its own functions cut the weights here, the specs merge them again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.spec.models import MODELS, config_of
from tests.spec.shards import check_shards
from ucp.spec import shipped
from ucp.spec.bound import bind
from ucp.spec.check import merge

FUSED = {
    "bloom": "transformer.h.0.self_attention.query_key_value",
    "gpt_neox": "gpt_neox.layers.0.attention.query_key_value",
    "phi3": "model.layers.0.self_attn.qkv_proj",
}


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("name", FUSED)
def test_fused_attention(name: str, tp: int) -> None:
    from deepspeed.module_inject.fusedqkv_utils import prepare_tp_fused_qkvw
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    module = MODELS[name].make("cpu")
    block = module.get_submodule(FUSED[name].rpartition(".")[0].rpartition(".")[0])
    meta = AutoTPMeta.from_model_config(module.config)
    whole = module.get_submodule(FUSED[name]).weight.detach()
    nn.init.normal_(whole)
    parts = [prepare_tp_fused_qkvw(block, whole, tp, rank, meta).numpy() for rank in range(tp)]
    shards = [({"tp": rank}, part) for rank, part in enumerate(parts)]
    full = f"{FUSED[name]}.weight"
    bound = bind(shipped.find(name), config_of(module))
    cutting = check_shards(bound, {"tp": tp}, {full: shards})[full]
    found = bound.find(full)
    assert found is not None
    merged = merge(found.expression, bound.sizes, cutting, shards, full)
    torch.testing.assert_close(torch.from_numpy(merged), whole, rtol=0, atol=0)
    assert [sum(widths) for widths in cutting.widths.values()] == [2 if name == "phi3" else 4]


@pytest.mark.parametrize("tp", [2, 3, 5])
@pytest.mark.parametrize("name", ["llama-bias-tied", "qwen2", "mistral", "qwen3"])
def test_separate_projections(name: str, tp: int) -> None:
    """AutoTP's widths for every weight of a layer; the rows or columns are taken by torch."""
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    module = MODELS[name].make("cpu")
    meta = AutoTPMeta.from_model_config(module.config)
    bound = bind(shipped.find(MODELS[name].spec), config_of(module))
    shards, wholes = {}, {}
    for full, parameter in module.named_parameters():
        tensor = parameter.detach().clone()
        wholes[full] = nn.init.normal_(tensor)
        short = full.removeprefix("model.layers.0.").removeprefix("model.layers.1.")
        layer = short.rpartition(".")[0]
        if "_proj" not in short:
            continue
        row = "o_proj" in short or "down_proj" in short
        if row and tensor.ndim == 1:
            parts = [tensor] * tp
        else:
            dim = 1 if row else 0
            parts = list(tensor.split(get_shard_size_list(tensor.shape[dim], tp, meta, layer), dim))
        shards[full] = [({"tp": rank}, part.numpy()) for rank, part in enumerate(parts)]
    cuttings = check_shards(bound, {"tp": tp}, shards)
    for full, held in shards.items():
        found = bound.find(full)
        assert found is not None
        merged = merge(found.expression, bound.sizes, cuttings[full], held, full)
        torch.testing.assert_close(torch.from_numpy(merged), wholes[full], rtol=0, atol=0)
