"""Which elements of a tensor this rank holds in a DTensor (FSDP2, HSDP, tensor parallelism, and all of them together).

The arithmetic is `ucp.parallel.placements`'.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

import torch

from ucp.errors import Unsupported
from ucp.geometry import Blocks, Shape, empty, numel, whole
from ucp.parallel.mesh import Layout
from ucp.parallel.placements import MeshCut, Ranges, product, ranges_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    """Whether this is a DTensor. Where nobody has imported them there are none, and importing them takes seconds."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory, detached: the shard of a DTensor, or the tensor itself if it is none."""
    if type(tensor) is torch.Tensor and not tensor.requires_grad:
        return tensor  # most of a state dict's are, and detaching each takes longer than all that is asked of it
    if not is_dtensor(tensor):
        return tensor.detach()
    if torch.is_grad_enabled():
        with torch.no_grad():  # five times as fast, since no autograd function is applied
            return local_tensor(tensor)
    return tensor.to_local().detach()


def blocks_of(name: str, tensor: torch.Tensor) -> Blocks:
    """The blocks of the whole tensor that this rank's row-major memory holds: all of it if the tensor is no DTensor.

    Raises Unsupported for unknown placements, and if a shard has another shape than they say.
    """
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
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
    """The blocks, made read-only, since several tensors share them."""
    for array in (blocks.offsets, blocks.sizes, blocks.starts, blocks.strides, blocks.buffers):
        array.flags.writeable = False
    return blocks


# Weakly, since a mesh keeps its process groups alive.
_shapes: WeakKeyDictionary[DeviceMesh, Shape] = WeakKeyDictionary()


def mesh_shape(mesh: DeviceMesh) -> Shape:
    """The mesh's shape, cached: some versions of torch take 15 µs to give it, and every tensor of a model asks."""
    shape = _shapes.get(mesh)
    if shape is None:
        shape = _shapes[mesh] = tuple(mesh.shape)
    return shape


# The ranks of a mesh that hold the same elements as this one, by which mesh dimensions cut the tensor.
_holders: WeakKeyDictionary[DeviceMesh, dict[tuple[bool, ...], tuple[int, ...]]] = WeakKeyDictionary()


def holders_of(tensor: torch.Tensor, world: int) -> tuple[int, ...]:
    """The global ranks that hold the same elements of a tensor as this one, ascending. For a tensor that is no DTensor
    these are all ranks; () if this rank holds none of it. world: the number of all ranks."""
    if not is_dtensor(tensor):
        return _all_ranks(world)
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    cut = tuple(not placement.is_replicate() for placement in tensor.placements)
    known = _holders.setdefault(tensor.device_mesh, {})
    if cut not in known:
        place = tuple(index if cuts else slice(None) for index, cuts in zip(coordinate, cut, strict=True))
        known[cut] = tuple(sorted(tensor.device_mesh.mesh[place].reshape(-1).tolist()))
    return known[cut]


@functools.lru_cache(16)
def _all_ranks(world: int) -> tuple[int, ...]:
    return tuple(range(world))


def layout_of(values: Iterable[Any], world: int) -> Layout:
    """The layout, as far as meshes tell it. A mesh dimension named 'tp' is tensor parallelism, and all other ranks are
    data parallel. If anything is sharded over those, it is stage 3.

    values: among them the DTensors. world: the number of all ranks.
    """
    tp, sharded = 1, False
    for tensor in filter(is_dtensor, values) if "torch.distributed.tensor" in sys.modules else ():
        names = tensor.device_mesh.mesh_dim_names or ("",) * tensor.device_mesh.ndim
        for name, size, placement in zip(names, mesh_shape(tensor.device_mesh), tensor.placements, strict=True):
            if name == "tp":
                tp = max(tp, size)
            elif _is_shard(placement):
                sharded = True
    return Layout(dp=max(world // tp, 1), tp=tp if world % tp == 0 else 1, zero=3 if sharded else 0)


def shard_ranges(
    name: str, shape: Sequence[int], placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]
) -> list[Ranges]:
    """The ranges of each dimension that the rank at this coordinate of the mesh holds."""
    return ranges_of(shape, [_of_placement(name, placement, len(shape)) for placement in placements], mesh, coordinate)


@functools.lru_cache(10_000)
def _held(shape: Shape, cuts: tuple[MeshCut | None, ...], mesh: Shape, coordinate: Shape) -> tuple[Shape, Blocks]:
    """The shard's shape and blocks. They are cached, since a model has few kinds of tensors and every save asks for
    them again. The cuts are the key, since which placements are equal is torch's business."""
    ranges = ranges_of(shape, cuts, mesh, coordinate)
    return tuple(sum(count for _, count in along) for along in ranges), _shared(product(ranges))


def _of_placement(name: str, placement: Any, ndim: int) -> MeshCut | None:
    if placement.is_replicate():
        return None
    if not _is_shard(placement):
        raise Unsupported(
            f"'{name}' is placed as {placement!r}, whose values are not those of the whole tensor; redistribute it to "
            "Shard or Replicate first"
        )
    strided = type(placement).__name__ == "_StridedShard"
    return MeshCut(int(placement.dim) % max(ndim, 1), int(placement.split_factor) if strided else 1)


def _is_shard(placement: Any) -> bool:
    """In some releases of torch a _StridedShard is a Shard, in others it is not."""
    return type(placement).__name__ == "_StridedShard" or bool(placement.is_shard())
