"""What torch's rarer writers leave, made by torch on two ranks: its Hugging Face shards, safetensors in DCP, FSDP1's
flat parameters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ucp
from tests.engines.pool import RankPool
from tests.formats import foreign_jobs
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.huggingface.sharded import parts


@pytest.mark.slow
def test_every_ranks_shards_are_one_model(ranks: RankPool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = ranks.run(foreign_jobs.torch_writers, str(tmp_path), world_size=2)[0]
    with ucp.open(tmp_path / "shards") as checkpoint:
        assert checkpoint.format == "huggingface"
        assert set(checkpoint.parameters) == set(whole)
        for name, tensor in whole.items():
            assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(checkpoint.read("model.rows", region=(slice(2, 6),)), whole["model.rows"][2:6])
        assert "nothing says how many ranks wrote these shards" in " ".join(checkpoint.catalog.unchecked)
    ucp.convert(tmp_path / "shards", tmp_path / "out", "huggingface")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    with ucp.open(tmp_path / "safetensors") as checkpoint:
        assert checkpoint.format == "dcp"
        for name, tensor in whole.items():
            assert torch.equal(checkpoint.read(name), tensor), name
    ranks.run(foreign_jobs.fsdp1_local, str(tmp_path / "local"), world_size=2)
    with pytest.raises(Unsupported, match=r"'model\._flat_param' is FSDP1's flat parameter"):
        ucp.open(tmp_path / "local")


def shard(folder: Path, rank: int, tensors: dict[str, torch.Tensor], offsets: Any) -> Path:
    """A rank's file as torch's writer lays it out."""
    folder.mkdir(exist_ok=True)
    info = offsets if isinstance(offsets, str) else json.dumps({n: {"saved_offsets": o} for n, o in offsets.items()})
    path = folder / f"shard-{rank:05d}-model-00001-of-00001.safetensors"
    save_file(tensors, path, {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0", "format": "pt"})
    return path


def two(folder: Path) -> Path:
    shard(folder, 1, {"w": torch.ones(3, 4)}, {"w": [0, 0]})
    shard(folder, 2, {"w": torch.ones(2, 4)}, {"w": [3, 0]})
    return folder


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with ucp.open(two(tmp_path / "good")) as checkpoint:
        assert checkpoint.parameters["w"].shape == (5, 4)
    for name, offsets, message in (
        ("hole", {"w": [4, 0]}, "elements are missing"),
        ("overlap", {"w": [2, 0]}, "held more than once"),
        ("nowhere", {}, "does not say where its part of 'w'"),
        ("dimensions", {"w": [3]}, "does not say where its part of 'w'"),
        ("negative", {"w": [-3, 0]}, "does not say where its part of 'w'"),
        ("huge", {"w": [1 << 70, 0]}, "does not say where its part of 'w'"),
        ("text", "[[[", "has no readable 'DCP_SHARDING_INFO'"),
        ("list", "[1]", "has no readable 'DCP_SHARDING_INFO'"),
    ):
        shard(two(tmp_path / name), 2, {"w": torch.ones(2, 4)}, offsets)
        with pytest.raises(DamagedCheckpoint, match=message):
            ucp.open(tmp_path / name)
    shard(two(tmp_path / "type"), 2, {"w": torch.ones(2, 4).half()}, {"w": [3, 0]})
    with pytest.raises(DamagedCheckpoint, match="other types"):
        ucp.open(tmp_path / "type")


def test_a_missing_ranks_file_is_named(tmp_path: Path) -> None:
    folder = two(tmp_path / "run")
    shutil.move(
        folder / "shard-00002-model-00001-of-00001.safetensors", folder / "shard-00003-model-00001-of-00001.safetensors"
    )
    with pytest.raises(DamagedCheckpoint, match="none of rank 2"):
        ucp.open(folder)
    assert parts(tmp_path) == {}
