"""Affine maps as DeepSpeed has them (``checkpoint/affine.py``, version 1): which pieces of a tensor lie where.

A map lists, for every rank, the shape of its shard and the pieces in it: a box of the whole tensor by an offset and
strides, in elements, in the tensor and in the shard. DeepSpeed's planner (``checkpoint/affine_transfer.py``) takes only
shards with the tensor's number of dimensions, whose pieces fill them.

What lies in a flat buffer of ZeRO's is a range of a tensor's row-major order: at most 2d - 1 boxes. So each box is a
holder of its own in the map, with a shard of its own shape; beside the map stands where the holder's elements lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.geometry import Blocks, Shape, packed, row_major
from ucp.storage.dtypes import itemsize

VERSION = 1
INFO_VERSION = 0.4
"""The versions of the map and of the ``universal_checkpoint_info`` that DeepSpeed 0.19 knows."""


def pattern(name: str) -> str:
    """The regular expression by which DeepSpeed finds a parameter's entry."""
    return f"^{re.escape(name)}$"


def entry(shape: Shape, shards: Sequence[tuple[Shape, Blocks]]) -> dict[str, Any]:
    """One parameter's map. shards: of each rank, its shape and which boxes lie where in its row-major order."""
    outer = row_major(shape)
    boxes = [list(_boxes(blocks)) for _, blocks in shards]
    holders: dict[tuple[Shape, Shape], list[int]] = {}
    for rank, held in enumerate(boxes):
        for offsets, sizes, _, _ in held:
            holders.setdefault((offsets, sizes), []).append(rank)
    ranks = {}
    for rank, ((shard, _), held) in enumerate(zip(shards, boxes, strict=True)):
        pieces = [
            {
                "shape": list(sizes),
                "source": [sum(o * s for o, s in zip(offsets, outer, strict=True)), list(outer)],
                "dest": [start, list(strides)],
                "locations": holders[offsets, sizes],
            }
            for offsets, sizes, start, strides in held
        ]
        ranks[rank] = {"shard_shape": list(shard), "pieces": pieces}
    return {"logical_shape": list(shape), "ranks": ranks}


def _boxes(blocks: Blocks) -> Iterable[tuple[Shape, Shape, int, Shape]]:
    rows = (blocks.offsets.tolist(), blocks.sizes.tolist(), blocks.starts.tolist(), blocks.strides.tolist())
    return ((tuple(o), tuple(n), start, tuple(s)) for o, n, start, s in zip(*rows, strict=True))


def info(maps: Mapping[str, Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A ``universal_checkpoint_info`` with the maps of these parameters. more: other keys of it."""
    params = {pattern(name): found for name, found in maps.items()}
    return {
        "universal_checkpoint_version": INFO_VERSION,
        **more,
        "affine_map": {"version": VERSION, "params": params},
    }


def lowered(tensor: LogicalTensor, files: Sequence[str]) -> dict[str, Any]:
    """A tensor's map with a holder for each of its fragments, and under ``holders`` where that one lies.

    files: the names of the catalog's files. A holder's elements are those of a view of its file: of ``dtype``, from
    byte ``offset`` on, with the shard's shape and ``strides`` in elements.
    """
    width, holders = itemsize(tensor.dtype), {}
    shards: list[tuple[Shape, Blocks]] = []
    for k, (_, sizes, start, strides) in enumerate(_boxes(tensor.blocks)):
        shards.append((sizes, packed(tensor.blocks.take(np.array([k])))))
        holders[k] = {
            "file": files[int(tensor.blocks.buffers[k])],
            "dtype": tensor.dtype,
            "offset": int(tensor.bases[k]) + start * width,
            "strides": list(strides),
        }
    return {**entry(tensor.shape, shards), "holders": holders}
