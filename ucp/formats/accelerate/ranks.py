"""One file for each rank, by torch.save: a state dict whose DTensors have that rank's part of every tensor.

Accelerate writes these for FSDP2 if planning by torch.distributed.checkpoint takes too long, and can only read them
back on the same ranks. Its placements and the rank's place in the mesh say which part of the tensor a rank has, as for
a live DTensor. If several ranks hold the same elements, the first of them are read. They are compared by the CRC-32s
of their records, which costs nothing, and by their bytes where these differ or the records hold more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.shared.builder import Builder
from ucp.geometry import Blocks, Shape, concat
from ucp.parallel.placements import MeshCut, product, ranges_of
from ucp.printable import short
from ucp.storage.torch_pt.shared_out import DTENSOR, SHARDED
from ucp.storage.torch_pt.values import Standin, TensorRef


@dataclass
class _FromRanks:
    """A tensor, as far as ranks' files have given parts of it. seen: places in the mesh dimensions that cut it."""

    shape: Shape
    dtype: str
    blocks: list[Blocks] = field(default_factory=list)
    bases: list[Any] = field(default_factory=list)
    seen: dict[tuple[int, ...], TensorRef] = field(default_factory=dict)


def joined(graphs: Sequence[Any], paths: Sequence[Path], builder: Builder, different: list[str], name: str = "") -> Any:
    """The state dict that the ranks hold together: the first rank's, with whole DTensors (each a LogicalTensor).

    different: gets the names of whole tensors, as buffers, of which ranks have different values.

    Raises DamagedCheckpoint if the ranks' files don't belong together, Unsupported for unknown placements.
    """
    first = graphs[0]
    if isinstance(first, Standin) and (first.class_module, first.class_name) == DTENSOR:
        return _tensor(graphs, paths, builder, name)
    if isinstance(first, Standin) and (first.class_module, first.class_name) == SHARDED:
        return _sharded(graphs, paths, builder, name)
    if isinstance(first, TensorRef):
        if not all(isinstance(graph, TensorRef) and _equal(first, graph, builder) for graph in graphs[1:]):
            different.append(name)
        return first
    if isinstance(first, Mapping):
        for graph, path in zip(graphs, paths, strict=True):
            if not isinstance(graph, Mapping) or graph.keys() != first.keys():
                odd = sorted(map(short, graph.keys() ^ first.keys())) if isinstance(graph, Mapping) else [short(graph)]
                raise DamagedCheckpoint(
                    f"{path}: has other entries than '{paths[0].name}' ({', '.join(odd[:3])}); files of two runs are "
                    "mixed"
                )
        return {
            key: joined([graph[key] for graph in graphs], paths, builder, different, f"{name}.{key}".lstrip("."))
            for key in first
        }
    if isinstance(first, list):
        if any(not isinstance(graph, list) or len(graph) != len(first) for graph in graphs):
            raise DamagedCheckpoint(f"{paths[0].parent}: lists in the ranks' files are of different lengths")
        return [
            joined([graph[index] for graph in graphs], paths, builder, different, f"{name}.{index}")
            for index in range(len(first))
        ]
    return first


def differ_sentence(names: Sequence[str]) -> str:
    """What to tell of whole tensors of which ranks have different values."""
    some = ", ".join(map(repr, names[:4])) + (", …" if names[4:] else "")
    return f"ranks have different values of {len(names)} whole tensors ({some}); rank 0's are read"


def _equal(one: TensorRef, other: TensorRef, builder: Builder) -> bool:
    """Whether two tensors have the same values, as far as can be told: those with gaps are not compared by bytes."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    told = [_of_record(ref, builder) for ref in (one, other)]
    if told[0] is not None and told[0] == told[1] and one.strides == other.strides:
        return True
    if not (one.is_contiguous and other.is_contiguous):
        return True
    for at in range(0, one.nbytes, limits.RECORD_STEP_BYTES):
        raw = [bytearray(min(limits.RECORD_STEP_BYTES, one.nbytes - at)) for _ in range(2)]
        for ref, buffer in zip((one, other), raw, strict=True):
            builder.files.read_into(ref.file, ref.offset + at, buffer)
        if raw[0] != raw[1]:
            return False
    return True


def _of_record(ref: TensorRef, builder: Builder) -> tuple[int, int, int] | None:
    """Where in its record a tensor lies, with the record's length and its CRC-32, as the file has it."""
    record = ref.record
    if record is None:
        return None
    crc = record.crc
    if crc is None:
        raw = bytearray(4)
        builder.files.read_into(ref.file, record.at, raw)
        crc = int.from_bytes(raw, "little")
    return ref.offset - record.start, record.stop - record.start, crc


def _tensor(graphs: Sequence[Any], paths: Sequence[Path], builder: Builder, name: str) -> LogicalTensor:
    whole: _FromRanks | None = None
    for graph, path in zip(graphs, paths, strict=True):
        local, spec = graph.state["_local_tensor"], graph.state["_spec"]
        shape, dtype = tuple(int(n) for n in spec.tensor_meta.class_args[0]), spec.tensor_meta.class_args[2].name
        if whole is None:
            whole = _FromRanks(shape, dtype)
        if not isinstance(local, TensorRef) or (shape, dtype, local.dtype) != (whole.shape, whole.dtype, whole.dtype):
            raise DamagedCheckpoint(f"{path}: '{name}' has another shape or type than in '{paths[0].name}'")
        _add(whole, local, spec, path, builder, len(graphs), name)
    if whole is None:
        raise DamagedCheckpoint("no rank's file has the tensor")
    return LogicalTensor(
        "", "", whole.shape, whole.dtype, concat(whole.blocks, len(whole.shape)), np.concatenate(whole.bases)
    )


def _sharded(graphs: Sequence[Any], paths: Sequence[Path], builder: Builder, name: str) -> LogicalTensor:
    """A ShardedTensor, by the boxes that each of the ranks says it has."""
    size = tuple(int(n) for n in graphs[0].state["_metadata"].size)
    found: dict[tuple[int, ...], TensorRef] = {}
    for graph, path in zip(graphs, paths, strict=True):
        if tuple(graph.state["_metadata"].size) != size:
            raise DamagedCheckpoint(f"{path}: '{name}' has another shape than in '{paths[0].name}'")
        for shard in graph.state["_local_shards"]:
            at, local = tuple(int(n) for n in shard.metadata.shard_offsets), shard.tensor
            if local.shape != tuple(shard.metadata.shard_sizes) or len(at) != len(size):
                raise DamagedCheckpoint(
                    f"{path}: a shard of '{name}' is {list(local.shape)}, which is not what it says"
                )
            if not _equal(found.setdefault(at, local), local, builder):
                raise DamagedCheckpoint(
                    f"{path}: '{name}' is not what '{Path(found[at].file).name}' has of the same elements; files of "
                    "two saves are mixed"
                )
    for shard in graphs[0].state["_metadata"].shards_metadata:
        if tuple(shard.shard_offsets) not in found and 0 not in shard.shard_sizes:
            raise DamagedCheckpoint(
                f"{paths[0].parent}: no file has the part of '{name}' at {list(shard.shard_offsets)}, which rank "
                f"{shard.placement.state.get('_rank')} had; a rank's part is missing"
            )
    held = {at: ref for at, ref in found.items() if ref.numel}
    if len({ref.dtype for ref in found.values()}) != 1:
        raise DamagedCheckpoint(f"{paths[0].parent}: '{name}' has another element type on different ranks")
    grid = (len(held), len(size))
    blocks = Blocks(
        np.array(list(held), np.int64).reshape(grid),
        np.array([ref.shape for ref in held.values()], np.int64).reshape(grid),
        np.zeros(len(held), np.int64),
        np.array([ref.strides for ref in held.values()], np.int64).reshape(grid),
        np.array([builder.file(ref) for ref in held.values()], np.int64),
    )
    dtype = next(iter(found.values())).dtype
    return LogicalTensor("", "", size, dtype, blocks, np.array([ref.offset for ref in held.values()], np.int64))


def _add(
    whole: _FromRanks, local: TensorRef, spec: Standin, path: Path, builder: Builder, ranks: int, name: str
) -> None:
    mesh, place = _mesh(spec.mesh), tuple(int(n) for n in spec.mesh.state["_coordinate_on_dim"])
    cuts = [_cut(path, placement, len(whole.shape), ranks) for placement in spec.placements]
    if (
        len(mesh) != len(cuts)
        or len(place) != len(cuts)
        or not all(0 <= n < m for n, m in zip(place, mesh, strict=True))
    ):
        raise DamagedCheckpoint(f"{path}: a rank at {list(place)} is not in a mesh of {list(mesh)}")
    mine = tuple(n for n, cut in zip(place, cuts, strict=True) if cut is not None)
    if mine in whole.seen:  # another rank holds the same
        if not _equal(whole.seen[mine], local, builder):
            raise DamagedCheckpoint(
                f"{path}: '{name}' is not what '{Path(whole.seen[mine].file).name}' has of the same elements; files of "
                "two saves are mixed"
            )
        return
    whole.seen[mine] = local
    ranges = ranges_of(whole.shape, cuts, mesh, place)
    sizes = tuple(sum(count for _, count in along) for along in ranges)
    if sizes != local.shape and (0 not in sizes or local.numel):
        raise DamagedCheckpoint(
            f"{path}: a shard of a tensor {list(whole.shape)} has shape {list(local.shape)}, and its placements mean "
            f"{list(sizes)}"
        )
    if not local.numel:
        return
    blocks = product(ranges)
    # From places in the shard's row-major order to those in the file, where the strides may differ.
    index = np.stack(np.unravel_index(blocks.starts, sizes)) if sizes else np.zeros((0, len(blocks)), np.int64)
    strides = np.array(local.strides, np.int64)
    starts = (strides @ index).astype(np.int64) if sizes else blocks.starts
    buffers = np.full(len(blocks), builder.file(local), np.int64)
    whole.blocks.append(Blocks(blocks.offsets, blocks.sizes, starts, np.tile(strides, (len(blocks), 1)), buffers))
    whole.bases.append(np.full(len(blocks), local.offset, np.int64))


def _mesh(mesh: Standin) -> tuple[int, ...]:
    """A DeviceMesh's shape: from its layout, which torch has kept since 2.10, or else from the tensor of its ranks."""
    layout = mesh.state.get("_layout")
    if isinstance(layout, Standin):
        axes = layout.state.get("axes")
        shapes = [axis.state["shape"] for axis in axes] if axes is not None else [layout.state["shape"]]
        return tuple(int(np.prod(shape)) for shape in shapes)
    return tuple(mesh.state["mesh"].shape)


def _cut(path: Path, placement: Standin, ndim: int, ranks: int) -> MeshCut | None:
    kind = placement.class_name
    if kind == "Replicate":
        return None
    if kind not in ("Shard", "_StridedShard"):
        raise Unsupported(f"{path}: a tensor is placed as {kind}, whose values are not those of the whole tensor")
    dim = int(placement.state["dim"])
    pieces = int(placement.state["split_factor"]) if kind == "_StridedShard" else 1
    if not 0 < pieces <= ranks:
        raise DamagedCheckpoint(f"{path}: a tensor is cut into {pieces} pieces first, and there are {ranks} ranks")
    return MeshCut(dim % max(ndim, 1), pieces)
