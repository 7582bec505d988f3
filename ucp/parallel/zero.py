"""How ZeRO cuts a rank's parameters over its data-parallel group: its two rules, as blocks.

Stages 1 and 2 lay a param group's parameters end to end in one flat buffer and cut that into equal partitions
(DeepSpeed ``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py``). Stage 3 cuts every parameter by itself
into ceil-sized pieces (``runtime/zero/partition_parameters.py``). In both, ``buffers`` of the blocks returned is the
data-parallel rank, and ``starts`` is the position in that rank's partition. What no block covers is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from ucp.geometry import Blocks, empty, flat_ranges, numel

T = TypeVar("T")

# DeepSpeed's nccl_start_alignment_factor: partitions start on 4-byte boundaries in 16-bit elements.
ALIGNMENT = 2


def flat_offsets(numels: Sequence[int], paddings: Sequence[int] | None = None) -> tuple[list[int], int]:
    """Each parameter's offset in its group's flat buffer, and the total, in elements.

    ``paddings[i]`` elements of padding follow parameter i (``zero_optimization.parameter_alignment``).
    """
    offsets, at = [], 0
    for i, n in enumerate(numels):
        offsets.append(at)
        at += n + (paddings[i] if paddings else 0)
    return offsets, at


def alignment_paddings(numels: Sequence[int], alignment_bytes: int, itemsize: int) -> list[int]:
    """Elements of padding after each parameter under ``parameter_alignment``; the last parameter gets none."""
    step = max(alignment_bytes // itemsize, 1)
    out, at = [], 0
    for i, n in enumerate(numels):
        at += n
        out.append(0 if i == len(numels) - 1 else -at % step)
        at += out[-1]
    return out


def partition_size(total: int, dp: int, alignment: int = ALIGNMENT) -> int:
    """Elements in each rank's partition of a flat buffer of ``total`` elements (stages 1 and 2)."""
    unit = alignment * dp
    return -(-total // unit) * unit // dp


def round_robin(count: int, dp: int) -> list[int]:
    """The order in which ``round_robin_gradients`` lays out a group's parameters: by index modulo dp, then index."""
    return [i for first in range(min(dp, count)) for i in range(first, count, dp)]


def undo_round_robin(items: Sequence[T], dp: int) -> list[T]:
    """These items in their original order. They are given in the order in which ``round_robin_gradients`` lays out."""
    original = dict(zip(round_robin(len(items), dp), items, strict=True))
    return [original[i] for i in range(len(items))]


def flat_partition(shape: Sequence[int], offset: int, size: int) -> Blocks:
    """Stages 1 and 2: a parameter that begins at ``offset`` of a flat buffer, cut into partitions of ``size``."""
    n = numel(shape)
    if n == 0:
        return empty(len(shape))
    ranks = np.arange(offset // size, (offset + n - 1) // size + 1)
    first = np.maximum(ranks * size - offset, 0)
    last = np.minimum((ranks + 1) * size - offset, n)
    return flat_ranges(shape, first, last, offset + first - ranks * size, ranks)


@lru_cache(maxsize=1 << 16)
def own_flat_partition(shape: tuple[int, ...], offset: int, size: int, rank: int) -> Blocks:
    """What one rank has of `flat_partition`, in one buffer. It is cached, since a run asks for the same at every save
    and load."""
    first = max(rank * size - offset, 0)
    last = min((rank + 1) * size - offset, numel(shape))
    return flat_ranges(shape, [first], [last], [offset + first - rank * size])


def ceil_size(n: int, dp: int) -> int:
    """Stage 3: elements of every rank's piece of a parameter of n elements, padding included."""
    return -(-n // dp)


def ceil_partition(shape: Sequence[int], offset: int, dp: int) -> Blocks:
    """Stage 3: a parameter whose piece begins at ``offset`` of every rank's subgroup partition.

    Most parameters of a model have one of a few shapes. Those share the arrays of their boxes, which are worked out and
    checked once for each shape.
    """
    cut = _all_pieces(tuple(shape), dp)
    return replace(cut, starts=cut.starts + offset)


@lru_cache(maxsize=64)
def _all_pieces(shape: tuple[int, ...], dp: int) -> Blocks:
    n = numel(shape)
    piece = ceil_size(n, dp)
    ranks = np.arange(dp)
    first = np.minimum(ranks * piece, n)
    last = np.minimum((ranks + 1) * piece, n)
    return flat_ranges(shape, first, last, np.zeros(dp, np.int64), ranks)


@lru_cache(maxsize=1 << 12)
def _own_piece(shape: tuple[int, ...], dp: int, rank: int) -> Blocks:
    n = numel(shape)
    piece = ceil_size(n, dp)
    return flat_ranges(shape, [min(rank * piece, n)], [min((rank + 1) * piece, n)], [0])


def own_ceil_partition(shape: Sequence[int], offset: int, dp: int, rank: int) -> Blocks:
    """What one rank has of `ceil_partition`, in one buffer."""
    piece = _own_piece(tuple(shape), dp, rank)
    return piece.in_buffer(0, offset) if offset else piece


def subgroups(pieces: Sequence[int], limit: int | None) -> list[list[int]]:
    """Stage 3: the indices of one param group's parameters, split into subgroups.

    ``pieces`` are per-rank element counts, and ``limit`` is ``sub_group_size``. The parameter that brings a subgroup to
    the limit is its last one, so the split depends on dp (``stage3.py: _create_fp16_sub_groups``).
    """
    if limit is None or limit >= sum(pieces):
        return [list(range(len(pieces)))]
    out: list[list[int]] = []
    current: list[int] = []
    held = 0
    for i, n in enumerate(pieces):
        current.append(i)
        held += n
        if held >= limit or i == len(pieces) - 1:
            out.append(current)
            current, held = [], 0
    return out
