"""Optimizer states of few bits: codes and scales come back bit for bit where cuts are on blocks, else by request only.

torchao and bitsandbytes are no requirements of the tests; without them these are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ucp
from tests.engines.pool import RankPool
from tests.torchdist import quantised_jobs
from ucp.errors import Mismatch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao_under_fsdp2_on_other_ranks(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao")
    truth, losses = ranks.run(quantised_jobs.saved, kind, str(tmp_path / "saved"), 2, world_size=2)[0]
    assert any(key.endswith(":scale") for key in truth)
    for world in (1, 2):
        found, further = ranks.run(quantised_jobs.resumed, kind, str(tmp_path / "saved"), world, world_size=world)[0]
        assert isinstance(found, dict), found
        assert found.keys() == truth.keys()
        for key, tensor in truth.items():
            assert torch.equal(found[key], tensor), key
        assert further == losses if world == 2 else further == pytest.approx(losses, abs=5e-5)
    if kind == "AdamW8bit":
        plain, changes = ranks.run(quantised_jobs.dequantised, str(tmp_path / "saved"), 1, world_size=1)[0]
        assert "are float32 now, exactly" in changes[0]
        for key, codes in truth.items():
            if key.endswith(":codes"):
                name = key.removesuffix("codes")
                exact = truth[f"{name}qmap"][codes.int()].view(-1, 256) * truth[f"{name}scale"][:, None]
                assert torch.equal(plain[name], exact.view(codes.shape)), key


@pytest.mark.slow
def test_cuts_inside_blocks_are_refused_with_the_boundary(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    ranks.run(quantised_jobs.saved, "AdamW8bit", str(tmp_path / "saved"), 1, world_size=1)
    found = ranks.run(quantised_jobs.resumed, "AdamW8bit", str(tmp_path / "saved"), 3, world_size=3)
    # torchao itself quantises on those ranks alone whose piece is whole blocks, so ranks refuse in their own words.
    assert all(isinstance(said, str) for said, _ in found)
    assert any("blocks of 256 elements" in said and "unequal rows" in said for said, _ in found)


def eight_bits() -> tuple[nn.Module, torch.optim.Optimizer]:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 5))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-2)
    return model, optimizer


@pytest.mark.slow
def test_bitsandbytes_comes_back_and_goes_on_in_a_plain_adamw(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = eight_bits()
    quantised_jobs.train(model, optimizer, range(3))
    ucp.save_training(tmp_path / "saved", model=model, optimizer=optimizer, step=3)
    had = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    again, resumed = eight_bits()
    ucp.load_training(tmp_path / "saved", model=again, optimizer=resumed)
    for name, p in again.named_parameters():
        for state, value in had[name].items():
            found = resumed.state[p][state]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, (name, state)
    plain, _ = eight_bits()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with pytest.raises(Mismatch):
        ucp.load_training(tmp_path / "saved", model=plain, optimizer=adamw)
    changes = {"states": "dequantised"}
    report = ucp.load_training(tmp_path / "saved", model=plain, optimizer=adamw, changes=changes)
    import bitsandbytes.functional as functional

    for name, p in plain.named_parameters():
        for number, state in ((1, "exp_avg"), (2, "exp_avg_sq")):
            value = had[name][f"state{number}"]
            if value.dtype == torch.uint8:
                qmap, absmax = had[name][f"qmap{number}"], had[name][f"absmax{number}"]
                value = functional.dequantize_blockwise(value, absmax=absmax, code=qmap, blocksize=256)
            assert torch.equal(adamw.state[p][state], value), (name, state)
    assert "float32 now, exactly" in report.tensors.changes[0]
    ucp.convert(tmp_path / "saved", tmp_path / "out", changes=changes)
    with ucp.open(tmp_path / "out") as out:
        assert torch.equal(out.read("0.weight", "exp_avg"), adamw.state[plain[0].weight]["exp_avg"])
        assert out.parameters["2.weight"].states["exp_avg_sq"] == "float32"
