"""Model folders with FP8 blocks and MXFP4, against what transformers makes of them and the published arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ucp
from tests.formats.huggingface.test_read import own
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.inspection.verify import verify

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def fp8(method: str = "fp8", block: Any = (128, 128)) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "weight_block_size": block}}


def every_code(*shape: int) -> Tensor:
    """A float8 tensor in which every bit pattern comes up, NaNs too."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % 256).to(torch.uint8).view(E4M3).reshape(shape)


def by_kernel(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """DeepSeek's weight_dequant, whose blocks may stick out of the tensor: each element by itself."""
    spread = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (codes.float() * spread[..., : codes.shape[-2], : codes.shape[-1]]).to(dtype)


def assert_same(found: Tensor, truth: Tensor) -> None:
    """The same bits, but any NaN for a NaN."""
    assert (found.dtype, found.shape) == (truth.dtype, truth.shape)
    assert torch.equal(found.isnan(), truth.isnan())
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    a, b = (t.contiguous().reshape(-1).view(bits)[~truth.reshape(-1).isnan()] for t in (found, truth))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 128), (128, 128)),
        ((70, 33), (16, 16)),
        ((576, 130), (128, 128)),
        ((3, 40, 24), (16, 16)),
        ((5, 7), (5, 7)),
    ],
)
def test_fp8_blocks_are_what_the_models_kernel_makes_of_them(
    shape: tuple[int, ...], block: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    codes = every_code(*shape)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = torch.randn(grid).abs() * 0.01
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales, "norm.weight": torch.ones(3)}
    path = folder(tmp_path / "in", tensors, torch_dtype=dtype, **fp8(block=block))
    truth = by_kernel(codes, scales, block, getattr(torch, dtype))
    with ucp.open(path) as checkpoint:
        assert set(checkpoint.parameters) == {"a.weight", "norm.weight"}
        assert_same(checkpoint.read("a.weight"), truth)
        part = (slice(1, 3), slice(2, 5))
        assert_same(checkpoint.read("a.weight", region=part), truth[part])
        assert_same(checkpoint.read("norm.weight"), torch.ones(3))
    if all(n % b == 0 for n, b in zip(shape[-2:], block, strict=True)):  # transformers knows no others
        assert_same(by_transformers(codes, scales, getattr(torch, dtype)), truth)


def by_transformers(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scale", ["bytes", "e8m0", "bfloat16", "one"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_scales_and_packed_codes_are_what_transformers_makes_of_them(
    scale: str, packed: bool, tmp_path: Path
) -> None:
    codes = every_code(32, 64).view(torch.int8) if packed else every_code(32, 64)
    exponents = torch.randint(110, 140, (32, 4), dtype=torch.uint8)
    scales = {
        "bytes": exponents,
        "e8m0": exponents.view(E8M0),
        "bfloat16": torch.randn(4, 2).bfloat16(),
        "one": torch.tensor([[0.37]]),
    }[scale]
    path = folder(tmp_path / "in", {"a.weight": codes, "a.weight_scale_inv": scales}, **fp8(block=None))
    with ucp.open(path) as checkpoint:
        assert_same(checkpoint.read("a.weight"), by_transformers(codes, scales, torch.bfloat16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_what_transformers_makes_of_it(dtype: str, tmp_path: Path) -> None:
    """Every exponent and every code, of those that overflow and underflow, too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 64, 4, 16), dtype=torch.uint8)
    scales = torch.arange(512).remainder(256).to(torch.uint8).reshape(2, 64, 4)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(2, 64)}
    path = folder(tmp_path / "in", tensors, dtype=dtype, quantization_config={"quant_method": "mxfp4"})
    truth = convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype))
    with ucp.open(path) as checkpoint:
        assert set(checkpoint.parameters) == {name, f"{name}_bias"}
        assert_same(checkpoint.read(name), truth)
        part = (slice(1, 2), slice(3, 70), slice(60, 64))
        assert_same(checkpoint.read(name, region=part), truth[part])
    assert verify(path).whole
    with pytest.raises(Unsupported, match="is computed as it is read"):
        ucp.convert(path, tmp_path / "virtual", virtual=True)
    ucp.convert(path, tmp_path / "out")
    with ucp.open(tmp_path / "out") as copy:
        assert_same(copy.read(name), truth)


def quantised_experts(path: Path) -> None:
    """Replace a gpt-oss folder's experts by random MXFP4 ones."""
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    rewrite(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def quantised_linears(path: Path) -> None:
    """Replace a DeepSeek-V3 folder's linear weights by FP8 blocks of 16."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if name.endswith("_proj.weight"):
            blocks = tensor.float().reshape(tensor.shape[0] // 16, 16, tensor.shape[1] // 16, 16)
            scales = blocks.abs().amax((1, 3)) / 448
            codes = blocks / scales[:, None, :, None]
            tensors[name] = codes.reshape(tensor.shape).to(E4M3)
            tensors[f"{name}_scale_inv"] = scales
    rewrite(path, tensors, {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"})


def rewrite(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, layer_types=["full_attention"] * 2))


def deepseek() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **experts, **ranks, **heads))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "quantise"), [(gpt_oss, quantised_experts), (deepseek, quantised_linears)])
def test_a_whole_model_is_what_transformers_loads(
    make: Callable[[], Any], quantise: Callable[[Path], None], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    make().bfloat16().save_pretrained(tmp_path / "in")
    quantise(tmp_path / "in")
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    truth = own(module)
    with ucp.open(tmp_path / "in") as checkpoint:
        assert set(checkpoint.parameters) == set(truth)
        for name, tensor in truth.items():
            assert_same(checkpoint.read(name).to(tensor.dtype), tensor.detach())
    ucp.convert(tmp_path / "in", tmp_path / "plain", "huggingface")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    plain = own(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    for name, tensor in truth.items():
        assert_same(plain[name].detach(), tensor.detach())


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"a.weight": every_code(32, 32)}, DamagedCheckpoint, "has no 'a.weight_scale_inv'"),
        ({"a.weight": every_code(32, 32), "a.weight_scale_inv": torch.ones(3, 2)}, DamagedCheckpoint, "belong"),
        ({"a.weight": every_code(32), "a.weight_scale_inv": torch.ones(2)}, DamagedCheckpoint, "belong together"),
        ({"a.weight": every_code(32, 32), "a.weight_scale_inv": torch.ones(0, 2)}, DamagedCheckpoint, "belong"),
        ({"a.weight": every_code(4, 4), "a.weight_scale_inv": torch.ones(1, 1).int()}, Unsupported, "int32"),
        (
            {"a_blocks": torch.ones(2, 3, 4, 16).byte(), "a_scales": torch.ones(2, 3, 5).byte()},
            DamagedCheckpoint,
            "belong together",
        ),
    ],
)  # fmt: skip
def test_codes_without_their_scales_are_refused(
    tensors: dict[str, Tensor], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        ucp.open(folder(tmp_path / "in", tensors, **fp8(block=[16, 16])))


def test_ways_that_are_not_undone_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "in", {"a.qweight": torch.ones(4, 4).int()}, **fp8("gptq"))
    with ucp.open(path) as checkpoint:
        assert checkpoint.read("a.qweight").dtype == torch.int32
    assert "quantised by 'gptq', which is not undone" in caplog.text


def test_an_empty_quantised_tensor_is_empty(tmp_path: Path) -> None:
    tensors = {"a.weight": every_code(0, 32), "a.weight_scale_inv": torch.ones(0, 2)}
    with ucp.open(folder(tmp_path / "in", tensors, **fp8(block=[16, 16]))) as checkpoint:
        assert checkpoint.read("a.weight").shape == (0, 32)


def test_a_trainers_folder_has_quantised_weights_too(tmp_path: Path) -> None:
    codes, scales = every_code(32, 32), torch.rand(2, 2)
    path = folder(tmp_path / "in", {"a.weight": codes, "a.weight_scale_inv": scales}, **fp8(block=[16, 16]))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with ucp.open(path) as checkpoint:
        assert checkpoint.format == "trainer"
        assert_same(checkpoint.read("a.weight"), by_kernel(codes, scales, (16, 16), torch.bfloat16))
