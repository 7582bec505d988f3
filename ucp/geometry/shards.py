"""A shard and the tensor that it is cut from: the blocks of each as blocks of the other."""

from __future__ import annotations

import numpy as np

from ucp.geometry.blocks import Blocks, Ints, Shape, empty, row_major, unravel
from ucp.geometry.copies import intersect


def compose(inner: Blocks, outer: Blocks, inner_shape: Shape, outer_shape: Shape) -> tuple[Blocks, Ints]:
    """A shard's blocks as blocks of the tensor that it was cut from.

    inner: boxes of the shard, wherever they lie.
    outer: boxes of the tensor, at their places in the shard's row-major order.
    inner_shape, outer_shape: the shard's and the tensor's.

    Returns the boxes of the tensor where they lie in inner's buffers, and for each of them the inner block that it is
    part of. What no outer block covers (padding of the shard) is left out.
    """
    if not len(inner) or not len(outer):
        return empty(outer.ndim), np.zeros(0, np.int64)
    if len(outer) == 1 and inner_shape == outer_shape and outer.starts[0] == 0 and tuple(outer.sizes[0]) == outer_shape:
        return inner, np.arange(len(inner))  # the shard is the tensor, as for every tensor of most checkpoints
    strides = np.tile(np.array(row_major(outer_shape), np.int64), (len(outer), 1))
    # The same boxes seen from the shard: where they are in it, and where in the tensor's row-major order.
    there = Blocks(
        unravel(outer.starts, inner_shape),
        outer.sizes,
        np.sum(outer.offsets * strides, axis=1, dtype=np.int64),
        strides,
        np.zeros(len(outer), np.int64),
    )
    found = intersect(inner, there)
    offsets = unravel(found.target_starts, outer_shape)
    return (
        Blocks(offsets, found.sizes, found.source_starts, found.source_strides, inner.buffers[found.source]),
        found.source,
    )


def restrict(whole_blocks: Blocks, outer: Blocks, inner_shape: Shape) -> tuple[Blocks, Ints]:
    """A tensor's blocks as blocks of a shard that is cut from it: the reverse of `compose`.

    whole_blocks: boxes of the tensor, wherever they lie.
    outer: boxes of the tensor, at their places in the shard's row-major order.

    Returns the boxes of the shard where they lie in the tensor's buffers, and for each of them the tensor's block that
    it is part of.
    """
    found = intersect(whole_blocks, outer)
    offsets = unravel(found.target_starts, inner_shape)
    return (
        Blocks(offsets, found.sizes, found.source_starts, found.source_strides, whole_blocks.buffers[found.source]),
        found.source,
    )
