"""Whether blocks hold every element of a tensor exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ucp.geometry.blocks import Blocks, Ints, numel
from ucp.geometry.copies import intersect, intersect_grouped


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
    held = np.zeros(len(shapes), np.int64)
    np.add.at(held, groups, blocks.counts)
    if held.tolist() != [numel(shape) for shape in shapes]:
        return False
    pairs = intersect_grouped(blocks, groups, blocks, groups)
    return not np.any(pairs.counts[pairs.source < pairs.target])
