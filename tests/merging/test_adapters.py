"""LoRA adapters made by PEFT, merged in three ways; the truth is PEFT's own model and plain products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ucp.errors import BadArgument, Mismatch
from ucp.merging.adapters import merge_adapters

WEIGHTS = (0.5, 0.3, -0.2)


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))


def adapter(path: Path, seed: int, rank: int = 3, alpha: int = 6) -> Path:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "2"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


def deltas(path: Path) -> dict[str, np.ndarray]:
    """What PEFT adds to each weight under this adapter: the merged model's weight less the base's."""
    from peft import PeftModel

    plain = base().double()
    merged = PeftModel.from_pretrained(base().double(), path).merge_and_unload()
    found = dict(merged.named_parameters())
    return {name: (found[name] - p).detach().numpy() for name, p in plain.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 4, 3)])
def test_concatenated_is_exact(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    sources = [adapter(tmp_path / f"{k}", k, rank) for k, rank in enumerate(ranks)]
    report = merge_adapters(sources, tmp_path / "out", "concat", WEIGHTS)
    assert (report.rank, report.modules) == (sum(ranks), 2)
    given = [deltas(source) for source in sources]
    for name, delta in deltas(tmp_path / "out").items():
        expected = sum(w * each[name] for w, each in zip(WEIGHTS, given, strict=True))
        assert np.abs(delta - expected).max() <= 1e-6 * np.abs(expected).max()


def test_truncated_has_the_error_that_it_says(tmp_path: Path) -> None:
    sources = [adapter(tmp_path / f"{k}", k) for k in range(3)]
    report = merge_adapters(sources, tmp_path / "out", "delta", WEIGHTS, rank=4)
    given = [deltas(source) for source in sources]
    for name, delta in deltas(tmp_path / "out").items():
        expected = sum(w * each[name] for w, each in zip(WEIGHTS, given, strict=True))
        values = np.linalg.svd(expected, compute_uv=False)
        best = np.linalg.norm(values[4:]) / np.linalg.norm(values)
        assert np.linalg.norm(delta - expected) / np.linalg.norm(expected) == pytest.approx(best, rel=1e-4)
        module = name.removesuffix(".weight")
        assert report.errors[module] == pytest.approx(best, rel=1e-6)
    whole = merge_adapters(sources, tmp_path / "whole", "delta", WEIGHTS, rank=9)
    assert max(whole.errors.values()) < 1e-12


def test_factors_are_averaged_apart(tmp_path: Path) -> None:
    sources = [adapter(tmp_path / f"{k}", k) for k in range(2)]
    merge_adapters(sources, tmp_path / "out", "factors", (0.25, 0.75))
    a, b, out = (load_file(p / "adapter_model.safetensors") for p in (*sources, tmp_path / "out"))
    assert set(out) == set(a)
    for name, tensor in out.items():
        assert torch.equal(tensor, (0.25 * a[name].double() + 0.75 * b[name].double()).float())


def test_refusals(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "3", 0), adapter(tmp_path / "4", 1, 4)
    with pytest.raises(Mismatch, match=r"rank 3 and scale 2, .* 4 and 1.5; factors can't be averaged"):
        merge_adapters([one, other], tmp_path / "out", "factors")
    with pytest.raises(BadArgument, match="2 weights were given for 1 adapters"):
        merge_adapters([one], tmp_path / "out", weights=(1.0, 2.0))
    with pytest.raises(BadArgument, match="factors, delta, concat, found 'mean'"):
        merge_adapters([one], tmp_path / "out", "mean")
    assert not (tmp_path / "out").exists()
