"""Where elements of a logical tensor lie in memory, as runs of bytes. A logical digest is added up over such runs.

A logical tensor is a row of bytes here: its elements in row-major order, each little-endian. A *run* is a range of
that row that lies in one piece in a buffer, too. Blocks of any kind become runs, a bounded number of runs at a time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ucp.geometry import Blocks, Copies, Ints, Shape, collapse, row_major, runs

LIMIT = 1 << 18
"""Runs that are listed at once."""

FEW = 8
"""Blocks that are looked at one by one."""

SAMPLE_BLOCK = 64 << 10
"""Bytes of a block of a tensor's row: what a sample takes or leaves."""


Run = tuple[int, int, int]
"""One run: its first byte in the buffer, its first byte in the row, and its bytes."""


@dataclass(frozen=True)
class Runs:
    """Columns of bytes: run k is ``buffer[sources[k]:][:sizes[k]]`` and ``row[places[k]:][:sizes[k]]``."""

    sources: Ints
    places: Ints
    sizes: Ints

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    def take(self, index: Ints) -> Runs:
        return Runs(self.sources[index], self.places[index], self.sizes[index])


def runs_of(shape: Shape, blocks: Blocks, width: int, bases: Ints | None = None) -> Iterator[Runs]:
    """The runs of these blocks, all in one buffer.

    width: bytes of an element.
    bases: (n,) the byte of the buffer from which each block's start is counted. It is 0 by default.

    Yields at most ``LIMIT`` runs at a time.
    """
    few = few_runs(shape, blocks, width, bases)
    if few is not None:
        columns = np.array(few, np.int64).reshape(-1, 3)
        if len(few):
            yield Runs(columns[:, 0].copy(), columns[:, 1].copy(), columns[:, 2].copy())
        return
    for part in _bounded(_copies(shape, blocks)):
        which, sources, places, counts = runs(part)
        start = 0 if bases is None else bases[part.source[which]]
        yield Runs(sources * width + start, places * width, counts * width)


def few_runs(shape: Shape, blocks: Blocks, width: int, bases: Ints | None = None) -> list[Run] | None:
    """The runs of a few blocks, each of which is a range of the row, as whole tensors and flat ranges are.

    None if there are more blocks, or if one of them is not such a range. A plan for copies finds the same, but takes
    ten times as long.
    """
    if len(blocks) > FEW:
        return None
    whole = _strides(tuple(shape))
    if len(blocks) == 1 and blocks.sizes[0].tolist() == list(shape):
        strides = blocks.strides[0].tolist()
        if any(n > 1 and strides[d] != whole[d] for d, n in enumerate(shape)):
            return None
        size = math.prod(shape) * width
        return [(int(blocks.starts[0]) * width + (0 if bases is None else int(bases[0])), 0, size)] if size else []
    found = []
    for k, (offsets, sizes, start, strides) in enumerate(
        zip(
            blocks.offsets.tolist(), blocks.sizes.tolist(), blocks.starts.tolist(), blocks.strides.tolist(), strict=True
        )
    ):
        if 0 in sizes:
            continue
        axis = next((d for d, n in enumerate(sizes) if n > 1), len(sizes))
        if any(sizes[d] != shape[d] for d in range(axis + 1, len(sizes))):
            return None
        if any(sizes[d] > 1 and strides[d] != whole[d] for d in range(axis, len(sizes))):
            return None
        place = sum(at * step for at, step in zip(offsets, whole, strict=True)) * width
        source = start * width + (0 if bases is None else int(bases[k]))
        found.append((source, place, math.prod(sizes) * width))
    merged: list[Run] = []
    for source, place, size in sorted(found):
        if merged and (source - merged[-1][0], place - merged[-1][1]) == (merged[-1][2], merged[-1][2]):
            merged[-1] = (*merged[-1][:2], merged[-1][2] + size)
        else:
            merged.append((source, place, size))
    return merged


@lru_cache(1024)
def _strides(shape: Shape) -> Shape:
    return row_major(shape)


def _copies(shape: Shape, blocks: Blocks) -> Copies:
    """The copies from the buffer to the row-major order of the whole tensor."""
    strides = np.array(row_major(shape), np.int64)
    kept = np.flatnonzero(np.all(blocks.sizes > 0, axis=1))
    blocks = blocks if len(kept) == len(blocks) else blocks.take(kept)
    return collapse(
        Copies(
            source=kept,
            target=np.zeros_like(kept),
            source_starts=blocks.starts,
            target_starts=np.sum(blocks.offsets * strides, axis=1, dtype=np.int64),
            sizes=blocks.sizes,
            source_strides=blocks.strides,
            target_strides=np.tile(strides, (len(blocks), 1)),
        )
    )


def _bounded(copies: Copies) -> Iterator[Copies]:
    """The copies in groups of at most ``LIMIT`` runs. A copy with more is halved along its longest outer dimension."""
    outer = np.prod(copies.sizes[:, :-1], axis=1, dtype=np.int64)
    if int(outer.sum()) <= LIMIT:
        if len(copies):
            yield copies
        return
    if len(copies) > 1:
        half = len(copies) // 2
        yield from _bounded(_taken(copies, slice(0, half)))
        yield from _bounded(_taken(copies, slice(half, None)))
        return
    axis = int(np.argmax(copies.sizes[0, :-1]))
    count = int(copies.sizes[0, axis])
    for first, last in ((0, count // 2), (count // 2, count)):
        sizes = copies.sizes.copy()
        sizes[0, axis] = last - first
        yield from _bounded(
            Copies(
                copies.source,
                copies.target,
                copies.source_starts + first * copies.source_strides[:, axis],
                copies.target_starts + first * copies.target_strides[:, axis],
                sizes,
                copies.source_strides,
                copies.target_strides,
            )
        )


def _taken(c: Copies, part: slice) -> Copies:
    return Copies(
        c.source[part],
        c.target[part],
        c.source_starts[part],
        c.target_starts[part],
        c.sizes[part],
        c.source_strides[part],
        c.target_strides[part],
    )


def within_buffer(found: Runs, first: int, last: int) -> Runs:
    """The parts of the runs that lie in the buffer's bytes ``[first, last)``, counted from ``first``."""
    low = np.maximum(found.sources, first)
    high = np.minimum(found.sources + found.sizes, last)
    keep = np.flatnonzero(high > low)
    low, high = low[keep], high[keep]
    return Runs(low - first, found.places[keep] + low - found.sources[keep], high - low)


@dataclass(frozen=True)
class Sample:
    """Which blocks of `SAMPLE_BLOCK` bytes of a tensor's row are looked at.

    They are one of each group of ``every`` blocks in a row, drawn by ``seed`` from those that there are. So small
    tensors are looked at whole, and another seed looks at other blocks. first: as older checkpoints have it: each
    tensor's first block besides, and of a last group that is not full at times none. All first blocks lie on one rank
    if weights are cut along their first dimension, so that the others waited for it.
    """

    seed: int
    every: int
    first: bool = True

    def picks(self, nbytes: int) -> Ints:
        """The blocks of a row of so many bytes that are looked at, ascending."""
        count = -(-nbytes // SAMPLE_BLOCK)
        groups = np.arange(-(-count // self.every))
        found = groups * self.every + self._drawn(groups, count)
        if not self.first:
            return found
        found = found[found < count]
        return np.unique(np.concatenate([np.zeros(min(count, 1), np.int64), found]))

    def seen(self, nbytes: int) -> int:
        """How many bytes of a row of so many are looked at."""
        starts = _starts(self, -(-nbytes // SAMPLE_BLOCK))
        return len(starts) * SAMPLE_BLOCK - max(0, starts[-1] + SAMPLE_BLOCK - nbytes) if starts else 0

    def takes(self, blocks: Ints, nbytes: int) -> np.typing.NDArray[np.bool_]:
        """Which of these blocks of a row of so many bytes are looked at, by their numbers."""
        count = -(-nbytes // SAMPLE_BLOCK)
        first = int(blocks.min()) // self.every if len(blocks) else 0
        last = int(blocks.max()) // self.every if len(blocks) else -1
        if last - first < 8:  # neighbours, the usual case
            drawn = self._drawn(np.arange(first, last + 1), count)
            picked = drawn[blocks // self.every - first]
        else:
            picked = self._drawn(blocks // self.every, count)
        taken = np.asarray(blocks % self.every == picked)
        return taken | (blocks == 0) if self.first else taken

    def cut(self, found: Iterable[Run], nbytes: int) -> list[Run]:
        """As `of`, for a few runs."""
        if nbytes <= SAMPLE_BLOCK:
            return list(found)
        starts = _starts(self, -(-nbytes // SAMPLE_BLOCK))
        out = []
        for source, place, size in found:
            k = bisect_right(starts, place - SAMPLE_BLOCK)
            while k < len(starts) and starts[k] < place + size:
                low, high = max(place, starts[k]), min(place + size, starts[k] + SAMPLE_BLOCK)
                out.append((source + low - place, low, high - low))
                k += 1
        return out

    def _drawn(self, groups: Ints, count: int) -> Ints:
        """The place of the block that is drawn in each group. count: how many blocks there are."""
        numbers = mixed(groups.astype(np.uint64) + np.uint64(self.seed & 0xFFFF_FFFF_FFFF_FFFF))
        if self.first:
            return (numbers % np.uint64(self.every)).astype(np.int64)
        there = np.clip(count - groups * self.every, 1, self.every)
        return (numbers % there.astype(np.uint64)).astype(np.int64)

    def of(self, found: Runs, nbytes: int) -> Runs:
        """The parts of the runs that are looked at. nbytes: of the whole tensor."""
        starts = self.picks(nbytes) * SAMPLE_BLOCK
        first = np.searchsorted(starts + SAMPLE_BLOCK, found.places, "right")
        last = np.searchsorted(starts, found.places + found.sizes, "left")
        times = np.maximum(last - first, 0)
        which = np.repeat(np.arange(len(found)), times)
        pick = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times) + first[which]
        low = np.maximum(found.places[which], starts[pick])
        high = np.minimum(found.places[which] + found.sizes[which], starts[pick] + SAMPLE_BLOCK)
        return Runs(found.sources[which] + low - found.places[which], low, high - low)


@lru_cache(1024)
def _starts(sample: Sample, blocks: int) -> tuple[int, ...]:
    """The first bytes of the blocks that are looked at, of a row of ``blocks`` blocks.

    Cached, since most tensors have the same size as others.
    """
    return tuple((sample.picks(blocks * SAMPLE_BLOCK) * SAMPLE_BLOCK).tolist())


def mixed(values: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
    """A 64-bit mixer (the finalizer of splitmix64): a bijection in which every bit of the input changes half of the
    bits of the output."""
    z = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
