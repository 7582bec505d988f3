"""Whether blocks hold every element of a tensor exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ucp.geometry.blocks import Blocks, Ints, numel
from ucp.geometry.copies import intersect, intersect_grouped

# Places in tensors of fewer elements are whole numbers of 64 bits, and so are sums of two.
_COUNTABLE = 1 << 62


@dataclass(frozen=True)
class CoverageFault:
    """Why blocks don't hold every element of a tensor exactly once. ``str()`` says it in a few words.

    kind: "outside" (a box leaves the tensor), "overlap" (elements are held more than once) or "hole" (elements are
    missing).
    elements: how many are missing, or held more than once (one that is held three times counts three times).
    total: elements of the tensor.
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

    Out-of-bounds boxes, overlaps and holes are told apart. The check is exact: boxes cover the tensor if they are in
    bounds, are pairwise disjoint and have as many elements in all as the tensor.
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
    """Whether `coverage_fault` finds nothing in any of these tensors, which all have the same number of dimensions.

    groups: (n,) the index of the shape that each block belongs to, ascending.
    """
    size = np.array([[int(n) for n in shape] for shape in shapes], np.int64).reshape(len(shapes), blocks.ndim)[groups]
    if np.any((blocks.sizes < 0) | (blocks.offsets < 0) | (blocks.offsets > size - blocks.sizes)):
        return False
    totals = [numel(shape) for shape in shapes]
    counts = blocks.counts
    held = np.zeros(len(shapes), np.int64)
    np.add.at(held, groups, counts)
    if held.tolist() != totals:
        return False
    tiled = _are_tiled(size, totals, blocks, counts, groups)
    if tiled.all():
        return True
    left = np.flatnonzero(~tiled[groups])
    rest, of = blocks.take(left), groups[left]
    pairs = intersect_grouped(rest, of, rest, of)
    return not np.any(pairs.counts[pairs.source < pairs.target])


def _are_tiled(size: Ints, totals: Sequence[int], blocks: Blocks, counts: Ints, groups: Ints) -> NDArray[np.bool_]:
    """For each tensor whether its blocks are ranges of its row-major order that follow one another from its first
    element on, as whole tensors, rows, and flat ranges do. Then there is no need to look for overlaps.

    size: (n, d) the shape that each block belongs to. totals: elements of the tensors, all of which blocks hold.
    """
    tiled = np.array([0 < total < _COUNTABLE for total in totals], bool)
    within = np.flatnonzero(tiled[groups] & (counts > 0))
    first, last, stride = (np.zeros(len(within), np.int64) for _ in range(3))
    stride += 1
    for k in range(blocks.ndim - 1, -1, -1):
        first += blocks.offsets[within, k] * stride
        last += (blocks.offsets[within, k] + blocks.sizes[within, k] - 1) * stride
        stride *= size[within, k]
    of = groups[within]
    tiled[of[last + 1 - first != counts[within]]] = False
    order = np.lexsort((first, of))
    of, first, last = of[order], first[order], last[order]
    begins = np.ones(len(of), bool)
    begins[1:] = of[1:] != of[:-1]
    before = np.zeros(len(of), np.int64)
    before[1:] = last[:-1] + 1
    tiled[of[first != np.where(begins, 0, before)]] = False
    return tiled
