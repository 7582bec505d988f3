"""What a resume on another layout would read, rank by rank, from the geometry alone.

The framework decides which rank holds what: `ucp.formats.base.WriteTarget.divide` of the target that it loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ucp import formats
from ucp.catalog import Catalog
from ucp.checkpoint import Checkpoint
from ucp.errors import Unsupported
from ucp.formats.nouns import Division
from ucp.formats.signature import defaults_of, showing
from ucp.geometry import Blocks, Ints, intersect
from ucp.inspection.owners import file_owners
from ucp.parallel.mesh import Layout
from ucp.spec.select import Choice, choose
from ucp.storage import configs
from ucp.storage.dtypes import itemsize

SCHEMA = "ucp.plan/1"


@dataclass(frozen=True)
class RankPlan:
    """What one rank reads. bytes: of elements. files: how many it opens. pieces: how many boxes it copies. memory: how
    many bytes of host memory hold it until all ranks have read theirs."""

    rank: int
    bytes: int
    files: int
    pieces: int
    memory: int


@dataclass(frozen=True)
class ResumePlan:
    """What a resume would do.

    - bytes: what all ranks read together. stored: the bytes of the checkpoint's tensors, each counted once.
    - seconds: the time at the given bandwidths; None without any. bound_by: 'rank' (what the largest rank reads) or
      'storage' (what all read).
    - node_memory: bytes of host memory on a node.
    - stages: the first layer of each pipeline stage, and at the end the number of layers; None without a pipeline.
    - sources: the ranks (or files) that wrote the checkpoint. moved: (sources, ranks) bytes from each to each.
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
    stages: tuple[int, ...] | None
    sources: tuple[str, ...]
    moved: NDArray[np.int64]

    def as_json(self, matrix: bool = False) -> dict[str, Any]:
        found = {"schema": SCHEMA, **asdict(replace(self, moved=np.zeros((0, 0), np.int64)))}
        found["moved"] = self.moved.tolist() if matrix else None
        return found


@showing(defaults_of([formats.dividing()]))
def plan(
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    to: str | None = None,
    spec: str | os.PathLike[str] | None = None,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    rank_bandwidth: float | None = None,
    storage_bandwidth: float | None = None,
    ranks_per_node: int = 8,
    **options: Any,
) -> ResumePlan:
    """Plan a resume of this checkpoint on this layout, with weights and optimizer.

    Parameters
    ----------
    checkpoint
        An open checkpoint.
    layout
        How many ranks of each kind resume, and their ZeRO stage.
    to
        The target of `ucp.convert` whose framework resumes; default: DeepSpeed's.
    spec, model_config, sizes
        As for `ucp.open`, where the layout has tensor parallelism, or pipeline stages with other names.
    rank_bandwidth, storage_bandwidth
        Bytes per second that one rank, and all together, can read.
    ranks_per_node
        For the host memory that a node needs.
    options
        Of the target, for what the layout leaves open. DeepSpeed's ``ds_config``: the config of the resume (default:
        the recorded one); ``"pipeline"`` in it as for ``ucp.convert`` (default: layers divided by their parameters, as
        PipelineModule does), AutoEP, AutoTP.

    Returns
    -------
    ResumePlan
        What each rank reads, in bytes, from how many files, and its host memory.

    Raises
    ------
    UcpError
        What `WriteTarget.divide` raises; BadArgument for a config that can't be read.
    """
    target = formats.dividing(to)
    own = formats.own_options(target, options)
    choice = _choice(checkpoint, spec, model_config, sizes) if layout.tp * layout.pp > 1 else Choice()
    division = target.divide(checkpoint.catalog, layout, choice, own)
    if division is None:
        raise Unsupported(f"how '{target.name}' divides a model over ranks is not known, so no resume can be planned")
    bandwidths = (rank_bandwidth, storage_bandwidth)
    return _planned(checkpoint, layout, division, bandwidths, ranks_per_node)


def _planned(
    checkpoint: Checkpoint,
    layout: Layout,
    division: Division,
    bandwidths: tuple[float | None, float | None],
    ranks_per_node: int,
) -> ResumePlan:
    moves = _moves(checkpoint.catalog, division, layout.world_size)
    by_rank = moves.bytes.sum(axis=0).astype(np.int64)
    seconds, bound_by = _time(by_rank, *bandwidths)
    return ResumePlan(
        path=str(checkpoint.path),
        source_layout=str(checkpoint.layout),
        layout=str(layout),
        bytes=int(by_rank.sum()),
        stored=sum(t.nbytes for t in checkpoint.catalog.tensors.values()),
        files=int(moves.opened.any(axis=1).sum()),
        ranks=_rank_plans(moves, by_rank),
        largest=int(np.argmax(by_rank)),
        node_memory=max(int(by_rank[k : k + ranks_per_node].sum()) for k in range(0, len(by_rank), ranks_per_node)),
        seconds=seconds,
        bound_by=bound_by,
        stages=division.stages,
        sources=moves.owners,
        moved=moves.bytes.astype(np.int64),
    )


def _rank_plans(moves: _Moves, by_rank: np.ndarray) -> tuple[RankPlan, ...]:
    return tuple(
        RankPlan(r, int(n), int(moves.opened[:, r].sum()), int(moves.pieces[r]), int(n)) for r, n in enumerate(by_rank)
    )


@dataclass(frozen=True)
class _Moves:
    """What goes where. owners: of the checkpoint's files. bytes: (owners, ranks). opened: (files, ranks) whether the
    rank reads some of the file. pieces: (ranks,) boxes that it copies."""

    owners: tuple[str, ...]
    bytes: NDArray[np.float64]
    opened: NDArray[np.bool_]
    pieces: NDArray[np.int64]


def _moves(catalog: Catalog, division: Division, world: int) -> _Moves:
    who = file_owners(catalog)
    flat = np.zeros(len(who.names) * world, np.float64)
    pieces = np.zeros(world, np.int64)
    opened = np.zeros((len(catalog.files), world), bool)
    # States of a parameter, and layers of a model, are mostly cut alike, so each pair of cuts is compared only once.
    known: dict[bytes, tuple[Ints, Ints, Ints]] = {}
    for tensor, target in division.held:
        key = _cut_key(tensor.blocks) + _cut_key(target)
        if key not in known:
            copies = intersect(tensor.blocks, target)
            known[key] = (tensor.blocks.buffers[copies.source], target.buffers[copies.target], copies.counts)
        files, to, elements = known[key]
        np.add.at(flat, who.of_file[files] * world + to, elements * itemsize(tensor.dtype))
        np.add.at(pieces, to, 1)
        opened[files, to] = True
    return _Moves(who.names, flat.reshape(len(who.names), world), opened, pieces)


def _time(
    by_rank: NDArray[np.int64], rank_bandwidth: float | None, storage_bandwidth: float | None
) -> tuple[float | None, str | None]:
    """How many seconds reading takes, and what bounds them. None without a bandwidth."""
    if not rank_bandwidth and not storage_bandwidth:
        return None, None
    times = {
        "rank": by_rank.max() / rank_bandwidth if rank_bandwidth else 0.0,
        "storage": by_rank.sum() / storage_bandwidth if storage_bandwidth else 0.0,
    }
    slowest = max(times, key=lambda key: times[key])
    return float(times[slowest]), slowest


def _cut_key(blocks: Blocks) -> bytes:
    """A key that is equal for the same boxes in the same buffers."""
    digest = xxhash.xxh3_128()
    for column in (blocks.offsets, blocks.sizes, blocks.buffers):
        digest.update(repr(column.shape).encode())
        digest.update(np.ascontiguousarray(column).data.cast("B") if column.size else b"")
    return digest.digest()


def _choice(
    checkpoint: Checkpoint,
    spec: str | os.PathLike[str] | None,
    model_config: str | os.PathLike[str] | Mapping[str, Any] | None,
    sizes: Mapping[str, int] | None,
) -> Choice:
    """The spec as it was given. Without a model's config, the config.json beside the checkpoint is used."""
    if model_config is None:
        model_config = configs.of_model(checkpoint.path)
    return choose(spec, model_config, sizes)


def balance(ranks: Sequence[RankPlan]) -> Mapping[str, float]:
    """How many bytes the smallest and the largest rank read, and the mean."""
    sizes = [rank.bytes for rank in ranks]
    return {"smallest": min(sizes), "mean": sum(sizes) / len(sizes), "largest": max(sizes)}
