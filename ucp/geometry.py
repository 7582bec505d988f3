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
    """Pairs (i, j) that contain every pair of overlapping intervals; found by sorting, not by trying all pairs."""
    order = np.argsort(b_lo, kind="stable")
    starts = b_lo[order]
    ends = np.maximum.accumulate(b_hi[order]) if len(order) else starts
    left = np.searchsorted(ends, a_lo, side="right")
    right = np.searchsorted(starts, a_hi, side="left")
    counts = np.maximum(right - left, 0)
    i = np.repeat(np.arange(len(a_lo)), counts)
    within = np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    return i, order[np.repeat(left, counts) + within]


def intersect(source: Blocks, target: Blocks) -> Copies:
    """What must be copied so that the target's blocks hold what the source's blocks hold, box by box."""
    d = source.ndim
    if d == 0:
        i, j = (g.ravel() for g in np.meshgrid(np.arange(len(source)), np.arange(len(target)), indexing="ij"))
        lo = np.zeros((len(i), 0), np.int64)
        sizes = lo
    else:
        i, j = _candidates(
            source.offsets[:, 0],
            source.offsets[:, 0] + source.sizes[:, 0],
            target.offsets[:, 0],
            target.offsets[:, 0] + target.sizes[:, 0],
        )
        lo = np.maximum(source.offsets[i], target.offsets[j])
        hi = np.minimum(source.offsets[i] + source.sizes[i], target.offsets[j] + target.sizes[j])
        keep = np.all(hi > lo, axis=1)
        i, j, lo, sizes = i[keep], j[keep], lo[keep], (hi - lo)[keep]
    return Copies(
        source=i,
        target=j,
        source_starts=source.starts[i] + np.sum((lo - source.offsets[i]) * source.strides[i], axis=1, dtype=np.int64),
        target_starts=target.starts[j] + np.sum((lo - target.offsets[j]) * target.strides[j], axis=1, dtype=np.int64),
        sizes=sizes,
        source_strides=source.strides[i],
        target_strides=target.strides[j],
    )


def collapse(copies: Copies) -> Copies:
    """The same copies with dimensions merged wherever both sides are dense across them.

    Merged dimensions become size 1 and the product moves inward, so that afterwards the last dimension is the longest
    run that is contiguous on both sides (if both last strides are 1).
    """
    d = copies.sizes.shape[1]
    if d == 0:
        ones = np.ones((len(copies), 1), np.int64)
        return Copies(
            copies.source, copies.target, copies.source_starts, copies.target_starts, ones, ones.copy(), ones.copy()
        )
    sizes, s, t = copies.sizes.copy(), copies.source_strides.copy(), copies.target_strides.copy()
    # A dimension of size 1 is never stepped along: give it the stride that lets its neighbours merge across it.
    for k in range(d - 1, -1, -1):
        single = sizes[:, k] == 1
        if k == d - 1:
            s[single, k] = t[single, k] = 1
        else:
            s[single, k] = s[single, k + 1] * sizes[single, k + 1]
            t[single, k] = t[single, k + 1] * sizes[single, k + 1]
    for k in range(d - 1):
        # Merge dimension k into k+1; since k+1 may already hold k-1's product, walk from the outside inward.
        joint = (s[:, k] == s[:, k + 1] * sizes[:, k + 1]) & (t[:, k] == t[:, k + 1] * sizes[:, k + 1])
        sizes[joint, k + 1] *= sizes[joint, k]
        sizes[joint, k] = 1
    return Copies(copies.source, copies.target, copies.source_starts, copies.target_starts, sizes, s, t)


def runs(copies: Copies) -> tuple[Ints, Ints, Ints, Ints]:
    """Every contiguous run of these copies: (which copy, source start, target start, length), in elements.

    A run is contiguous on both sides. Vectorised: strided copies are expanded by their outer dimensions.
    """
    c = collapse(copies)
    d = c.sizes.shape[1]
    dense = (c.source_strides[:, -1] == 1) & (c.target_strides[:, -1] == 1)
    length = np.where(dense, c.sizes[:, -1], 1)
    outer = c.sizes.copy()
    outer[:, -1] = np.where(dense, 1, c.sizes[:, -1])
    counts = np.prod(outer, axis=1, dtype=np.int64)
    which = np.repeat(np.arange(len(c)), counts)
    rest = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    s, t = c.source_starts[which], c.target_starts[which]
    for k in range(d - 1, -1, -1):
        rest, at = np.divmod(rest, outer[which, k])
        s = s + at * c.source_strides[which, k]
        t = t + at * c.target_strides[which, k]
    return which, s, t, length[which]


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


def coverage_gap(shape: Sequence[int], blocks: Blocks) -> str | None:
    """None if the blocks hold every element of the tensor exactly once, else a few words on what is wrong.

    Out-of-bounds boxes, overlaps and holes are told apart. The check is exact: boxes that are in bounds, pairwise
    disjoint and as many elements in all as the tensor has, cover it.
    """
    size = np.array([int(s) for s in shape], np.int64)
    if np.any(blocks.offsets < 0) or np.any(blocks.offsets + blocks.sizes > size):
        return "a fragment lies outside the tensor"
    total, held = numel(shape), int(blocks.counts.sum())
    if len(blocks) > 1:
        pairs = intersect(blocks, blocks)
        twice = int(pairs.counts[pairs.source < pairs.target].sum())
        if twice:
            return f"{twice} elements are held more than once"
    elif held > total:
        return f"{held - total} elements are held more than once"
    if held != total:
        return f"{total - held} of {total} elements are missing"
    return None
