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
- cutting a tensor by any blocks and merging the cuts again is the identity;
- the elements of any ranges that follow each other (``take_elements``) are those of the blocks, each once.

The modules:

- `blocks`: what blocks are, and operations on one set of them;
- `copies`: what two sets of blocks have in common;
- `shards`: a shard's blocks as blocks of the whole tensor, and the reverse;
- `coverage`: whether a tensor is held exactly once.
"""

from __future__ import annotations

from ucp.geometry.blocks import (
    Blocks,
    Ints,
    Joined,
    Shape,
    box,
    concat,
    dense_strides,
    empty,
    extents,
    flat_ranges,
    joined,
    numel,
    packed,
    region,
    row_major,
    span,
    take_elements,
    whole,
)
from ucp.geometry.copies import Copies, collapse, intersect, intersect_grouped, runs
from ucp.geometry.coverage import CoverageFault, coverage_fault, coverage_holds
from ucp.geometry.shards import compose, restrict

__all__ = [
    "Blocks",
    "Ints",
    "Joined",
    "Shape",
    "box",
    "concat",
    "dense_strides",
    "empty",
    "extents",
    "flat_ranges",
    "joined",
    "numel",
    "packed",
    "region",
    "row_major",
    "span",
    "take_elements",
    "whole",
    "Copies",
    "collapse",
    "intersect",
    "intersect_grouped",
    "runs",
    "CoverageFault",
    "coverage_fault",
    "coverage_holds",
    "compose",
    "restrict",
]
