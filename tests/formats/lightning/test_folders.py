"""Lightning's folder of shards and its single file, written by Lightning itself: read whole, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import ucp
from tests.formats.foreign_programs import made_by
from ucp.errors import DamagedCheckpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(foreign: Path) -> Path:
    return made_by("lightning", foreign)


def test_a_folder_of_shards_with_the_loops(folder: Path) -> None:
    meta = torch.load(folder / "meta.pt", weights_only=False)
    with ucp.open(folder) as opened:
        assert (opened.format, opened.unread) == ("lightning", ())
        assert opened.training_state.global_steps == meta["global_step"] == 2
        assert opened.training_state.client_state["loops"] == meta["loops"]
        assert opened.training_state.client_state["callbacks"] == {}
        assert set(opened.parameters["linear.weight"].states) == {"param", "exp_avg", "exp_avg_sq"}
        assert opened.training_state.param_groups[0].names == ("linear.weight", "linear.bias")


def test_meta_that_is_none(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    torch.save([1], tmp_path / "run/meta.pt")
    with pytest.raises(DamagedCheckpoint, match=r"meta\.pt: holds a list"):
        ucp.open(tmp_path / "run")


def test_the_file_is_read_whole(folder: Path) -> None:
    truth = torch.load(f"{folder}.truth.pt")
    saved = torch.load(f"{folder}.ckpt", weights_only=False)
    with ucp.open(f"{folder}.ckpt") as opened:
        assert (opened.format, opened.training_state.global_steps) == ("torch-file", 3)
        for name, states in truth.items():
            info = opened.parameters[name]
            assert info.scalars == {"step": 3.0}
            for state in info.states:
                assert torch.equal(opened.read(name, state), states[state])
            assert {*info.states, "step"} == states.keys()
        assert opened.parameters["model.1.running_var"].kind == "buffer"
        kept = opened.training_state.client_state
        assert kept["loops"] == saved["loops"]
        assert kept["hyper_parameters"] == {"width": 8}
        assert kept["epoch"] == saved["epoch"]


def test_a_program_of_its_own_goes_on_with_lightnings_losses(folder: Path) -> None:
    model = nn.Module()
    model.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    ucp.load_training(f"{folder}.ckpt", model=model, optimizer=optimizer, lr_scheduler=scheduler, rng=False)
    batch = torch.arange(32.0).reshape(4, 8) / 32
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.model(batch).pow(2).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses == json.loads(Path(f"{folder}.json").read_text())
