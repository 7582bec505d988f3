"""What property tests share: random shapes, random ways to cut and lay out a tensor, and numpy as the judge.

The judge never asks the code under test where an element is. A tensor's elements are numbered by
``np.arange(...).reshape(shape)``; where a block says that they lie is spelled out by plain index arithmetic.
"""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ucp.geometry import Blocks, Copies, Shape

Array = NDArray[np.int64]

HOLE = -1  # in buffers: no element of the tensor


def law(examples: int = 60) -> settings:
    """Settings of one property: as many examples as its price allows, and no clock."""
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


sizes = st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 11, 13])
shapes = st.lists(sizes, max_size=4).map(tuple).filter(lambda shape: np.prod(shape, dtype=int) <= 5000)
with_empty = st.one_of(
    shapes, st.lists(st.sampled_from([0, 1, 3, 4]), min_size=1, max_size=3).map(tuple).filter(lambda s: 0 in s)
)
seeds = st.integers(0, 2**32 - 1)
generators = seeds.map(np.random.default_rng)


def ids(shape: Shape) -> Array:
    """The tensor whose elements are their own row-major numbers."""
    return np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64).reshape(shape)


def flat_splits(rng: np.random.Generator, n: int, parts: int) -> Array:
    """Borders of ``parts`` consecutive ranges, some maybe empty, that cover ``[0, n)``."""
    return np.sort(np.concatenate([[0, n], rng.integers(0, n + 1, parts - 1)]))


def box_splits(rng: np.random.Generator, shape: Shape, cuts: int) -> list[tuple[Shape, Shape]]:
    """(offsets, sizes) of boxes that cover the tensor once: some box is cut in two, ``cuts`` times."""
    boxes = [((0,) * len(shape), tuple(shape))]
    for _ in range(cuts):
        offsets, size = boxes.pop(int(rng.integers(len(boxes))))
        axes = [k for k, n in enumerate(size) if n > 1]
        if not axes:
            boxes.append((offsets, size))
            continue
        k = int(rng.choice(axes))
        at = int(rng.integers(1, size[k]))
        first, second = list(size), list(size)
        first[k], second[k] = at, size[k] - at
        moved = list(offsets)
        moved[k] += at
        boxes += [(offsets, tuple(first)), (tuple(moved), tuple(second))]
    return boxes


def laid_out(
    rng: np.random.Generator, boxes: list[tuple[Shape, Shape]], buffers: int = 3, dense: bool = False
) -> tuple[Blocks, list[int]]:
    """The boxes at random places of random buffers, and the buffers' lengths in elements.

    Unless ``dense``, a box may be transposed, its rows may lie apart, and gaps may lie between boxes.
    """
    d = len(boxes[0][0]) if boxes else 0
    lengths = [0] * buffers
    starts, strides, owners = [], [], []
    for _, size in boxes:
        owner = int(rng.integers(buffers))
        order = list(range(d)) if dense or rng.random() < 0.5 else [int(k) for k in rng.permutation(d)]
        step, steps = 1, [0] * d
        for k in reversed(order):
            steps[k] = step
            step = step * size[k] + (0 if dense or rng.random() < 0.6 else int(rng.integers(4)))
        start = lengths[owner] + (0 if dense else int(rng.integers(3)))
        lengths[owner] = start + step
        starts.append(start)
        strides.append(steps)
        owners.append(owner)
    n = len(boxes)
    blocks = Blocks(
        np.array([b[0] for b in boxes], np.int64).reshape(n, d),
        np.array([b[1] for b in boxes], np.int64).reshape(n, d),
        np.array(starts, np.int64),
        np.array(strides, np.int64).reshape(n, d),
        np.array(owners, np.int64),
    )
    return blocks, lengths


def partitions(rng: np.random.Generator, shape: Shape) -> tuple[Blocks, list[int]]:
    """Some way to hold a whole tensor in a few buffers: random boxes, or ranges of its row-major order."""
    if rng.random() < 0.6 and shape:
        return laid_out(rng, box_splits(rng, shape, int(rng.integers(12))))
    # Ranges, spelled out row by row (the slowest way, and the plainest): one run of the innermost dimension each.
    n = int(np.prod(shape, dtype=np.int64))
    width = shape[-1] if shape else 1
    borders = flat_splits(rng, n, int(rng.integers(1, 6)))
    boxes: list[tuple[Shape, Shape]] = []
    starts, owners = [], []
    lengths = [0, 0, 0]
    for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        owner = int(rng.integers(3))
        at = a
        while at < b:
            stop = min(b, (at // width + 1) * width)
            where = tuple(int(i) for i in np.unravel_index(at, shape)) if shape else ()
            boxes.append((where, (*(1 for _ in shape[:-1]), stop - at) if shape else ()))
            starts.append(lengths[owner] + at - a)
            owners.append(owner)
            at = stop
        lengths[owner] += b - a
    d = len(shape)
    strides = [int(np.prod(shape[k + 1 :], dtype=np.int64)) for k in range(d)]
    return Blocks(
        np.array([b[0] for b in boxes], np.int64).reshape(len(boxes), d),
        np.array([b[1] for b in boxes], np.int64).reshape(len(boxes), d),
        np.array(starts, np.int64),
        np.tile(np.array(strides, np.int64), (len(boxes), 1)),
        np.array(owners, np.int64),
    ), lengths


def inside(offsets: Array, sizes: Array) -> tuple[slice, ...]:
    """The index that takes this box out of its tensor."""
    return tuple(slice(int(o), int(o) + int(n)) for o, n in zip(offsets, sizes, strict=True))


def positions(sizes: Array, start: int, strides: Array) -> Array:
    """Where every element of a box lies in its buffer, as an array of the box's shape."""
    out = np.full(tuple(int(n) for n in sizes), int(start), np.int64)
    for k, (n, stride) in enumerate(zip(sizes, strides, strict=True)):
        along = np.arange(int(n)) * int(stride)
        out += along.reshape([-1 if axis == k else 1 for axis in range(len(sizes))])
    return out


def held(blocks: Blocks, shape: Shape) -> list[tuple[Array, Array]]:
    """For every block: the elements it holds, and their positions in its buffer."""
    numbers = ids(shape)
    return [
        (
            numbers[inside(blocks.offsets[i], blocks.sizes[i])].ravel(),
            positions(blocks.sizes[i], blocks.starts[i], blocks.strides[i]).ravel(),
        )
        for i in range(len(blocks))
    ]


def cut(blocks: Blocks, lengths: list[int], tensor: NDArray) -> list[NDArray]:
    """The buffers that these blocks describe, filled from the tensor directly."""
    buffers = [np.full(n, HOLE, tensor.dtype) for n in lengths]
    for i in range(len(blocks)):
        where = positions(blocks.sizes[i], blocks.starts[i], blocks.strides[i])
        buffers[int(blocks.buffers[i])][where] = tensor[inside(blocks.offsets[i], blocks.sizes[i])]
    return buffers


def moved(copies: Copies) -> list[tuple[int, int, Array, Array]]:
    """For every copy: its two blocks, and the buffer positions that it reads and writes, element by element."""
    return [
        (
            int(copies.source[i]),
            int(copies.target[i]),
            positions(copies.sizes[i], copies.source_starts[i], copies.source_strides[i]).ravel(),
            positions(copies.sizes[i], copies.target_starts[i], copies.target_strides[i]).ravel(),
        )
        for i in range(len(copies))
    ]


def copied(copies: Copies, source: Blocks, target: Blocks, buffers: list[NDArray], lengths: list[int]) -> list[NDArray]:
    """The target's buffers after these copies."""
    out = [np.full(n, HOLE, buffers[0].dtype) for n in lengths]
    for i, j, read, write in moved(copies):
        out[int(target.buffers[j])][write] = buffers[int(source.buffers[i])][read]
    return out
