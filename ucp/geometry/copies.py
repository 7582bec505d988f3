"""Which elements two sets of blocks have in common, and the copies between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ucp import limits
from ucp.geometry.blocks import Blocks, Ints, row_major


@dataclass(frozen=True)
class Copies:
    """Element copies between two sets of blocks of one logical tensor, as columns.

    source, target: (n,) indices of the blocks.
    source_starts, target_starts: (n,) position of the first element in its buffer, in elements.
    sizes: (n, d) the box copied, in elements.
    source_strides, target_strides: (n, d) in elements.
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


def candidates(a_lo: Ints, a_hi: Ints, b_lo: Ints, b_hi: Ints) -> tuple[Ints, Ints]:
    """All pairs (i, j) of overlapping intervals, each once; found by sorting, not by trying all pairs.

    An interval without elements may come with pairs that don't overlap.
    """
    # If two intervals overlap, either b begins inside a, or a begins inside b and after b's beginning.
    order_b, order_a = np.argsort(b_lo, kind="stable"), np.argsort(a_lo, kind="stable")
    first_b, first_a = b_lo[order_b], a_lo[order_a]
    i, at = _spread(np.searchsorted(first_b, a_lo, "left"), np.searchsorted(first_b, a_hi, "left"))
    j, at_a = _spread(np.searchsorted(first_a, b_lo, "right"), np.searchsorted(first_a, b_hi, "left"))
    return np.concatenate([i, order_a[at_a]]), np.concatenate([order_b[at], j])


def _spread(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Every (k, p) with ``first[k] <= p < last[k]``, as two columns."""
    counts = np.maximum(last - first, 0)
    k = np.repeat(np.arange(len(counts)), counts)
    return k, np.arange(len(k)) - np.repeat(np.cumsum(counts) - counts, counts) + first[k]


def pair_count(a_lo: Ints, a_hi: Ints, b_lo: Ints, b_hi: Ints) -> int:
    """How many pairs ``candidates`` would return, without listing them."""
    begun = np.searchsorted(np.sort(b_lo), a_hi, "left").sum()
    ended = np.searchsorted(np.sort(b_hi), a_lo, "right").sum()
    return int(begun - ended)


def _overlapping(a: Blocks, b: Blocks) -> tuple[Ints, Ints]:
    """Pairs of blocks whose boxes may overlap: those that overlap on the axis that tells most of them apart.

    The axes tried are the tensor's own and its row-major order, in which a box reaches from its first element to its
    last. Pieces of one row may overlap on all axes but the row-major one. Column shards overlap on the row-major one
    but not on the axis that they are cut along.
    """
    a_end, b_end = a.offsets + a.sizes, b.offsets + b.sizes
    strides = np.array(row_major(np.maximum(a_end.max(axis=0), b_end.max(axis=0)).tolist()), np.int64)
    axes = [
        (a.offsets @ strides, (a_end - 1) @ strides + 1, b.offsets @ strides, (b_end - 1) @ strides + 1),
        *((a.offsets[:, k], a_end[:, k], b.offsets[:, k], b_end[:, k]) for k in range(a.ndim)),
    ]
    # Choosing costs a few sorts, which is not worth it for a small number of pairs.
    best = axes[0] if len(a) * len(b) < 4096 else min(axes, key=lambda axis: pair_count(*axis))
    return candidates(*best)


def intersect(source: Blocks, target: Blocks) -> Copies:
    """What must be copied so that the target's blocks hold what the source's blocks hold, box by box."""
    return _copies(source, target, *_pairs(source, target))


def intersect_grouped(source: Blocks, source_groups: Ints, target: Blocks, target_groups: Ints) -> Copies:
    """Like `intersect`, for blocks of several tensors: only blocks of the same group can have elements in common.

    source_groups, target_groups: the number of each block's group, ascending. One call for a thousand tensors of a few
    blocks each takes about as long as a few calls of `intersect`.
    """
    count = 1 + int(max(source_groups.max(initial=-1), target_groups.max(initial=-1)))
    sources, targets = (np.bincount(groups, minlength=count) for groups in (source_groups, target_groups))
    first_source, first_target = np.cumsum(sources) - sources, np.cumsum(targets) - targets
    few = sources * targets <= limits.PAIRS_TRIED_COUNT
    k, at = _spread(np.zeros(count, np.int64), np.where(few, sources * targets, 0))
    i, j = [first_source[k] + at // targets[k]], [first_target[k] + at % targets[k]]
    for group in np.flatnonzero(~few).tolist():
        there = np.arange(first_source[group], first_source[group] + sources[group])
        here = np.arange(first_target[group], first_target[group] + targets[group])
        of_source, of_target = _pairs(source.take(there), target.take(here))
        i.append(there[of_source])
        j.append(here[of_target])
    return _copies(source, target, np.concatenate(i), np.concatenate(j))


def _pairs(source: Blocks, target: Blocks) -> tuple[Ints, Ints]:
    """Pairs of blocks of one tensor that may overlap."""
    if source.ndim == 0 or len(source) * len(target) <= limits.PAIRS_TRIED_COUNT:
        return np.repeat(np.arange(len(source)), len(target)), np.tile(np.arange(len(target)), len(source))
    return _overlapping(source, target)


def _copies(source: Blocks, target: Blocks, i: Ints, j: Ints) -> Copies:
    """The copies between these pairs of blocks; pairs without elements in common are left out."""
    for k in range(source.ndim):
        # One axis at a time, so that pairs that do not overlap on it are dropped before the next axis is looked at.
        lo = np.maximum(source.offsets[i, k], target.offsets[j, k])
        hi = np.minimum(source.offsets[i, k] + source.sizes[i, k], target.offsets[j, k] + target.sizes[j, k])
        keep = hi > lo
        i, j = i[keep], j[keep]
    lo = np.maximum(source.offsets[i], target.offsets[j])
    hi = np.minimum(source.offsets[i] + source.sizes[i], target.offsets[j] + target.sizes[j])
    return Copies(
        source=i,
        target=j,
        source_starts=source.starts[i] + np.sum((lo - source.offsets[i]) * source.strides[i], axis=1, dtype=np.int64),
        target_starts=target.starts[j] + np.sum((lo - target.offsets[j]) * target.strides[j], axis=1, dtype=np.int64),
        sizes=hi - lo,
        source_strides=source.strides[i],
        target_strides=target.strides[j],
    )


def collapse(copies: Copies) -> Copies:
    """The same copies with d + 1 dimensions, of which the last is a run that is contiguous on both sides.

    Its strides are 1 on both sides, and it is as long as the copy allows (1 where neighbours lie apart on either
    side). The others follow the source's order, widest stride first; those merged away have size 1.
    """
    n, d = copies.sizes.shape
    # Dimensions of size 1 are never stepped along. They go outermost, where they cannot come between two that merge.
    reach = np.where(copies.sizes == 1, np.iinfo(np.int64).max, copies.source_strides)
    order = np.argsort(-reach, axis=1, kind="stable")
    one = np.ones((n, 1), np.int64)
    sizes, s, t = (
        np.concatenate([np.take_along_axis(column, order, axis=1), one], axis=1)
        for column in (copies.sizes, copies.source_strides, copies.target_strides)
    )
    for k in range(d):
        # Merge dimension k into k+1; since k+1 may be merged in turn, walk from the outside inward.
        joint = (s[:, k] == s[:, k + 1] * sizes[:, k + 1]) & (t[:, k] == t[:, k + 1] * sizes[:, k + 1])
        sizes[joint, k + 1] *= sizes[joint, k]
        sizes[joint, k] = 1
    return Copies(copies.source, copies.target, copies.source_starts, copies.target_starts, sizes, s, t)


def runs(copies: Copies) -> tuple[Ints, Ints, Ints, Ints]:
    """Every contiguous run of these copies: (which copy, source start, target start, length), in elements.

    A run is contiguous on both sides. Vectorised: strided copies are expanded by their outer dimensions.
    """
    c = collapse(copies)
    outer = c.sizes[:, :-1]
    which, at = _spread(np.zeros(len(c), np.int64), np.prod(outer, axis=1, dtype=np.int64))
    s, t = c.source_starts[which], c.target_starts[which]
    for k in range(outer.shape[1] - 1, -1, -1):
        at, index = np.divmod(at, outer[which, k])
        s = s + index * c.source_strides[which, k]
        t = t + index * c.target_strides[which, k]
    return which, s, t, c.sizes[which, -1]
