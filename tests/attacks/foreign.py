"""Small checkpoints as other programs leave them, to be attacked: the same bytes wherever they are made."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def affine(run: Path) -> None:
    """Two tensor-parallel ranks of DeepSpeed's at stage 0, whose map has parts in common, apart, and multiplied."""

    def piece(shape: list[int], source: int, dest: int, ranks: list[int], scale: float) -> dict[str, Any]:
        place = {"shape": shape, "source": [source, [6, 1]], "dest": [dest, [4, 1]], "locations": ranks}
        return place if scale == 1 else {**place, "scale": scale}

    held = {rank: [piece([4, 2], 4 * rank, 0, [rank], 1), piece([4, 2], 2, 2, [0, 1], 0.5)] for rank in range(2)}
    ranks = {rank: {"shard_shape": [4, 4], "pieces": pieces} for rank, pieces in held.items()}
    maps = {"^w$": {"logical_shape": [4, 6], "ranks": ranks}}
    folder = run / "step"
    folder.mkdir(parents=True)
    (run / "latest").write_text("step")
    for rank in range(2):
        weight = torch.full((4, 4), float(rank))
        weight[:, 2:] = 7
        state = {
            "module": {"w": weight},
            "buffer_names": [],
            "optimizer": {"state": {0: {"exp_avg": weight * 2}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            "param_shapes": None,
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "global_steps": 3,
            "dp_world_size": 1,
            "mp_world_size": 2,
            "ds_config": {},
            "ds_version": "0.19.8",
            "universal_checkpoint_info": {"affine_map": {"version": 1, "params": maps}},
        }
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")


def quantised(run: Path) -> None:
    """A model folder with FP8 blocks, packed codes and MXFP4."""
    run.mkdir(parents=True)
    codes = torch.arange(24 * 20).remainder(256).to(torch.uint8)
    tensors = {
        "a.weight": codes.view(torch.float8_e4m3fn).reshape(24, 20),
        "a.weight_scale_inv": torch.ones(3, 3),
        "b.weight": codes[:128].view(torch.int8).reshape(8, 16),
        "b.weight_scale_inv": torch.full((8, 1), 127, dtype=torch.uint8),
        "c_blocks": codes[: 2 * 3 * 2 * 16].reshape(2, 3, 2, 16),
        "c_scales": torch.full((2, 3, 2), 120, dtype=torch.uint8),
    }
    save_file({name: t.clone() for name, t in tensors.items()}, run / "model.safetensors", {"format": "pt"})
    config = {"model_type": "nobody", "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    (run / "config.json").write_text(json.dumps(config))


def shards(run: Path) -> None:
    """Two ranks' files of torch's HuggingFaceStorageWriter."""
    run.mkdir(parents=True)
    for rank, rows in enumerate((3, 2)):
        tensors = {"w": torch.full((rows, 4), float(rank)), f"own.{rank}": torch.ones(2)}
        places = {"w": {"saved_offsets": [3 * rank, 0]}, f"own.{rank}": {"saved_offsets": [0]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places)}  # one entry: safetensors writes several in any order
        save_file(tensors, run / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata)


def ranks(run: Path) -> None:
    """Two ranks' files of torch_checkpointing, and its metadata."""
    run.mkdir(parents=True)
    for rank in range(2):
        torch.save({"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, run / f"model_{rank}.pt")
        torch.save({"last_epoch": 3, "rank": rank}, run / f"lr_scheduler_{rank}.pt")
    told = {"model": {"nested_path_to_metadata": {}, "rank_to_layout_info": {0: None, 1: None}}}
    (run / "metadata.pkl").write_bytes(pickle.dumps({"metadata": told, "world_size": 2, "version": "2.0"}))


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "affine": affine,
    "quantised": quantised,
    "shards": shards,
    "ranks": ranks,
}
