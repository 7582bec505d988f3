"""Boxes of logical tensors, where their elements lie in flat buffers, and the copies between two such descriptions.

Every cut that a parallel layout makes of a tensor is a set of *blocks*: a block is a box (an N-d region of the
logical tensor) and the place of its elements in a flat buffer (a start and one stride per dimension, in elements).
A column shard is one block, a ZeRO flat range is at most ``2d - 1`` of them, a fused parameter's shard is a few.

Many blocks are kept as numpy columns, not as objects, so that a plan over millions of fragments stays an array
program. Nothing here knows of torch, of files or of any framework.

Laws (tests/test_geometry.py holds them as properties):

- ``flat_ranges`` covers exactly the elements ``[a, b)`` of the row-major order, each once;
- ``intersect(a, b)`` is the set of elements that both hold, and every copy it returns addresses the same logical
  element on both sides;
- cutting a tensor by any blocks and merging the cuts again is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Shape = tuple[int, ...]


def numel(shape: Sequence[int]) -> int:
    """The number of elements of a tensor of this shape (1 for a 0-d tensor)."""
    out = 1
    for size in shape:
        out *= int(size)
    return out


def row_major(shape: Sequence[int]) -> Shape:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * max(int(shape[k + 1]), 1)
    return tuple(strides)


@dataclass(frozen=True)
class Blocks:
    """``n`` boxes of one d-dimensional logical tensor, and where their elements lie in flat buffers.

    offsets, sizes: (n, d) the boxes, in the logical tensor's indices.
    starts: (n,) position of each box's first element in its buffer, in elements.
    strides: (n, d) distance in the buffer between neighbours along each dimension, in elements.
    buffers: (n,) which buffer each block lies in; what the numbers mean is the owner's business (a file's index in
    a catalog, a rank, 0 where there is one buffer only).
    """

    offsets: Ints
    sizes: Ints
    starts: Ints
    strides: Ints
    buffers: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ndim(self) -> int:
        return int(self.offsets.shape[1])

    @property
    def counts(self) -> Ints:
        """(n,) the number of elements of each block."""
        return np.prod(self.sizes, axis=1, dtype=np.int64)

    def take(self, index: Ints | NDArray[np.bool_]) -> Blocks:
        """The blocks at these positions, or where this mask is true."""
        return Blocks(
            self.offsets[index], self.sizes[index], self.starts[index], self.strides[index], self.buffers[index]
        )

    def in_buffer(self, buffer: int, shift: int = 0) -> Blocks:
        """The same boxes with every block in the one buffer ``buffer``, its elements ``shift`` further on."""
        return Blocks(self.offsets, self.sizes, self.starts + shift, self.strides, np.full_like(self.buffers, buffer))


def empty(ndim: int) -> Blocks:
    """No blocks of a tensor with ``ndim`` dimensions."""
    none = np.zeros((0, ndim), np.int64)
    return Blocks(none, none, np.zeros(0, np.int64), none, np.zeros(0, np.int64))


def concat(parts: Iterable[Blocks], ndim: int) -> Blocks:
    """All blocks of all parts, in order."""
    kept = [p for p in parts if len(p)]
    if not kept:
        return empty(ndim)
    if len(kept) == 1:
        return kept[0]
    return Blocks(
        np.concatenate([p.offsets for p in kept]),
        np.concatenate([p.sizes for p in kept]),
        np.concatenate([p.starts for p in kept]),
        np.concatenate([p.strides for p in kept]),
        np.concatenate([p.buffers for p in kept]),
    )


def box(
    offsets: Sequence[int],
    sizes: Sequence[int],
    start: int = 0,
    strides: Sequence[int] | None = None,
    buffer: int = 0,
) -> Blocks:
    """One block; without ``strides`` its elements lie densely in row-major order from ``start``."""
    strides = row_major(sizes) if strides is None else strides
    d = len(sizes)
    return Blocks(
        np.array(offsets, np.int64).reshape(1, d),
        np.array(sizes, np.int64).reshape(1, d),
        np.array([start], np.int64),
        np.array(strides, np.int64).reshape(1, d),
        np.array([buffer], np.int64),
    )


def whole(shape: Sequence[int], start: int = 0, buffer: int = 0) -> Blocks:
    """The one block that is the whole tensor, dense and row-major from ``start``. Empty for a tensor of no elements."""
    if numel(shape) == 0:
        return empty(len(shape))
    return box([0] * len(shape), shape, start, None, buffer)


def flat_ranges(
    shape: Sequence[int],
    first: Sequence[int] | Ints,
    last: Sequence[int] | Ints,
    starts: Sequence[int] | Ints,
    buffers: Sequence[int] | Ints | None = None,
) -> Blocks:
    """Blocks of the row-major element ranges ``[first[i], last[i])`` of a tensor of this shape.

    Range i lies densely in its buffer from ``starts[i]``. Each range becomes at most ``2d - 1`` boxes: ragged ends
    in the inner dimensions around one box of whole rows.
    """
    lo = np.asarray(first, np.int64)
    hi = np.asarray(last, np.int64)
    base = np.asarray(starts, np.int64) - lo
    owner = np.zeros(len(lo), np.int64) if buffers is None else np.asarray(buffers, np.int64)
    d = len(shape)
    strides = np.array(row_major(shape), np.int64)
    if d == 0:
        keep = np.flatnonzero(hi > lo)
        none = np.zeros((len(keep), 0), np.int64)
        return Blocks(none, none, (base + lo)[keep], none, owner[keep])
    sizes_of = np.array([int(s) for s in shape], np.int64)
    index = np.arange(len(lo))
    parts: list[Blocks] = []

    def emit(level: int, which: Ints, a: Ints, b: Ints) -> None:
        """Ranges that stay inside one index of every dimension above ``level`` and fill those below it."""
        full = b > a
        which, a, b = which[full], a[full], b[full]
        if not len(which):
            return
        offsets = np.zeros((len(which), d), np.int64)
        sizes = np.ones((len(which), d), np.int64)
        rest = a
        for k in range(level):
            offsets[:, k], rest = np.divmod(rest, strides[k])
        offsets[:, level] = rest // strides[level]
        sizes[:, level] = (b - a) // strides[level]
        sizes[:, level + 1 :] = sizes_of[level + 1 :]
        parts.append(Blocks(offsets, sizes, base[which] + a, np.tile(strides, (len(which), 1)), owner[which]))

    live = index[hi > lo]
    lo, hi = lo.copy(), hi.copy()
    for level in range(d - 1, 0, -1):
        if not len(live):
            break
        row = strides[level - 1]
        a, b = lo[live], hi[live]
        up, down = -(-a // row) * row, b // row * row
        inside = up > down  # the range lies within one row of this level: it ends here
        emit(level, live[inside], a[inside], b[inside])
        live, a, b, up, down = live[~inside], a[~inside], b[~inside], up[~inside], down[~inside]
        emit(level, live, a, up)
        emit(level, live, down, b)
        lo[live], hi[live] = up, down
    emit(0, live, lo[live], hi[live])
    return concat(parts, d)


@dataclass(frozen=True)
class Copies:
    """Element copies between two sets of blocks of one logical tensor, as columns.

    source, target: (n,) indices of the blocks; source_starts, target_starts: (n,) buffer positions of the first
    element; sizes: (n, d) the box copied; source_strides, target_strides: (n, d). All in elements.
    """

    source: Ints
    target: Ints
    source_starts: Ints
    target_starts: Ints
    sizes: Ints
    source_strides: Ints
    target_strides: Ints

    def __len__(self) -> int:
        return len(self.source)

    @property
    def counts(self) -> Ints:
        """(n,) elements moved by each copy."""
        return np.prod(self.sizes, axis=1, dtype=np.int64)


def _candidates(a_lo: Ints, a_hi: Ints, b_lo: Ints, b_hi: Ints) -> tuple[Ints, Ints]:
    """All pairs (i, j) of overlapping intervals, each once; found by sorting, not by trying all pairs.

    An interval without elements may come with pairs that don't overlap.
    """
    # Of two that overlap, either b begins inside a, or a begins inside b, after b's beginning.
    order_b, order_a = np.argsort(b_lo, kind="stable"), np.argsort(a_lo, kind="stable")
    first_b, first_a = b_lo[order_b], a_lo[order_a]
    i, at = _spread(np.searchsorted(first_b, a_lo, "left"), np.searchsorted(first_b, a_hi, "left"))
    j, at_a = _spread(np.searchsorted(first_a, b_lo, "right"), np.searchsorted(first_a, b_hi, "left"))
    return np.concatenate([i, order_a[at_a]]), np.concatenate([order_b[at], j])


def _spread(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Every (k, p) with ``first[k] <= p < last[k]``, as two columns."""
    counts = np.maximum(last - first, 0)
    k = np.repeat(np.arange(len(counts)), counts)
    return k, np.arange(len(k)) - np.repeat(np.cumsum(counts) - counts, counts) + first[k]


def _pair_count(a_lo: Ints, a_hi: Ints, b_lo: Ints, b_hi: Ints) -> int:
    """How many pairs ``_candidates`` would return, without listing them."""
    begun = np.searchsorted(np.sort(b_lo), a_hi, "left").sum()
    ended = np.searchsorted(np.sort(b_hi), a_lo, "right").sum()
    return int(begun - ended)


def _overlapping(a: Blocks, b: Blocks) -> tuple[Ints, Ints]:
    """Pairs of blocks whose boxes may overlap: those that do on the axis that tells most of them apart.

    The axes tried are the tensor's own and its row-major order, in which a box reaches from its first element to its
    last: pieces of one row overlap on every axis but that one, column shards on that one but not on their own.
    """
    a_end, b_end = a.offsets + a.sizes, b.offsets + b.sizes
    strides = np.array(row_major(np.maximum(a_end.max(axis=0), b_end.max(axis=0)).tolist()), np.int64)
    axes = [
        (a.offsets @ strides, (a_end - 1) @ strides + 1, b.offsets @ strides, (b_end - 1) @ strides + 1),
        *((a.offsets[:, k], a_end[:, k], b.offsets[:, k], b_end[:, k]) for k in range(a.ndim)),
    ]
    # Choosing costs a few sorts; it is not worth that where all pairs are few.
    best = axes[0] if len(a) * len(b) < 4096 else min(axes, key=lambda axis: _pair_count(*axis))
    return _candidates(*best)


def intersect(source: Blocks, target: Blocks) -> Copies:
    """What must be copied so that the target's blocks hold what the source's blocks hold, box by box."""
    return _copies(source, target, *_pairs(source, target))


def intersect_grouped(source: Blocks, source_groups: Ints, target: Blocks, target_groups: Ints) -> Copies:
    """As `intersect`, where blocks belong to several tensors: only those of one group have elements in common.

    source_groups, target_groups: the number of each block's group, ascending. One call for a thousand tensors of a few
    blocks each takes the time of a few calls of `intersect`.
    """
    count = 1 + int(max(source_groups.max(initial=-1), target_groups.max(initial=-1)))
    sources, targets = (np.bincount(groups, minlength=count) for groups in (source_groups, target_groups))
    first_source, first_target = np.cumsum(sources) - sources, np.cumsum(targets) - targets
    few = sources * targets <= _FEW
    k, at = _spread(np.zeros(count, np.int64), np.where(few, sources * targets, 0))
    i, j = [first_source[k] + at // targets[k]], [first_target[k] + at % targets[k]]
    for group in np.flatnonzero(~few).tolist():
        there = np.arange(first_source[group], first_source[group] + sources[group])
        here = np.arange(first_target[group], first_target[group] + targets[group])
        of_source, of_target = _pairs(source.take(there), target.take(here))
        i.append(there[of_source])
        j.append(here[of_target])
    return _copies(source, target, np.concatenate(i), np.concatenate(j))


# Pairs of blocks that are all tried: sorting out those that may overlap costs more.
_FEW = 64


def _pairs(source: Blocks, target: Blocks) -> tuple[Ints, Ints]:
    """Pairs of blocks of one tensor that may overlap."""
    if source.ndim == 0 or len(source) * len(target) <= _FEW:
        return np.repeat(np.arange(len(source)), len(target)), np.tile(np.arange(len(target)), len(source))
    return _overlapping(source, target)


def _copies(source: Blocks, target: Blocks, i: Ints, j: Ints) -> Copies:
    """The copies between these pairs of blocks; pairs without elements in common are left out."""
    for k in range(source.ndim):
        # One axis at a time, so that pairs which fall apart on it are gone before the next one is looked at.
        lo = np.maximum(source.offsets[i, k], target.offsets[j, k])
        hi = np.minimum(source.offsets[i, k] + source.sizes[i, k], target.offsets[j, k] + target.sizes[j, k])
        keep = hi > lo
        i, j = i[keep], j[keep]
    lo = np.maximum(source.offsets[i], target.offsets[j])
    hi = np.minimum(source.offsets[i] + source.sizes[i], target.offsets[j] + target.sizes[j])
    return Copies(
        source=i,
        target=j,
        source_starts=source.starts[i] + np.sum((lo - source.offsets[i]) * source.strides[i], axis=1, dtype=np.int64),
        target_starts=target.starts[j] + np.sum((lo - target.offsets[j]) * target.strides[j], axis=1, dtype=np.int64),
        sizes=hi - lo,
        source_strides=source.strides[i],
        target_strides=target.strides[j],
    )


def compose(inner: Blocks, outer: Blocks, inner_shape: Shape, outer_shape: Shape) -> tuple[Blocks, Ints]:
    """A shard's blocks as blocks of the tensor that it was cut from.

    inner: boxes of the shard, wherever they lie. outer: boxes of the tensor, at their places in the shard's row-major
    order. inner_shape, outer_shape: the shard's and the tensor's. Returns the boxes of the tensor where they lie in
    inner's buffers, and for each of them the inner block that it is part of. What no outer block covers (padding of the
    shard) is left out.
    """
    if not len(inner) or not len(outer):
        return empty(outer.ndim), np.zeros(0, np.int64)
    if len(outer) == 1 and inner_shape == outer_shape and outer.starts[0] == 0 and tuple(outer.sizes[0]) == outer_shape:
        return inner, np.arange(len(inner))  # the shard is the tensor: so it is of every tensor of most checkpoints
    strides = np.tile(np.array(row_major(outer_shape), np.int64), (len(outer), 1))
    # The same boxes seen from the shard: where they are in it, and where in the tensor's row-major order.
    there = Blocks(
        _unravel(outer.starts, inner_shape),
        outer.sizes,
        np.sum(outer.offsets * strides, axis=1, dtype=np.int64),
        strides,
        np.zeros(len(outer), np.int64),
    )
    found = intersect(inner, there)
    offsets = _unravel(found.target_starts, outer_shape)
    return (
        Blocks(offsets, found.sizes, found.source_starts, found.source_strides, inner.buffers[found.source]),
        found.source,
    )


def restrict(whole_blocks: Blocks, outer: Blocks, inner_shape: Shape) -> tuple[Blocks, Ints]:
    """A tensor's blocks as blocks of a shard that is cut from it: the reverse of `compose`.

    whole_blocks: boxes of the tensor, wherever they lie. outer: boxes of the tensor, at their places in the shard's
    row-major order. Returns the boxes of the shard where they lie in the tensor's buffers, and for each of them the
    tensor's block that it is part of.
    """
    found = intersect(whole_blocks, outer)
    offsets = _unravel(found.target_starts, inner_shape)
    return (
        Blocks(offsets, found.sizes, found.source_starts, found.source_strides, whole_blocks.buffers[found.source]),
        found.source,
    )


def _unravel(positions: Ints, shape: Shape) -> Ints:
    """(n, d) the index of every one of these positions in a tensor's row-major order."""
    out = np.empty((len(positions), len(shape)), np.int64)
    for k, stride in enumerate(row_major(shape)):
        out[:, k], positions = np.divmod(positions, stride)
    return out


def collapse(copies: Copies) -> Copies:
    """The same copies with d + 1 dimensions, of which the last is a run that is contiguous on both sides.

    Its strides are 1 on both sides, and it is as long as the copy allows (1 where neighbours lie apart on either
    side). The others follow the source's order, widest stride first; those merged away have size 1.
    """
    n, d = copies.sizes.shape
    # Dimensions of size 1 are never stepped along; outermost, they cannot come between two that merge.
    reach = np.where(copies.sizes == 1, np.iinfo(np.int64).max, copies.source_strides)
    order = np.argsort(-reach, axis=1, kind="stable")
    one = np.ones((n, 1), np.int64)
    sizes, s, t = (
        np.concatenate([np.take_along_axis(column, order, axis=1), one], axis=1)
        for column in (copies.sizes, copies.source_strides, copies.target_strides)
    )
    for k in range(d):
        # Merge dimension k into k+1; since k+1 may be merged in turn, walk from the outside inward.
        joint = (s[:, k] == s[:, k + 1] * sizes[:, k + 1]) & (t[:, k] == t[:, k + 1] * sizes[:, k + 1])
        sizes[joint, k + 1] *= sizes[joint, k]
        sizes[joint, k] = 1
    return Copies(copies.source, copies.target, copies.source_starts, copies.target_starts, sizes, s, t)


def runs(copies: Copies) -> tuple[Ints, Ints, Ints, Ints]:
    """Every contiguous run of these copies: (which copy, source start, target start, length), in elements.

    A run is contiguous on both sides. Vectorised: strided copies are expanded by their outer dimensions.
    """
    c = collapse(copies)
    outer = c.sizes[:, :-1]
    which, at = _spread(np.zeros(len(c), np.int64), np.prod(outer, axis=1, dtype=np.int64))
    s, t = c.source_starts[which], c.target_starts[which]
    for k in range(outer.shape[1] - 1, -1, -1):
        at, index = np.divmod(at, outer[which, k])
        s = s + index * c.source_strides[which, k]
        t = t + index * c.target_strides[which, k]
    return which, s, t, c.sizes[which, -1]


def region(shape: Sequence[int], slices: Sequence[slice] | None) -> tuple[Shape, Shape]:
    """Offsets and sizes of a region given as one slice per leading dimension (missing ones are whole).

    Raises ValueError for steps other than 1 and for more slices than dimensions.
    """
    if slices is None:
        slices = ()
    if len(slices) > len(shape):
        raise ValueError(f"region has {len(slices)} slices, but the tensor has {len(shape)} dimensions")
    offsets, sizes = [], []
    for k, size in enumerate(shape):
        start, stop, step = (slices[k] if k < len(slices) else slice(None)).indices(int(size))
        if step != 1:
            raise ValueError(f"region's slice {k} has step {step}; only contiguous regions can be read")
        offsets.append(start)
        sizes.append(max(stop - start, 0))
    return tuple(offsets), tuple(sizes)


@dataclass(frozen=True)
class CoverageFault:
    """Why blocks don't hold every element of a tensor exactly once; as text, a few words on it.

    kind: "outside" (a box leaves the tensor), "overlap" (elements are held more than once) or "hole" (elements are
    missing). elements: how many are missing, or held more than once (one held three times counts three times). total:
    elements of the tensor.
    """

    kind: Literal["outside", "overlap", "hole"]
    elements: int
    total: int

    def __str__(self) -> str:
        if self.kind == "outside":
            return "a fragment lies outside the tensor"
        if self.kind == "overlap":
            return f"{self.elements} elements are held more than once"
        return f"{self.elements} of {self.total} elements are missing"


def coverage_fault(shape: Sequence[int], blocks: Blocks) -> CoverageFault | None:
    """None if the blocks hold every element of the tensor exactly once, else what is wrong.

    Out-of-bounds boxes, overlaps and holes are told apart. The check is exact: boxes that are in bounds, pairwise
    disjoint and as many elements in all as the tensor has, cover it.
    """
    size = np.array([int(s) for s in shape], np.int64)
    # Compared without adding: the numbers may come from a damaged file, and a sum of two could overflow.
    if np.any((blocks.sizes < 0) | (blocks.offsets < 0) | (blocks.offsets > size - blocks.sizes)):
        return CoverageFault("outside", 0, numel(shape))
    total, held = numel(shape), int(blocks.counts.sum())
    if len(blocks) > 1:
        pairs = intersect(blocks, blocks)
        twice = int(pairs.counts[pairs.source < pairs.target].sum())
        if twice:
            return CoverageFault("overlap", twice, total)
    if held != total:
        return CoverageFault("hole", total - held, total)
    return None


def coverage_holds(shapes: Sequence[Sequence[int]], blocks: Blocks, groups: Ints) -> bool:
    """Whether `coverage_fault` finds nothing in any of these tensors of as many dimensions.

    groups: (n,) to which of the shapes each block belongs, ascending.
    """
    size = np.array([[int(n) for n in shape] for shape in shapes], np.int64).reshape(len(shapes), blocks.ndim)[groups]
    if np.any((blocks.sizes < 0) | (blocks.offsets < 0) | (blocks.offsets > size - blocks.sizes)):
        return False
    held = np.zeros(len(shapes), np.int64)
    np.add.at(held, groups, blocks.counts)
    if held.tolist() != [numel(shape) for shape in shapes]:
        return False
    pairs = intersect_grouped(blocks, groups, blocks, groups)
    return not np.any(pairs.counts[pairs.source < pairs.target])
