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
from ucp.errors import BadArgument, Mismatch


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
    plain, changes = ranks.run(quantised_jobs.dequantised, str(tmp_path / "saved"), 1, world_size=1)[0]
    assert "are float32 now, exactly" in changes[0]
    for key in truth:
        if key.endswith(":codes"):
            name = key.removesuffix(":codes")
            assert torch.equal(plain[f"{name}:"], float_of(truth, name, kind)), key


@pytest.mark.slow
def test_cuts_inside_blocks_are_refused_with_the_boundary(ranks: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    ranks.run(quantised_jobs.saved, "AdamW8bit", str(tmp_path / "saved"), 1, world_size=1)
    found = ranks.run(quantised_jobs.resumed, "AdamW8bit", str(tmp_path / "saved"), 3, world_size=3)
    # torchao itself quantises on those ranks alone whose piece is whole blocks, so ranks refuse in their own words.
    assert all(isinstance(said, str) for said, _ in found)
    assert any("blocks of 256 elements" in said and "unequal rows" in said for said, _ in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_states_are_quantised_again_on_request(ranks: RankPool, tmp_path: Path, kind: str) -> None:
    """Three ranks cut 128 rows inside blocks. On them torchao keeps pieces that are no whole blocks in float32."""
    pytest.importorskip("torchao")
    subclasses = [pytest.importorskip(f"torchao.optim.subclass_{bits}") for bits in ("8bit", "4bit", "fp8")]
    truth, losses = ranks.run(quantised_jobs.saved, kind, str(tmp_path / "saved"), 1, world_size=1)[0]
    whole = {key: float_of(truth, key, kind) for key in {k.rpartition(":")[0] for k in truth if k.endswith(":codes")}}
    found = ranks.run(quantised_jobs.requantised, kind, str(tmp_path / "saved"), 3, world_size=3)
    zeros = {"AdamW8bit": "OptimState8bit", "AdamW4bit": "OptimState4bit", "AdamWFp8": "OptimStateFp8"}[kind]
    again = 0
    for rank, (pairs, changes, further) in enumerate(found):
        assert "quantised again in this layout's blocks: no element changed by more than" in changes[-1]
        assert further == pytest.approx(losses, abs=5e-3)
        for name, state, own, quantised in pairs:
            if f"{name}:{state}" not in whole:
                continue
            rows = whole[f"{name}:{state}"].chunk(3)[rank]
            if quantised:
                again += 1
                theirs = next(getattr(module, zeros) for module in subclasses if hasattr(module, zeros))
                options = {} if kind == "AdamWFp8" else {"signed": state == "exp_avg"}
                rows = theirs.zeros(rows.shape, **options).copy_(rows).dequantize()
            assert torch.equal(own, rows), (rank, name, state)
    assert again
    with pytest.raises(BadArgument, match="is for load_training with an optimizer that quantises"):
        ucp.convert(tmp_path / "saved", tmp_path / "out", changes={"states": "requantised"})


def float_of(truth: dict[str, torch.Tensor], key: str, kind: str) -> torch.Tensor:
    """What a quantised state stands for, by each kind's own words."""
    codes, scale = truth[f"{key}:codes"], truth[f"{key}:scale"]
    shape = truth[f"{key.partition(':')[0]}:param:"].shape
    if kind == "AdamWFp8":
        return (codes.view(torch.float8_e4m3fn).float().view(len(scale), -1) * scale[:, None]).view(shape)
    if kind == "AdamW4bit":
        codes = torch.stack([codes >> 4, codes & 15], dim=-1)
    return (truth[f"{key}:qmap"][codes.int()].view(len(scale), -1) * scale[:, None]).view(shape)


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
