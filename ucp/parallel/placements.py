"""Which elements of a tensor each rank holds when a DTensor's placements share it out over a mesh.

A DTensor's placements cut a tensor one mesh dimension after the other. Each cuts what the one before it has left:

- ``Shard`` cuts it into chunks of ``ceil(length / ranks)`` elements; the last ones are shorter or empty.
- ``_StridedShard`` (FSDP2 over tensor parallelism) first cuts it into ``split_factor`` such pieces. A rank has its
  chunk of each piece (torch/distributed/tensor/placement_types.py).

So along each dimension a rank has a few ranges, and its shard is their product.

The placements leave one thing open. FSDP2 cuts what tensor parallelism has left
(torch/distributed/fsdp/_fully_shard/_fsdp_param.py). If a length does not divide evenly, its shards are not those that
the placements mean when they are read from left to right. A ``_StridedShard`` whose factor is the number of shards made
by the mesh dimensions after it is FSDP2's, and is therefore cut last. The two readings never agree in all ranks' shapes
unless they agree in the elements, and all shapes are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ucp.geometry import Blocks, Ints, empty, numel, row_major

Ranges = list[tuple[int, int]]  # (first, count) in the whole tensor, in the order in which the shard has them


@dataclass(frozen=True)
class MeshCut:
    """How a mesh dimension cuts: along which axis, and into how many pieces before each piece is shared out."""

    axis: int
    pieces: int


def ranges_of(
    shape: Sequence[int], cuts: Sequence[MeshCut | None], mesh: Sequence[int], coordinate: Sequence[int]
) -> list[Ranges]:
    """For each axis, the ranges that the rank at this coordinate of the mesh holds.

    cuts: one for each mesh dimension; None for a dimension that only replicates.
    """
    ranges: list[Ranges] = [[(0, int(size))] for size in shape]
    for k in _order(cuts, mesh):
        cut = cuts[k]
        if cut is not None:
            pieces = 1 if _comes_last(cuts, mesh, k) else cut.pieces
            ranges[cut.axis] = _cut(ranges[cut.axis], pieces, int(mesh[k]), int(coordinate[k]))
    return ranges


def _comes_last(cuts: Sequence[MeshCut | None], mesh: Sequence[int], k: int) -> bool:
    """Whether this is FSDP2's cut of what the mesh dimensions after it have left."""
    cut = cuts[k]
    if cut is None or cut.pieces == 1:
        return False
    later = [int(n) for other, n in zip(cuts[k + 1 :], mesh[k + 1 :], strict=True) if other and other.axis == cut.axis]
    return cut.pieces == numel(later)


def _order(cuts: Sequence[MeshCut | None], mesh: Sequence[int]) -> list[int]:
    """The mesh dimensions in the order in which they cut."""
    order: list[int] = []
    for k in reversed(range(len(cuts))):
        order.insert(len(order) if _comes_last(cuts, mesh, k) else 0, k)
    return order


def _cut(ranges: Ranges, pieces: int, count: int, index: int) -> Ranges:
    length = sum(n for _, n in ranges)
    out: Ranges = []
    for piece in range(pieces):
        first, last = _chunk(length, pieces, piece)
        low, high = _chunk(last - first, count, index)
        out += _slice(ranges, first + low, first + high)
    return out


def _chunk(length: int, count: int, index: int) -> tuple[int, int]:
    """The bounds of chunk ``index`` of ``count``, as ``torch.chunk`` makes them."""
    size = -(-length // count)
    return min(index * size, length), min((index + 1) * size, length)


def _slice(ranges: Ranges, first: int, last: int) -> Ranges:
    """The elements ``[first, last)`` of what the ranges hold one after the other."""
    out: Ranges = []
    at = 0
    for start, count in ranges:
        low, high = max(first - at, 0), min(last - at, count)
        if high > low:
            out.append((start + low, high - low))
        at += count
    return out


def product(ranges: Sequence[Ranges]) -> Blocks:
    """The blocks of a row-major buffer that holds, along each dimension, these ranges one after the other."""
    joined = [_joined(along) for along in ranges]
    sizes = [sum(count for _, count in along) for along in joined]
    if numel(sizes) == 0:
        return empty(len(ranges))
    d = len(joined)
    steps = np.array(row_major(sizes), np.int64)
    columns = [np.array(along, np.int64).reshape(-1, 2) for along in joined]
    grid = np.indices([len(c) for c in columns]).reshape(d, -1) if d else np.zeros((0, 1), np.int64)
    n = grid.shape[1]
    offsets, counts, starts = np.zeros((n, d), np.int64), np.ones((n, d), np.int64), np.zeros(n, np.int64)
    for k, column in enumerate(columns):
        before: Ints = np.cumsum(column[:, 1]) - column[:, 1]
        offsets[:, k], counts[:, k] = column[grid[k], 0], column[grid[k], 1]
        starts += before[grid[k]] * steps[k]
    return Blocks(offsets, counts, starts, np.tile(steps, (n, 1)), np.zeros(n, np.int64))


def _joined(ranges: Ranges) -> Ranges:
    out: Ranges = []
    for first, count in ranges:
        if out and out[-1][0] + out[-1][1] == first:
            out[-1] = (out[-1][0], out[-1][1] + count)
        elif count:
            out.append((first, count))
    return out
