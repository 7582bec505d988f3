"""A parameter's fragments as rectangles to draw: few enough for a page, whatever their number."""

from __future__ import annotations

from typing import Any

import numpy as np

from ucp import limits
from ucp.geometry import Blocks, Ints, Shape, numel


def rectangles(shape: Shape, blocks: Blocks, holders: Ints) -> dict[str, Any]:
    """The boxes on the tensor's plane: rows are all dimensions but the last, columns the last one.

    holders: (n,) who holds each block. Returns ``rows``, ``columns``, ``fragments`` (how many there are) and ``boxes``:
    for each rectangle first row, rows, first column, columns, first holder, last holder, fragments. A rectangle that
    stands for several fragments reaches from the first of them to the last.
    """
    columns = shape[-1] if shape else 1
    rows = numel(shape[:-1]) if shape else 1
    plane = _plane(shape, blocks)
    held = np.stack([holders, holders, np.ones(len(holders), np.int64)], axis=1)
    if len(plane) and np.all(plane[:, 1] > 0):
        order = np.lexsort((plane[:, 2], plane[:, 0]))
        plane, held = plane[order], held[order]
    if len(plane) > limits.MAP_RECTANGLES_COUNT:
        plane, held = _joined(plane, held)
    return {
        "rows": rows,
        "columns": columns,
        "fragments": len(blocks),
        "boxes": np.concatenate([plane, held], axis=1).ravel().tolist() if len(plane) else [],
    }


def _plane(shape: Shape, blocks: Blocks) -> Ints:
    """(n, 4) first row, rows, first column, columns of each box. A box that is scattered over rows reaches from its
    first row to its last."""
    n, d = len(blocks), len(shape)
    if d == 0:
        return np.tile(np.array([0, 1, 0, 1], np.int64), (n, 1))
    steps = np.ones(d - 1, np.int64)
    for k in range(d - 3, -1, -1):
        steps[k] = steps[k + 1] * shape[k + 1]
    first = blocks.offsets[:, :-1] @ steps
    last = (blocks.offsets[:, :-1] + blocks.sizes[:, :-1] - 1) @ steps
    return np.stack([first, last - first + 1, blocks.offsets[:, -1], blocks.sizes[:, -1]], axis=1)


def _joined(plane: Ints, held: Ints) -> tuple[Ints, Ints]:
    """`limits.MAP_RECTANGLES_COUNT` rectangles, each around the same number of neighbours."""
    edges = np.linspace(0, len(plane), limits.MAP_RECTANGLES_COUNT + 1).astype(np.int64)[:-1]
    row, end = np.minimum.reduceat(plane[:, 0], edges), np.maximum.reduceat(plane[:, 0] + plane[:, 1], edges)
    column = np.minimum.reduceat(plane[:, 2], edges)
    right = np.maximum.reduceat(plane[:, 2] + plane[:, 3], edges)
    out = np.stack([row, end - row, column, right - column], axis=1)
    first, last = np.minimum.reduceat(held[:, 0], edges), np.maximum.reduceat(held[:, 1], edges)
    return out, np.stack([first, last, np.add.reduceat(held[:, 2], edges)], axis=1)
