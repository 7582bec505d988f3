"""Fragments as affine maps, against DeepSpeed's own planner and its own functions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ucp
from tests.formats.raw import STATES, Raw, make
from ucp.catalog import InMemory
from ucp.checkpoint import Checkpoint
from ucp.errors import BadArgument, Unsupported
from ucp.storage.files import Files


def opened(raw: Raw, path: Path) -> Checkpoint:
    return Checkpoint(path, raw.catalog, Files())


def shard(holder: dict[str, Any], shape: list[int]) -> torch.Tensor:
    """A fragment's elements from its file, with nothing of ours."""
    raw = np.fromfile(holder["file"], np.uint8)[holder["offset"] :]
    kind = getattr(torch, holder["dtype"])
    flat = torch.from_numpy(raw[: len(raw) // kind.itemsize * kind.itemsize].copy()).view(kind)
    return torch.as_strided(flat, shape, holder["strides"]).contiguous()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("dp", "stage"), [(3, 1), (4, 3)])
def test_deepspeed_rebuilds_every_tensor_from_zeros_flat_buffers(dp: int, stage: int, tmp_path: Path) -> None:
    from deepspeed.checkpoint.affine import ParamAffineMap

    raw = make(tmp_path, dp=dp, stage=stage)
    with opened(raw, tmp_path) as checkpoint:
        for state in STATES:
            maps = ucp.affine_map(checkpoint, state)["params"]
            for name, info in checkpoint.parameters.items():
                if state not in info.states or not np.prod(info.shape):
                    continue
                entry = maps[f"^{name}$".replace(".", "\\.")]
                found = ParamAffineMap.from_dict(entry)
                found.validate_coverage()
                shards = {k: shard(h, entry["ranks"][k]["shard_shape"]) for k, h in entry["holders"].items()}
                assert bits(found.rebuild(shards)) == bits(raw.tensor(name, state)), (name, state)


def test_deepspeeds_planner_moves_shards_of_one_stage_to_those_of_another(tmp_path: Path) -> None:
    from deepspeed.checkpoint.affine import ParamAffineMap
    from deepspeed.checkpoint.affine_transfer import plan_transfer

    sides = [make(tmp_path / "a", dp=3, stage=1), make(tmp_path / "b", dp=4, stage=3)]
    entries = []
    for side in sides:
        with opened(side, tmp_path) as checkpoint:
            entries.append(ucp.affine_map(checkpoint, "exp_avg")["params"])
    moved = 0
    for pattern, target in entries[1].items():
        if not np.prod(target["logical_shape"]):
            continue
        source = entries[0][pattern]
        plan = plan_transfer(ParamAffineMap.from_dict(target), ParamAffineMap.from_dict(source))
        here = {k: shard(h, source["ranks"][k]["shard_shape"]) for k, h in source["holders"].items()}
        wanted = {k: shard(h, target["ranks"][k]["shard_shape"]) for k, h in target["holders"].items()}
        there = {k: torch.zeros_like(w) for k, w in wanted.items()}
        for s in plan.segments:
            into = torch.as_strided(there[s.target_rank], s.shape, s.target_strides, s.target_offset)
            into.copy_(torch.as_strided(here[s.source_rank], s.shape, s.source_strides, s.source_offset))
        assert all(torch.equal(there[k], wanted[k]) for k in wanted)
        moved += plan.moved_elements
    assert moved == sum(int(np.prod(e["logical_shape"])) for e in entries[1].values())


def test_what_lies_in_no_file_has_no_map(tmp_path: Path) -> None:
    raw = make(tmp_path)
    with pytest.raises(BadArgument, match="no parameter has the state 'curvature'"):
        ucp.affine_map(opened(raw, tmp_path), "curvature")
    computed = {k: InMemory(b"") for k in range(len(raw.catalog.files))}
    odd = Raw(dataclasses.replace(raw.catalog, computed=computed), raw.truth)
    with pytest.raises(Unsupported, match="is computed as it is read"):
        ucp.affine_map(opened(odd, tmp_path))
