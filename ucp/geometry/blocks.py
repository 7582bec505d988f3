"""Blocks: boxes of a logical tensor, and where their elements lie in flat buffers."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class Blocks:
    """``n`` boxes of one d-dimensional logical tensor, and where their elements lie in flat buffers.

    offsets, sizes: (n, d) the boxes, in the logical tensor's indices.
    starts: (n,) position of each box's first element in its buffer, in elements.
    strides: (n, d) distance in the buffer between neighbours along each dimension, in elements.
    buffers: (n,) which buffer each block lies in; what the numbers mean is up to the owner (a file's index in a
    catalog, a rank, or 0 if there is only one buffer).
    """

    offsets: Ints
    sizes: Ints
    starts: Ints
    strides: Ints
    buffers: Ints

    def __len__(self) -> int:
        return len(self.starts)

    def __reduce__(self) -> tuple[type[Blocks], tuple[Ints, ...]]:
        """For pickle: a catalog sent to other ranks has thousands, and going by a dataclass's fields takes longer."""
        return Blocks, (self.offsets, self.sizes, self.starts, self.strides, self.buffers)

    @property
    def ndim(self) -> int:
        return int(self.offsets.shape[1])

    @property
    def counts(self) -> Ints:
        """(n,) the number of elements of each block."""
        return np.prod(self.sizes, axis=1, dtype=np.int64)

    @property
    def elements(self) -> int:
        """The number of elements of all blocks together."""
        if len(self.starts) == 1:  # the usual case, ten times as fast
            return math.prod(self.sizes[0].tolist())
        return int(self.counts.sum())

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


@dataclass(frozen=True, slots=True)
class Joined:
    """The blocks of many tensors, in which what several of them share is listed once.

    blocks: the distinct ones. rows: (n,) for every block of every tensor, in order, which of those it is. owners: (n,)
    the number of its tensor, ascending.
    """

    blocks: Blocks
    rows: Ints
    owners: Ints


def joined(many: Sequence[Blocks], ndim: int) -> Joined:
    """The blocks of tensors with ``ndim`` dimensions. Tensors that are cut alike and lie alike may have one object."""
    ids = list(map(id, many))
    distinct = dict(zip(ids, many, strict=True))
    numbers = {found: k for k, found in enumerate(distinct)}
    which = np.array(list(map(numbers.__getitem__, ids)), np.int64)
    counts = np.array([len(blocks) for blocks in distinct.values()], np.int64)
    if not len(which):
        return Joined(empty(ndim), which, which)
    firsts, each = np.cumsum(counts) - counts, counts[which]
    owners = np.repeat(np.arange(len(which)), each)
    rows = np.arange(len(owners)) + (firsts[which] - (np.cumsum(each) - each))[owners]
    return Joined(concat(distinct.values(), ndim), rows, owners)


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
    """The whole tensor as one block, dense and row-major from ``start``. Empty for a tensor without elements."""
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


def dense_strides(sizes: Ints) -> Ints:
    """(n, d) row-major strides of boxes of these (n, d) sizes: `row_major` of many boxes at once."""
    out = np.ones_like(sizes)
    for k in range(sizes.shape[1] - 2, -1, -1):
        out[:, k] = out[:, k + 1] * np.maximum(sizes[:, k + 1], 1)
    return out


def packed(blocks: Blocks) -> Blocks:
    """The same boxes one after the other in one buffer, each dense and row-major."""
    counts = blocks.counts
    starts = np.cumsum(counts) - counts
    return Blocks(blocks.offsets, blocks.sizes, starts, dense_strides(blocks.sizes), np.zeros_like(blocks.buffers))


def take_elements(blocks: Blocks, first: int, last: int) -> Blocks:
    """The elements ``[first, last)`` of the blocks, counted block after block, each in row-major order.

    Bounds beyond the blocks are clipped to them, so neighbouring ranges leave nothing out and take nothing twice.
    """
    counts = blocks.counts
    before = np.cumsum(counts) - counts
    begin, end = np.clip(first - before, 0, counts), np.clip(last - before, 0, counts)
    parts: list[Blocks] = []
    done = 0
    for k in np.flatnonzero((begin < end) & ((begin > 0) | (end < counts))).tolist():  # at most the two at the ends
        parts.append(_whole_ones(blocks, begin, end, done, k))
        inner = flat_ranges(blocks.sizes[k].tolist(), begin[k : k + 1], end[k : k + 1], [0])
        parts.append(
            Blocks(
                inner.offsets + blocks.offsets[k],
                inner.sizes,
                blocks.starts[k] + (inner.offsets * blocks.strides[k]).sum(axis=1, dtype=np.int64),
                np.tile(blocks.strides[k], (len(inner), 1)),
                np.full(len(inner), blocks.buffers[k]),
            )
        )
        done = k + 1
    return concat([*parts, _whole_ones(blocks, begin, end, done, len(blocks))], blocks.ndim)


def _whole_ones(blocks: Blocks, begin: Ints, end: Ints, first: int, last: int) -> Blocks:
    """The blocks among [first, last) of which something is taken, each of them whole."""
    return blocks.take(first + np.flatnonzero(begin[first:last] < end[first:last]))


def extents(blocks: Blocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) each block's first element in its buffer, and the one after its last, gaps included.

    The results are floating-point numbers. They are exact up to 2^53 elements. Hostile strides, whose products would
    overflow integers, give large numbers instead of wrapping around.
    """
    reach = np.maximum(blocks.sizes - 1, 0) * blocks.strides.astype(np.float64)
    first = blocks.starts + np.minimum(reach, 0).sum(axis=1)
    return first, blocks.starts + np.maximum(reach, 0).sum(axis=1) + 1


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of a buffer from the first to the last of one box, including both and the gaps between them.

    Strides must not be negative. The span of a box without elements is 0.
    """
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def unravel(positions: Ints, shape: Shape) -> Ints:
    """(n, d) the tensor's index at each of these positions in its row-major order."""
    out = np.empty((len(positions), len(shape)), np.int64)
    for k, stride in enumerate(row_major(shape)):
        out[:, k], positions = np.divmod(positions, stride)
    return out


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
