"""What a resume on another layout would read, rank by rank, from the geometry alone.

A rank of ZeRO stage 1 or 2 reads its partition of every param group's masters and states, and everything that no
optimizer updates; of stage 3 its piece of every parameter; of stage 0 all. Under tensor parallelism each rank's shards
are cut so; how, a spec says (`ucp.spec`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ucp.catalog import Catalog, LogicalTensor, ParameterInfo
from ucp.checkpoint import Checkpoint
from ucp.errors import Unsupported
from ucp.geometry import Blocks, Ints, Shape, compose, concat, intersect, numel, whole
from ucp.inspection import holders
from ucp.parallel import zero
from ucp.parallel.mesh import Layout
from ucp.spec.bound import Bound
from ucp.spec.choice import choose
from ucp.spec.meaning import Cutting, shard
from ucp.storage import configs
from ucp.storage.dtypes import itemsize

SCHEMA = "ucp.plan/1"


@dataclass(frozen=True)
class RankPlan:
    """What one rank reads. bytes: of elements; files: how many it opens; pieces: boxes that it copies; memory: bytes of
    host memory that hold it until all ranks have read theirs."""

    rank: int
    bytes: int
    files: int
    pieces: int
    memory: int


@dataclass(frozen=True)
class ResumePlan:
    """What a resume would do.

    bytes: read by all ranks together; stored: of the checkpoint's tensors, each once. seconds: at the bandwidths given,
    None without any; bound_by: 'rank' (the largest rank's reading) or 'storage' (all of it). node_memory: host memory
    on a node. sources: the ranks (or files) that wrote the checkpoint; moved: (sources, ranks) bytes from each to each.
    """

    path: str
    source_layout: str
    layout: str
    bytes: int
    stored: int
    files: int
    ranks: tuple[RankPlan, ...]
    largest: int
    node_memory: int
    seconds: float | None
    bound_by: str | None
    sources: tuple[str, ...]
    moved: NDArray[np.int64]

    def as_json(self, matrix: bool = False) -> dict[str, Any]:
        found = {"schema": SCHEMA, **asdict(replace(self, moved=np.zeros((0, 0), np.int64)))}
        found["moved"] = self.moved.tolist() if matrix else None
        return found


def plan(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    bound: Bound | None = None,
    rank_bandwidth: float | None = None,
    storage_bandwidth: float | None = None,
    ranks_per_node: int = 8,
) -> ResumePlan:
    """The plan of a resume of this checkpoint on this layout, weights and optimizer.

    bound: the spec, where the layout has tensor parallelism. rank_bandwidth, storage_bandwidth: bytes per second that
    one rank, and all together, can read.

    Raises Unsupported for pipeline and expert layouts, whose split a layout alone does not say, and for tensor
    parallelism without a spec; SpecError where a spec can't cut so.
    """
    catalog = checkpoint.catalog
    _check_layout(layout, bound)
    who = holders.holders(catalog.files)
    world = layout.dp * layout.tp
    flat = np.zeros(len(who.names) * world, np.float64)
    pieces = np.zeros(world, np.int64)
    opened = np.zeros((len(catalog.files), world), bool)
    # States of a parameter, and layers of a model, are mostly cut alike: each pair of cuts is compared once.
    known: dict[bytes, tuple[Ints, Ints, Ints]] = {}
    for tensor, target in _wanted(catalog, layout, bound):
        key = _cut_key(tensor.blocks) + _cut_key(target)
        if key not in known:
            copies = intersect(tensor.blocks, target)
            known[key] = (tensor.blocks.buffers[copies.source], target.buffers[copies.target], copies.counts)
        files, to, counts = known[key]
        np.add.at(flat, who.of_file[files] * world + to, counts * itemsize(tensor.dtype))
        np.add.at(pieces, to, 1)
        opened[files, to] = True
    moved = flat.reshape(len(who.names), world)
    by_rank = moved.sum(axis=0).astype(np.int64)
    ranks = tuple(
        RankPlan(r, int(by_rank[r]), int(opened[:, r].sum()), int(pieces[r]), int(by_rank[r])) for r in range(world)
    )
    total, largest = int(by_rank.sum()), int(np.argmax(by_rank))
    times = {
        "rank": by_rank[largest] / rank_bandwidth if rank_bandwidth else 0.0,
        "storage": total / storage_bandwidth if storage_bandwidth else 0.0,
    }
    is_timed = bool(rank_bandwidth or storage_bandwidth)
    slowest = max(times, key=lambda key: times[key])
    return ResumePlan(
        path=str(checkpoint.path),
        source_layout=str(checkpoint.layout),
        layout=str(layout),
        bytes=total,
        stored=sum(t.nbytes for t in catalog.tensors.values()),
        files=int(opened.any(axis=1).sum()),
        ranks=ranks,
        largest=largest,
        node_memory=max(int(by_rank[k : k + ranks_per_node].sum()) for k in range(0, world, ranks_per_node)),
        seconds=float(times[slowest]) if is_timed else None,
        bound_by=slowest if is_timed else None,
        sources=who.names,
        moved=moved.astype(np.int64),
    )


def _cut_key(blocks: Blocks) -> bytes:
    """The same for two sets of boxes that lie in the same buffers."""
    digest = xxhash.xxh3_128()
    for column in (blocks.offsets, blocks.sizes, blocks.buffers):
        digest.update(repr(column.shape).encode())
        digest.update(np.ascontiguousarray(column).data.cast("B") if column.size else b"")
    return digest.digest()


def spec_for(
    checkpoint: Checkpoint,
    layout: Layout,
    spec: str | os.PathLike[str] | None = None,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Bound | None:
    """The spec by which a layout with tensor parallelism cuts this checkpoint's model; None where nothing tells it.

    Arguments and errors as for `ucp.open`; without a config, the config.json beside the checkpoint counts.
    """
    if layout.tp == 1:
        return None
    if model_config is None:
        model_config = configs.of_model(checkpoint.path)
    return choose(spec, model_config, sizes).bound(None)


def _check_layout(layout: Layout, bound: Bound | None) -> None:
    if layout.pp > 1 or layout.ep > 1:
        raise Unsupported(
            f"layout '{layout}': which stage or rank has which parameters is the model's own; give dp, tp and zero"
        )
    if layout.tp > 1 and bound is None:
        raise Unsupported(
            f"layout '{layout}': how tensor parallelism cuts the model is not known; give a spec (--spec)"
        )


def _wanted(catalog: Catalog, layout: Layout, bound: Bound | None) -> Iterator[tuple[LogicalTensor, Blocks]]:
    """Every tensor with the boxes of it that ranks want; ``buffers`` is the rank (tensor-parallel ranks innermost)."""
    infos = {name: info for name, info in catalog.parameters.items() if info.kind != "padding"}
    local = {name: _shards(info, layout, bound) for name, info in infos.items()}
    groups = [[n for n in group.names if n in infos] for group in catalog.training_state.param_groups]
    grouped = {name for group in groups for name in group}
    loose = [n for n, info in infos.items() if info.kind == "parameter" and n not in grouped]
    parts: dict[str, list[Blocks]] = {name: [] for name in infos}
    for tp in range(layout.tp):
        for names in (*groups, loose):
            shapes = [local[name][tp][0] for name in names]
            for name, shape, cut in zip(names, shapes, _cut_group(shapes, layout), strict=True):
                parts[name].append(_lift(cut, shape, local[name][tp][1], infos[name].shape, layout, tp))
        for name, info in infos.items():
            if info.kind != "parameter":
                shape, blocks = local[name][tp]
                cut = _cut_alone(shape, info, layout)
                parts[name].append(_lift(cut, shape, blocks, info.shape, layout, tp))
    for tensor in catalog.tensors.values():
        if tensor.name in infos:
            yield tensor, concat(parts[tensor.name], len(tensor.shape))


def _shards(info: ParameterInfo, layout: Layout, bound: Bound | None) -> list[tuple[Shape, Blocks]]:
    """For every tensor-parallel rank the shape of its shard, and its boxes at their places in that."""
    found = None if layout.tp == 1 or bound is None else bound.find(info.name)
    if found is None or bound is None:
        return [(info.shape, whole(info.shape))] * layout.tp
    cutting = Cutting({"tp": layout.tp}, "balanced")
    shards = [shard(found.expression, bound.sizes, cutting, {"tp": tp}) for tp in range(layout.tp)]
    return [(one.shape, one.blocks) for one in shards]


def _cut_group(shapes: Sequence[Shape], layout: Layout) -> list[Blocks]:
    """Where the trained parameters of one param group go; ``buffers`` is the data-parallel rank."""
    if layout.zero == 0:
        return [_on_all(shape, layout.dp) for shape in shapes]
    if layout.zero == 3:
        return [zero.ceil_partition(shape, 0, layout.dp) for shape in shapes]
    offsets, total = zero.flat_offsets([numel(shape) for shape in shapes])
    size = zero.partition_size(total, layout.dp)
    return [zero.flat_partition(shape, at, size) for shape, at in zip(shapes, offsets, strict=True)]


def _cut_alone(shape: Shape, info: ParameterInfo, layout: Layout) -> Blocks:
    """Buffers are whole on every rank; so are frozen parameters below stage 3."""
    if layout.zero == 3 and info.kind == "frozen":
        return zero.ceil_partition(shape, 0, layout.dp)
    return _on_all(shape, layout.dp)


def _on_all(shape: Shape, dp: int) -> Blocks:
    one = whole(shape)
    return concat((one.in_buffer(rank) for rank in range(dp)), len(shape))


def _lift(cut: Blocks, local: Shape, placed: Blocks, shape: Shape, layout: Layout, tp: int) -> Blocks:
    """A shard's cut as boxes of the whole tensor, its buffers as global ranks."""
    lifted = cut if local == shape and layout.tp == 1 else compose(cut, placed, local, shape)[0]
    return replace(lifted, buffers=lifted.buffers * layout.tp + tp)


def balance(ranks: Sequence[RankPlan]) -> Mapping[str, float]:
    """Bytes of the smallest, the mean and the largest rank."""
    sizes = [rank.bytes for rank in ranks]
    return {"smallest": min(sizes), "mean": sum(sizes) / len(sizes), "largest": max(sizes)}
