"""The specs' cuts mean what the models compute: sublayers from each rank's shards add up to the whole sublayer.

Every rank's sublayer is spelled out here in plain torch, from the cut weights alone. A wrong order of heads or segments
leaves shapes as they are and shows here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from tests.spec.models import MODELS, config_of
from ucp.spec import shipped
from ucp.spec.bound import bind
from ucp.spec.evaluate import Cutting, shard

LENGTH = 5
FLOAT32 = 1e-4  # these models compute norms or the softmax in float32, whatever the weights are


def cut_model(module: nn.Module, spec: str, prefix: str, mesh: Mapping[str, int], rule: str) -> list[dict[str, Tensor]]:
    """For each tp rank the shards of all parameters under a prefix, cut by the spec; names without the prefix."""
    bound = bind(shipped.find(spec), config_of(module))
    cutting = Cutting(mesh, rule)
    out = []
    for r in range(mesh["tp"]):
        shards = {}
        for name, parameter in module.named_parameters():
            if not name.startswith(prefix):
                continue
            found = bound.find(name)
            assert found is not None
            held = shard(found.expression, bound.sizes, cutting, {"tp": r})
            flat = np.full(int(np.prod(held.shape)), np.nan)
            whole = parameter.detach().double().numpy()
            for k in range(len(held.blocks)):
                b = held.blocks
                box = tuple(slice(o, o + n) for o, n in zip(b.offsets[k], b.sizes[k], strict=True))
                steps = tuple(int(s) * flat.itemsize for s in b.strides[k])
                view = np.lib.stride_tricks.as_strided(flat[int(b.starts[k]) :], tuple(b.sizes[k]), steps)
                view[...] = whole[box]
            assert not np.isnan(flat).any()
            shards[name.removeprefix(prefix)] = torch.from_numpy(flat.reshape(held.shape))
        out.append(shards)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of (tokens, heads, dim) with fewer key heads, without rotary positions: (tokens, heads * dim)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(LENGTH, LENGTH, dtype=q.dtype).masked_fill(~causal, float("-inf"))
    if bias is not None:
        mask = mask + bias
    out = scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask, scale=scale)
    return out.transpose(0, 1).reshape(LENGTH, -1)


def model(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    module = MODELS[name].make("cpu", **more).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def inputs(width: int = 24) -> Tensor:
    return torch.randn(LENGTH, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def causal() -> Tensor:
    blocked = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(blocked, float("-inf"))


def no_rotation(dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin at position 0 for every token: the rotary embedding turns nothing."""
    shape = (1, LENGTH, dim)
    return torch.ones(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)


def agrees(parts: list[Tensor], whole: Tensor, bias: Tensor | None = None, near: float = 1e-9) -> None:
    total = torch.stack(parts).sum(0) + (0 if bias is None else bias)
    torch.testing.assert_close(total, whole.detach().reshape(total.shape), rtol=near, atol=near)


def heads(x: Tensor, dim: int) -> Tensor:
    return x.reshape(LENGTH, -1, dim)


MESHES = [(2, "exact"), (3, "balanced")]  # 3 ranks for 2 or 4 heads: unevenly, and one of them may hold nothing


@pytest.mark.parametrize(("tp", "rule"), MESHES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_attention_of_separate_projections(name: str, tp: int, rule: str) -> None:
    module = model(name)
    attention = module.model.layers[0].self_attn
    x, dim = inputs(), attention.head_dim
    whole = attention(x[None], position_embeddings=no_rotation(dim), attention_mask=causal())[0][0]
    parts = []
    for s in cut_model(module, MODELS[name].spec, "model.layers.0.self_attn.", {"tp": tp}, rule):
        q, k, v = (heads(x @ s[f"{n}_proj.weight"].T + s.get(f"{n}_proj.bias", 0), dim) for n in "qkv")
        if "q_norm.weight" in s:
            eps = module.config.rms_norm_eps
            q, k = (
                y * (y.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * s[f"{n}_norm.weight"]
                for y, n in ((q, "q"), (k, "k"))
            )
        if k.shape[1]:
            parts.append(attend(q, k, v) @ s["o_proj.weight"].T)
    agrees(parts, whole, near=FLOAT32 if name == "qwen3" else 1e-9)


@pytest.mark.parametrize(("tp", "rule"), MESHES)
def test_fused_attention_and_mlp_of_phi3(tp: int, rule: str) -> None:
    module = model("phi3")
    layer, x = module.model.layers[0], inputs()
    dim = layer.self_attn.head_dim
    whole = layer.self_attn(x[None], position_embeddings=no_rotation(dim), attention_mask=causal())[0][0]
    attention, mlp = [], []
    for s in cut_model(module, "phi3", "model.layers.0.", {"tp": tp}, rule):
        y = x @ s["self_attn.qkv_proj.weight"].T
        rows = y.shape[1] // 5  # 3 query heads, a key and a value head for each group
        q, k, v = (heads(t, dim) for t in y.split([3 * rows, rows, rows], 1))
        if rows:
            attention.append(attend(q, k, v) @ s["self_attn.o_proj.weight"].T)
        gate, up = (x @ s["mlp.gate_up_proj.weight"].T).chunk(2, 1)
        mlp.append((up * silu(gate)) @ s["mlp.down_proj.weight"].T)
    agrees(attention, whole)
    agrees(mlp, layer.mlp(x))


@pytest.mark.parametrize(("tp", "rule"), MESHES)
def test_interleaved_attention_of_gpt_neox(tp: int, rule: str) -> None:
    module = model("gpt_neox", rotary_pct=0.5)
    attention, x, dim = module.gpt_neox.layers[0].attention, inputs(), 6
    whole = attention(x[None], attention_mask=causal(), position_embeddings=no_rotation(2))[0][0]
    parts = []
    for s in cut_model(module, "gpt_neox", "gpt_neox.layers.0.attention.", {"tp": tp}, rule):
        y = heads(x @ s["query_key_value.weight"].T + s["query_key_value.bias"], 3 * dim)
        parts.append(attend(*y.chunk(3, 2)) @ s["dense.weight"].T)
    agrees(parts, whole, attention.dense.bias)


@pytest.mark.parametrize(("tp", "rule"), MESHES)
def test_interleaved_attention_of_bloom(tp: int, rule: str) -> None:
    module = model("bloom")
    attention, x, dim = module.transformer.h[0].self_attention, inputs(), 6
    whole = attention(
        x[None],
        torch.zeros(1, LENGTH, 24, dtype=torch.float64),
        torch.zeros(4, 1, LENGTH, dtype=torch.float64),
        causal(),
    )[0][0]
    parts = []
    for s in cut_model(module, "bloom", "transformer.h.0.self_attention.", {"tp": tp}, rule):
        y = heads(x @ s["query_key_value.weight"].T + s["query_key_value.bias"], 3 * dim)
        parts.append(attend(*y.chunk(3, 2)) @ s["dense.weight"].T)
    agrees(parts, whole, attention.dense.bias, FLOAT32)


@pytest.mark.parametrize(("tp", "rule"), MESHES)
def test_attention_and_mlp_of_gpt2(tp: int, rule: str) -> None:
    module = model("gpt2-untied")
    block, x, dim = module.transformer.h[0], inputs(), 6
    whole = block.attn(x[None], attention_mask=causal())[0][0]
    attention, mlp = [], []
    for s in cut_model(module, "gpt2", "transformer.h.0.", {"tp": tp}, rule):
        y = x @ s["attn.c_attn.weight"] + s["attn.c_attn.bias"]
        attention.append(attend(*(heads(t, dim) for t in y.chunk(3, 1))) @ s["attn.c_proj.weight"])
        mlp.append(block.mlp.act(x @ s["mlp.c_fc.weight"] + s["mlp.c_fc.bias"]) @ s["mlp.c_proj.weight"])
    agrees(attention, whole, block.attn.c_proj.bias)
    agrees(mlp, block.mlp(x), block.mlp.c_proj.bias)


@pytest.mark.parametrize(("tp", "rule"), MESHES)
def test_latent_attention_of_deepseek(tp: int, rule: str) -> None:
    module = model("deepseek_v3", rope_interleave=False)
    attention, x = module.model.layers[0].self_attn, inputs()
    whole = attention(x[None], position_embeddings=no_rotation(6), attention_mask=causal())[0][0]

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    parts = []
    for s in cut_model(module, "deepseek_v3", "model.layers.0.self_attn.", {"tp": tp}, rule):
        latent = norm(x @ s["q_a_proj.weight"].T, s["q_a_layernorm.weight"])
        q = heads(latent @ s["q_b_proj.weight"].T, 16)
        kv, rope = (x @ s["kv_a_proj_with_mqa.weight"].T).split([13, 6], 1)
        y = heads(norm(kv, s["kv_a_layernorm.weight"]) @ s["kv_b_proj.weight"].T, 17)
        nope, v = y.split([10, 7], 2)
        k = torch.cat([nope, heads(rope, 6).expand(-1, q.shape[1], -1)], 2)
        parts.append(attend(q, k, v, scale=attention.scaling) @ s["o_proj.weight"].T)
    agrees(parts, whole, near=FLOAT32)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 3), (2, 2)])
def test_experts_over_ep_and_tp(name: str, tp: int, ep: int) -> None:
    """Every expert's output, from the rank that holds it, summed over its tp ranks."""
    module = model(name)
    module.config._experts_implementation = "eager"  # the others have no float64
    index = 1 if name == "deepseek_v3" else 0
    experts = module.model.layers[index].mlp.experts
    bound = bind(shipped.find(MODELS[name].spec), config_of(module))
    x = inputs()
    count = experts.gate_up_proj.shape[0]
    found = {n: bound.find(f"model.layers.{index}.mlp.experts.{n}") for n in ("gate_up_proj", "down_proj")}
    seen: dict[int, Tensor] = {}
    cutting = Cutting({"tp": tp, "ep": ep}, "balanced")
    for e in range(ep):
        for r in range(tp):
            held = {}
            for n, f in found.items():
                assert f is not None
                s = shard(f.expression, bound.sizes, cutting, {"ep": e, "tp": r})
                flat = torch.full((int(np.prod(s.shape)),), float("nan"), dtype=torch.float64)
                for k in range(len(s.blocks)):
                    box = tuple(slice(o, o + m) for o, m in zip(s.blocks.offsets[k], s.blocks.sizes[k], strict=True))
                    view = flat.as_strided(
                        tuple(s.blocks.sizes[k].tolist()), tuple(s.blocks.strides[k].tolist()), int(s.blocks.starts[k])
                    )
                    view.copy_(getattr(experts, n).detach()[box])
                held[n] = flat.reshape(s.shape)
            first = sum(-(-(count - p) // ep) for p in range(e))
            for j in range(held["gate_up_proj"].shape[0]):
                gate, up = (x @ held["gate_up_proj"][j].T).chunk(2, 1)
                part = (silu(gate) * up) @ held["down_proj"][j].T
                seen[first + j] = seen.get(first + j, torch.zeros(())) + part
    assert sorted(seen) == list(range(count))
    for j in range(count):
        chosen = torch.full((LENGTH, 1), j)
        whole = experts(x, chosen, torch.ones(LENGTH, 1, dtype=torch.float64))
        torch.testing.assert_close(seen[j], whole.detach(), rtol=1e-9, atol=1e-9)
