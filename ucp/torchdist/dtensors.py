"""Which elements of a tensor this rank holds in a DTensor (FSDP2, HSDP, tensor parallelism, and all of them together).

A DTensor's placements cut a tensor one mesh dimension after the other, each what the one before has left: ``Shard``
into chunks of ``ceil(length / ranks)`` elements, the last ones shorter or empty; ``_StridedShard`` (FSDP2 over tensor
parallelism) first into ``split_factor`` such pieces, of each of which a rank has its chunk
(torch/distributed/tensor/placement_types.py). So along each dimension a rank has a few ranges, and its shard is their
product.

One thing the placements do not say: where FSDP2 cuts what tensor parallelism has left
(torch/distributed/fsdp/_fully_shard/_fsdp_param.py), a length that does not divide evenly leaves shards that are not
those that the placements mean from left to right. A ``_StridedShard`` whose factor is the number of shards made by the
mesh dimensions after it is FSDP2's, and is therefore cut last. The two readings never agree in all ranks' shapes unless
they agree in the elements, and all shapes are checked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ucp.errors import Unsupported
from ucp.geometry import Blocks, Ints, Shape, empty, numel, row_major, whole
from ucp.parallel.mesh import Layout

Ranges = list[tuple[int, int]]  # (first, count) in the whole tensor, in the order in which the shard has them


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank: a DTensor's shard, any other tensor itself. Detached."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():  # five times as quick: no autograd function is applied
            return local_tensor(tensor)
    return tensor.to_local().detach()


def blocks_of(name: str, tensor: torch.Tensor) -> Blocks:
    """The blocks of the whole tensor in this rank's row-major memory; of a tensor that is no DTensor, all of it.

    Raises Unsupported for placements that are not known, and where a shard has another shape than they say.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return _whole(shape)
    mesh = mesh_shape(tensor.device_mesh)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return empty(len(shape))
    cuts = tuple(_of_placement(name, placement, len(shape)) for placement in tensor.placements)
    sizes, blocks = _held(shape, cuts, mesh, tuple(coordinate))
    found = tuple(local_tensor(tensor).shape)
    if found != sizes and (numel(found) or numel(sizes)):
        raise Unsupported(
            f"'{name}' {list(shape)}: this rank's shard has shape {list(found)} where {tensor.placements} on a mesh of "
            f"{list(mesh)} mean {list(sizes)}; only shards as torch cuts them are supported"
        )
    return blocks


@functools.lru_cache(10_000)
def _whole(shape: Shape) -> Blocks:
    return _shared(whole(shape))


def _shared(blocks: Blocks) -> Blocks:
    """The blocks, which several tensors have and nobody may change."""
    for array in vars(blocks).values():
        array.flags.writeable = False
    return blocks


# Weakly, since a mesh keeps its process groups alive.
_shapes: WeakKeyDictionary[DeviceMesh, Shape] = WeakKeyDictionary()


def mesh_shape(mesh: DeviceMesh) -> Shape:
    """The mesh's shape, which some versions of torch take 15 µs to tell, for every tensor of a model."""
    shape = _shapes.get(mesh)
    if shape is None:
        shape = _shapes[mesh] = tuple(mesh.shape)
    return shape


# The ranks of a mesh that hold the same as this one, by the mesh dimensions that cut.
_holders: WeakKeyDictionary[DeviceMesh, dict[tuple[bool, ...], tuple[int, ...]]] = WeakKeyDictionary()


def holders_of(tensor: torch.Tensor, world: int) -> tuple[int, ...]:
    """The global ranks that hold the same elements of a tensor as this one, ascending: of one that is no DTensor, all;
    () where this rank holds none of it. world: the number of all ranks."""
    if not isinstance(tensor, DTensor):
        return tuple(range(world))
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    cut = tuple(not isinstance(placement, Replicate) for placement in tensor.placements)
    known = _holders.setdefault(tensor.device_mesh, {})
    if cut not in known:
        place = tuple(index if cuts else slice(None) for index, cuts in zip(coordinate, cut, strict=True))
        known[cut] = tuple(sorted(tensor.device_mesh.mesh[place].reshape(-1).tolist()))
    return known[cut]


def layout_of(values: Iterable[Any], world: int) -> Layout:
    """The layout, as far as meshes tell it: 'tp' by its name, all other ranks data parallel; sharded there: stage 3.

    values: among them the DTensors. world: the number of all ranks.
    """
    tp, sharded = 1, False
    for tensor in values:
        if not isinstance(tensor, DTensor):
            continue
        names = tensor.device_mesh.mesh_dim_names or ("",) * tensor.device_mesh.ndim
        for name, size, placement in zip(names, mesh_shape(tensor.device_mesh), tensor.placements, strict=True):
            if name == "tp":
                tp = max(tp, size)
            elif isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard":
                sharded = True
    return Layout(dp=max(world // tp, 1), tp=tp if world % tp == 0 else 1, zero=3 if sharded else 0)


def shard_ranges(
    name: str, shape: Sequence[int], placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]
) -> list[Ranges]:
    """For each dimension the ranges that the rank at this coordinate of the mesh holds."""
    return _ranges(shape, [_of_placement(name, placement, len(shape)) for placement in placements], mesh, coordinate)


@functools.lru_cache(10_000)
def _held(shape: Shape, cuts: tuple[_Placement | None, ...], mesh: Shape, coordinate: Shape) -> tuple[Shape, Blocks]:
    """The shard's shape and blocks. A model has few kinds of tensors, and every save asks for each of them again. Known
    by the cuts: which placements are equal is torch's business."""
    ranges = _ranges(shape, cuts, mesh, coordinate)
    return tuple(sum(count for _, count in along) for along in ranges), _shared(product(ranges))


def _ranges(
    shape: Sequence[int], cuts: Sequence[_Placement | None], mesh: Sequence[int], coordinate: Sequence[int]
) -> list[Ranges]:
    ranges: list[Ranges] = [[(0, int(size))] for size in shape]
    for k in _order(cuts, mesh):
        cut = cuts[k]
        if cut is not None:
            pieces = 1 if _comes_last(cuts, mesh, k) else cut.pieces
            ranges[cut.axis] = _cut(ranges[cut.axis], pieces, int(mesh[k]), int(coordinate[k]))
    return ranges


@dataclass(frozen=True)
class _Placement:
    """A placement that cuts. pieces: into how many a dimension is cut before each of them is shared out."""

    axis: int
    pieces: int


def _of_placement(name: str, placement: Any, ndim: int) -> _Placement | None:
    if isinstance(placement, Replicate):
        return None
    strided = type(placement).__name__ == "_StridedShard"
    if not (strided or isinstance(placement, Shard)):
        raise Unsupported(
            f"'{name}' is placed as {placement!r}, whose values are not those of the whole tensor; redistribute it to "
            "Shard or Replicate first"
        )
    return _Placement(int(placement.dim) % max(ndim, 1), int(placement.split_factor) if strided else 1)


def _comes_last(cuts: Sequence[_Placement | None], mesh: Sequence[int], k: int) -> bool:
    """Whether it is FSDP2's cut of what later mesh dimensions have left."""
    cut = cuts[k]
    if cut is None or cut.pieces == 1:
        return False
    later = [int(n) for other, n in zip(cuts[k + 1 :], mesh[k + 1 :], strict=True) if other and other.axis == cut.axis]
    return cut.pieces == numel(later)


def _order(cuts: Sequence[_Placement | None], mesh: Sequence[int]) -> list[int]:
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
    """The index-th chunk of so many, as ``torch.chunk`` makes them."""
    size = -(-length // count)
    return min(index * size, length), min((index + 1) * size, length)


def _slice(ranges: Ranges, first: int, last: int) -> Ranges:
    """The elements ``[first, last)`` of what the ranges hold one after the other; neighbours joined."""
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
