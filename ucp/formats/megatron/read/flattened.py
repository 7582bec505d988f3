"""Optimizer states as Megatron-Core's releases up to 0.14 flattened them, which later ones no longer load.

A data-parallel rank kept a range of its shard's row-major elements (``flattened_range``). A tensor of several
dimensions is saved as a grid of its shards, with a last dimension for the elements of a shard; the true shape lies
beside it in the metadata (dist_checkpointing/strategies/torch.py, 0.13: ``nd_reformulated_orig_global_shape``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint
from ucp.geometry import flat_ranges, numel

_SHAPE = "nd_reformulated_orig_global_shape"


def as_they_were(stored: Mapping[str, LogicalTensor], others: Mapping[str, Any]) -> dict[str, LogicalTensor]:
    """The tensors with those that were flattened in their true shapes. others: what hangs on the metadata.

    Raises DamagedCheckpoint for a true shape that the grid does not divide.
    """
    said = others.get("mcore_data")
    shapes = {key: value.get(_SHAPE) for key, value in said.items()} if isinstance(said, Mapping) else {}
    return {key: t if shapes.get(key) is None else _whole(t, tuple(shapes[key])) for key, t in stored.items()}


def _whole(tensor: LogicalTensor, shape: tuple[int, ...]) -> LogicalTensor:
    b, grid = tensor.blocks, tensor.shape[:-1]
    local = tuple(size // max(parts, 1) for size, parts in zip(shape, grid, strict=True))
    fits = all(size == part * parts for size, part, parts in zip(shape, local, grid, strict=True))
    if not fits or numel(local) != tensor.shape[-1] or np.any(b.sizes[:, :-1] != 1):
        raise DamagedCheckpoint(
            f"'{tensor.name}' is flattened into shards of {tensor.shape[-1]} elements in a grid of {list(grid)}, which "
            f"are no shards of its shape {list(shape)}"
        )
    which = np.arange(len(b))
    placed = flat_ranges(local, b.offsets[:, -1], b.offsets[:, -1] + b.sizes[:, -1], b.starts, which)
    chunk = placed.buffers
    offsets = placed.offsets + b.offsets[chunk, :-1] * np.array(local, np.int64)
    return LogicalTensor(
        tensor.name,
        tensor.state,
        shape,
        tensor.dtype,
        replace(placed, offsets=offsets, buffers=b.buffers[chunk]),
        tensor.bases[chunk],
    )
