"""The affine maps of DeepSpeed's ``universal_checkpoint_info``: pieces of a tensor, as segments of one dimension.

A map (version 1, ``checkpoint/affine.py``) gives blocks for every tensor-parallel rank, each with an offset and strides
in the whole tensor and in the shard. In the end, DeepSpeed only ever cuts one dimension, in segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ucp.geometry import Shape, numel, row_major
from ucp.spec.draft import Segments

VERSION = 1


class NotSegments(Exception):
    """A map is not made of segments of one dimension. The text says why."""


@dataclass(frozen=True)
class Affine:
    """A map that was read.

    shape: of the whole tensor.
    shards: the shape of each rank's shard.
    dim: the dimension that is cut, or None if every rank holds the whole tensor.
    segments: what that dimension is cut into.
    """

    shape: Shape
    shards: tuple[Shape, ...]
    dim: int | None
    segments: Segments


@dataclass(frozen=True)
class _ShardPiece:
    """A piece along the dimension that is cut: where it lies in the shard and in the tensor, and how long it is."""

    at: int
    start: int
    length: int


def read(entry: Mapping[str, Any]) -> Affine:
    """One parameter's map. Raises NotSegments, or KeyError, TypeError or ValueError if it is not a map at all."""
    shape = tuple(int(n) for n in entry["logical_shape"])
    ranks = {int(rank): found for rank, found in entry["ranks"].items()}
    if sorted(ranks) != list(range(len(ranks))):
        raise NotSegments(f"it tells of the ranks {sorted(ranks)} only")
    shards = tuple(tuple(int(n) for n in ranks[r]["shard_shape"]) for r in range(len(ranks)))
    pieces = [ranks[r]["pieces"] for r in range(len(ranks))]
    for rank, held in enumerate(pieces):
        for piece in held:
            if float(piece.get("scale", 1)) != 1:
                raise NotSegments(f"rank {rank} holds a part of it multiplied by {piece['scale']}, not as it is")
    if any(len(p["shape"]) != len(shape) for held in pieces for p in held):
        raise NotSegments("a piece has another number of dimensions than the tensor")
    cut = {k for held in pieces for p in held for k, n in enumerate(shape) if int(p["shape"][k]) != n}
    if len(cut) > 1:
        raise NotSegments(f"it is cut along dimensions {sorted(cut)} at once")
    if not cut:
        if any(len(held) != 1 for held in pieces):
            raise NotSegments("some ranks hold several whole copies of it")
        return Affine(shape, shards, None, ())
    dim = cut.pop()
    along = [_along(dim, shape, shard, held) for shard, held in zip(shards, pieces, strict=True)]
    return Affine(shape, shards, dim, _segments(shape[dim], along))


def _along(dim: int, shape: Shape, shard: Shape, pieces: Sequence[Mapping[str, Any]]) -> list[_ShardPiece]:
    """One rank's pieces in the shard's order."""
    out = []
    for piece in pieces:
        size = tuple(int(n) for n in piece["shape"])
        (start, there), (at, here) = piece["source"], piece["dest"]
        outer, inner = row_major(shape), row_major(shard)
        if not numel(size):
            continue
        for strides, expected in ((there, outer), (here, inner)):
            if any(n > 1 and int(s) != e for n, s, e in zip(size, strides, expected, strict=True)):
                raise NotSegments("a piece lies in another order of dimensions")
        if int(start) % outer[dim] or int(at) % inner[dim]:
            raise NotSegments("a piece begins inside a row")
        out.append(_ShardPiece(int(at) // inner[dim], int(start) // outer[dim], size[dim]))
    out.sort(key=lambda p: p.at)
    end = 0
    for p in out:
        if p.at != end:
            raise NotSegments("its pieces leave gaps in a shard, or overlap")
        end += p.length
    if end != (shard[dim] if numel(shard) else 0):
        raise NotSegments("its pieces leave a part of a shard open")
    return out


def _segments(n: int, ranks: Sequence[Sequence[_ShardPiece]]) -> list[tuple[int, ...] | int]:
    """Walk along the dimension: if a rank's next piece begins here, it belongs to the segment."""
    out: list[tuple[int, ...] | int] = []
    nexts = [0] * len(ranks)
    at = 0
    while at < n:
        ahead = [held[k] if k < len(held) else None for held, k in zip(ranks, nexts, strict=True)]
        first = ahead[0]
        if first is not None and all(p is not None and (p.start, p.length) == (at, first.length) for p in ahead):
            out.append(first.length)
            nexts = [k + 1 for k in nexts]
            at += first.length
            continue
        widths = []
        for rank, piece in enumerate(ahead):
            width = piece.length if piece is not None and piece.start == at else 0
            widths.append(width)
            nexts[rank] += width > 0
            at += width
        if not any(widths):
            raise NotSegments(f"no rank's next piece begins at {at} of {n}")
        out.append(tuple(widths))
    if any(k != len(held) for held, k in zip(ranks, nexts, strict=True)):
        raise NotSegments("its pieces are not in the tensor's order")
    return out
