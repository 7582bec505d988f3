"""The affine maps of DeepSpeed's ``universal_checkpoint_info`` as placements: any boxes of a tensor, on any ranks.

`ucp.spec.affine` reads the maps that a spec's axes can say. This is for the others: blocks in another order, tensors
that are cut along several dimensions, parts that some ranks hold in common, and parts that are kept multiplied by a
number (``scale``). Where a piece lies is checked on both sides, as DeepSpeed's own planner does
(``checkpoint/affine_transfer.py``): a box of the whole tensor is a box of the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ucp import limits
from ucp.geometry import Blocks, Shape, concat, coverage_fault, empty, numel, row_major
from ucp.spec.places import Placed


class NotBoxes(Exception):
    """A map is well-formed, but no boxes in the tensor's own order. The text says why."""


@dataclass(frozen=True)
class _BoxHeld:
    """A box, at ``there`` in the tensor and at ``here`` in the shard, and which ranks are said to hold it."""

    rank: int
    there: Shape
    here: Shape
    sizes: Shape
    scale: float
    ranks: frozenset[int]


@dataclass(frozen=True)
class AffinePlaces:
    """A map that was read: the whole tensor's shape, every rank's shard, and what lies where in it."""

    shape: Shape
    shards: Mapping[int, Shape]
    pieces: Mapping[int, Sequence[_BoxHeld]]

    @property
    def scaled(self) -> bool:
        """Whether any part is kept multiplied by a number."""
        return any(piece.scale != 1 for held in self.pieces.values() for piece in held)

    def placed(self, name: str, rank: int) -> tuple[Placed, ...]:
        """A rank's shard: one place for each number that parts of it are multiplied by."""
        held = self.pieces[rank]
        kinds = list(dict.fromkeys((piece.scale, _adds_up(piece)) for piece in held)) or [(1.0, False)]
        return tuple(
            Placed(
                name,
                self.shape,
                self._blocks(rank, [p for p in held if (p.scale, _adds_up(p)) == (scale, added)]),
                scale=scale,
                summed=added,
            )
            for scale, added in kinds
        )

    def _blocks(self, rank: int, held: Sequence[_BoxHeld]) -> Blocks:
        d = len(self.shape)
        if not held:
            return empty(d)
        strides = np.array(row_major(self.shards[rank]), np.int64).reshape(1, d)
        here = np.array([p.here for p in held], np.int64).reshape(len(held), d)
        return Blocks(
            np.array([p.there for p in held], np.int64).reshape(len(held), d),
            np.array([p.sizes for p in held], np.int64).reshape(len(held), d),
            (here * strides).sum(axis=1, dtype=np.int64),
            np.repeat(strides, len(held), axis=0),
            np.zeros(len(held), np.int64),
        )


def read(entry: Mapping[str, Any]) -> AffinePlaces:
    """One parameter's map.

    Raises NotBoxes where it is none of boxes; ValueError, KeyError or TypeError if it contradicts itself or is no map.
    """
    shape = _shape(entry["logical_shape"])
    ranks = {int(rank): found for rank, found in entry["ranks"].items()}
    if sorted(ranks) != list(range(len(ranks))):
        raise NotBoxes(f"it tells of the ranks {sorted(ranks)} only")
    shards = {rank: _shape(ranks[rank]["shard_shape"]) for rank in sorted(ranks)}
    for shard in shards.values():
        if len(shard) != len(shape):
            raise NotBoxes(f"a shard {list(shard)} of a tensor {list(shape)} has another number of dimensions")
    if sum(len(found["pieces"]) for found in ranks.values()) > limits.AFFINE_PIECES_COUNT:
        raise ValueError(f"it has more than {limits.AFFINE_PIECES_COUNT} pieces")
    pieces = {rank: [_piece(p, rank, shape, shards[rank]) for p in ranks[rank]["pieces"]] for rank in shards}
    pieces = {rank: [p for p in held if numel(p.sizes)] for rank, held in pieces.items()}
    out = AffinePlaces(shape, shards, pieces)
    for rank, held in pieces.items():
        fault = coverage_fault(shards[rank], _boxes([(p.here, p.sizes) for p in held], len(shape)))
        if fault:
            raise ValueError(f"rank {rank}'s pieces are not its shard {list(shards[rank])}: {fault}")
    return _agreed(out)


def _shape(found: Any) -> Shape:
    shape = tuple(int(n) for n in found)
    if any(n < 0 for n in shape) or numel(shape) > limits.TENSOR_ELEMENTS:
        raise ValueError(f"{list(shape)} is no shape")
    return shape


def _piece(entry: Mapping[str, Any], rank: int, shape: Shape, shard: Shape) -> _BoxHeld:
    sizes = _shape(entry["shape"])
    if len(sizes) != len(shape):
        raise NotBoxes(f"a piece {list(sizes)} has another number of dimensions than the tensor")
    (start, outer), (at, inner) = entry["source"], entry["dest"]
    scale = float(entry.get("scale", 1))
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"a piece is multiplied by {scale}, and nothing can be rebuilt from that")
    there, here = (0,) * len(shape), (0,) * len(shape)
    if numel(sizes):
        there = _corner(int(start), outer, sizes, shape)
        here = _corner(int(at), inner, sizes, shard)
    return _BoxHeld(rank, there, here, sizes, scale, frozenset(int(r) for r in entry["locations"]))


def _corner(offset: int, strides: Sequence[Any], sizes: Shape, whole: Shape) -> Shape:
    """A box's first index. Raises NotBoxes if these strides make no box of a tensor of this shape."""
    dense = row_major(whole)
    if any(n > 1 and int(s) != d for n, s, d in zip(sizes, strides, dense, strict=True)):
        raise NotBoxes("a piece lies in another order of dimensions")
    out = []
    for stride in dense:
        k, offset = divmod(offset, stride)
        out.append(k)
    if offset or any(k < 0 or k + n > m for k, n, m in zip(out, sizes, whole, strict=True)):
        raise ValueError(f"a piece {list(sizes)} at {out} lies outside of {list(whole)}")
    return tuple(out)


def _agreed(found: AffinePlaces) -> AffinePlaces:
    """The map with pieces that are either the same box or apart, after checks of what they say of each other."""
    held = [piece for pieces in found.pieces.values() for piece in pieces]
    once = list(dict.fromkeys((p.there, p.sizes) for p in held))
    fault = coverage_fault(found.shape, _boxes(once, len(found.shape)))
    if fault is not None and fault.kind == "overlap":  # ranks divide what they hold in common in different ways
        found = replace(found, pieces={rank: list(_cut(p, held)) for rank, p in found.pieces.items()})
        held = [piece for pieces in found.pieces.values() for piece in pieces]
        once = list(dict.fromkeys((p.there, p.sizes) for p in held))
        fault = coverage_fault(found.shape, _boxes(once, len(found.shape)))
    if fault is not None:
        raise ValueError(f"its pieces are not the whole tensor {list(found.shape)}: {fault}")
    holders: dict[tuple[Shape, Shape], list[_BoxHeld]] = {}
    for piece in held:
        holders.setdefault((piece.there, piece.sizes), []).append(piece)
    for (there, sizes), same in holders.items():
        ranks = {piece.rank for piece in same}
        for piece in same:
            if piece.ranks != ranks:
                raise ValueError(
                    f"ranks {sorted(piece.ranks)} are said to hold the piece {list(sizes)} at {list(there)}, and ranks "
                    f"{sorted(ranks)} do"
                )
        if len({piece.scale for piece in same}) > 1:
            raise NotBoxes(f"ranks hold the piece {list(sizes)} at {list(there)} multiplied by different numbers")
    return found


def _cut(pieces: Sequence[_BoxHeld], by: Sequence[_BoxHeld]) -> Iterator[_BoxHeld]:
    """The pieces, cut wherever a piece that overlaps them begins or ends."""
    queue, compared = list(pieces), 0
    while queue:
        piece = queue.pop()
        parts = next((parts for other in by if (parts := _parts(piece, other))), None)
        compared += len(by)
        if compared > limits.AFFINE_COMPARED_COUNT:
            raise NotBoxes("its pieces overlap each other in too many places")
        if parts is None:
            yield piece
        else:
            queue.extend(parts)


def _parts(piece: _BoxHeld, other: _BoxHeld) -> tuple[_BoxHeld, _BoxHeld] | None:
    """Two parts of the piece, cut at a border of the other within it; None if the other does not cut it."""
    lo = [max(a, b) for a, b in zip(piece.there, other.there, strict=True)]
    ends = [(a + n, b + m) for a, n, b, m in zip(piece.there, piece.sizes, other.there, other.sizes, strict=True)]
    if any(start >= min(pair) for start, pair in zip(lo, ends, strict=True)):
        return None
    for k, (mine, others) in enumerate(ends):
        for border in (other.there[k], others):
            if piece.there[k] < border < mine:
                first = border - piece.there[k]
                rest = piece.sizes[k] - first
                return (
                    replace(piece, sizes=_with(piece.sizes, k, first)),
                    replace(
                        piece,
                        sizes=_with(piece.sizes, k, rest),
                        there=_with(piece.there, k, border),
                        here=_with(piece.here, k, piece.here[k] + first),
                    ),
                )
    return None


def _with(shape: Shape, k: int, n: int) -> Shape:
    return (*shape[:k], n, *shape[k + 1 :])


def _boxes(boxes: Sequence[tuple[Shape, Shape]], ndim: int) -> Blocks:
    zeros = np.zeros(len(boxes), np.int64)
    offsets, sizes = (np.array([b[i] for b in boxes], np.int64).reshape(len(boxes), ndim) for i in (0, 1))
    return concat([Blocks(offsets, sizes, zeros, np.zeros_like(sizes), zeros)], ndim)


def _adds_up(piece: _BoxHeld) -> bool:
    """Whether the copies are summands: n ranks each keep 1/n of it, and the model adds them up.

    A row-parallel layer's bias is divided so, since the ranks' outputs are added (`AffinePiece` in DeepSpeed's
    ``checkpoint/affine.py`` gives it as the reason for scales).
    """
    return len(piece.ranks) > 1 and math.isclose(piece.scale * len(piece.ranks), 1, rel_tol=1e-12)
