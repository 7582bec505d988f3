"""Beside mergekit on the same three small Llamas, as folders that transformers wrote.

mergekit adds in float32, so its fp32 results differ from the exact ones in the last bit. Where it rounds once there is
no difference, and its TIES keeps the same elements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ucp
from ucp.merging import merge

pytestmark = pytest.mark.slow
WIDTHS = 2.5e-7
"""Of each tensor's maximum: what float32 arithmetic may differ by."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return {dtype: made(tmp_path_factory.mktemp(dtype), dtype) for dtype in ("float32", "bfloat16")}


def made(folder: Path, dtype: str) -> list[Path]:
    """Three models that differ a little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = []
    for k in range(3):
        torch.manual_seed(k + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(start[name] + 0.02 * torch.randn(p.shape))
        out.append(folder / f"m{k}")
        model.to(getattr(torch, dtype)).save_pretrained(out[-1])
        model.float()
    return out


def theirs(folder: Path, config: dict[str, Any]) -> Path:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    (folder.parent / f"{folder.name}.yaml").write_text(yaml.safe_dump(config))
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(folder), options)
    return folder


def by_weight(models: list[Path], weights: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    return [{"model": str(m), "parameters": {"weight": w, **more}} for m, w in zip(models, weights, strict=True)]


def cases(m: list[Path]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    base = str(m[0])
    return {
        "linear": (
            {"merge_method": "linear", "models": by_weight(m, (1, 2, 3))},
            {"sources": m, "weights": (1, 2, 3)},
        ),
        "linear, as given": (
            {"merge_method": "linear", "models": by_weight(m[:2], (0.7, -0.2)), "parameters": {"normalize": False}},
            {"sources": m[:2], "weights": (0.7, -0.2), "normalize": False},
        ),
        "slerp": (
            {
                "merge_method": "slerp",
                "base_model": base,
                "models": [{"model": str(x)} for x in m[:2]],
                "parameters": {"t": 0.3},
            },
            {"sources": m[:2], "method": "slerp", "t": (0.3,)},
        ),
        "task": (
            {"merge_method": "task_arithmetic", "base_model": base, "models": by_weight(m[1:], (0.5, 0.5))},
            {"sources": m[1:], "method": "task", "base": m[0], "weights": (0.5, 0.5)},
        ),
        "ties": (
            {"merge_method": "ties", "base_model": base, "models": by_weight(m[1:], (0.5, 0.3), density=0.4)},
            {"sources": m[1:], "method": "ties", "base": m[0], "weights": (0.5, 0.3), "density": 0.4},
        ),
    }


# Not slerp from bf16 files: what mergekit makes of those is up to 2.9e-7 off.
BOTH = [(which, dtype) for which in ("linear", "linear, as given", "task", "ties") for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("which", "dtype"), [*BOTH, ("slerp", "float32")])
def test_mergekit(models: dict[str, list[Path]], which: str, dtype: str, tmp_path: Path) -> None:
    sources = models[dtype]
    config, settings = cases(sources)[which]
    # From bf16 files mergekit is asked for fp32 results, too: what it rounds once is compared to the bit.
    peer = theirs(tmp_path / "theirs", {**config, "dtype": "float32"})
    merge(dest=tmp_path / "ours", to="huggingface", like=sources[0], dtype="fp32", **settings)
    exact = dtype == "bfloat16" and which in ("linear", "task")
    with ucp.open(peer) as one, ucp.open(tmp_path / "ours") as other, ucp.open(sources[0]) as base:
        assert set(one.parameters) == set(other.parameters)
        assert len(one.parameters) == 21
        for name in one.parameters:
            a, b = one.read(name), other.read(name)
            assert a.dtype == b.dtype == torch.float32
            unsure = torch.zeros_like(a, dtype=torch.bool)
            if which == "ties":
                # Of equal magnitudes at the threshold mergekit takes any, we the first; all others are the same ones.
                unsure = at_threshold(name, sources, 0.4)
                start = base.read(name).float()
                assert torch.equal(((a != start) | unsure), ((b != start) | unsure)), name
            if exact:
                assert torch.equal(a, b), name
            else:
                assert ((a - b).abs() * ~unsure).max() <= WIDTHS * b.abs().max(), name


def at_threshold(name: str, sources: list[Path], density: float) -> torch.Tensor:
    """The elements of which the magnitude of some difference is that of the last one that is kept."""
    read = []
    for source in sources:
        with ucp.open(source) as checkpoint:
            read.append(checkpoint.read(name).double())
    out = torch.zeros_like(read[0], dtype=torch.bool)
    for tensor in read[1:]:
        size = (tensor - read[0]).abs()
        out |= size == size.flatten().sort(descending=True).values[int(density * size.numel()) - 1]
    return out


def test_mergekit_rounds_to_bf16_as_we_do(models: dict[str, list[Path]], tmp_path: Path) -> None:
    sources = models["bfloat16"]
    peer = theirs(tmp_path / "theirs", {**cases(sources)["linear"][0], "dtype": "bfloat16"})
    merge(sources, tmp_path / "ours", to="huggingface", like=sources[0], weights=(1, 2, 3))
    with ucp.open(peer) as one, ucp.open(tmp_path / "ours") as other:
        for name in one.parameters:
            assert torch.equal(one.read(name), other.read(name)), name
