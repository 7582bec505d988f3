"""What an expression means: which part of a tensor the shard at one mesh coordinate holds, and in which order.

For a coordinate, an axis denotes a list of intervals of the whole axis, in the order in which the shard holds them:

- a bare axis: ``[0, n)``, or the rank's part of it if it is cut;
- a product: the intervals of the outer factor, each index of them filled with the intervals of the inner one;
- a sum: the intervals of its segments, shifted.

A shard is the product of its dimensions' intervals, row-major.

Sizes, widths and intervals count indices of an axis; shapes and blocks count elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np

from ucp.geometry import Blocks, Ints, Shape, empty, numel, row_major, whole
from ucp.spec.grammar import Axis, AxisName, Cut, Expression, Number, Padded, Product, Sum, cuts, spell
from ucp.spec.positions import suggestion

RULES = ("exact", "balanced", "ceil")

Mesh = Mapping[str, int]
Widths = Mapping[str, tuple[int, ...]]
Intervals = tuple[Ints, Ints]  # first indices and lengths, in the shard's order


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a tensor.

    shape: of its row-major buffer, padding included.
    logical: the shape of the tensor that ``blocks`` refers to.
    blocks: the boxes of the logical tensor and where they lie in the buffer. What no block covers is padding.
    """

    shape: Shape
    logical: Shape
    blocks: Blocks


@dataclass(frozen=True)
class Cutting:
    """How the cuts of a tensor lie on a mesh, and how wide its padded axes are.

    mesh: mesh dimension -> ranks. A dimension that is not named has 1.
    rule: how axes are cut that have no widths: 'exact' (equal parts, as Megatron), 'balanced' (the first n mod m parts
    get one more, as DeepSpeed's AutoTP) or 'ceil' (parts of ceil(n / m) until nothing is left, as DTensor and ZeRO-3).
    widths: spelling of a cut (``kv_heads/tp``) -> one width for each rank of its mesh dimensions, the first outermost.
    They add up to the axis, or each is as wide as the axis: then every rank holds a copy.
    padded: name of a padded axis -> its width with the padding. An axis that is not named has no padding.
    """

    mesh: Mesh = field(default_factory=dict)
    rule: str = "exact"
    widths: Widths = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)

    def ranks(self, over: tuple[str, ...]) -> tuple[int, ...]:
        """The number of ranks of each of these mesh dimensions."""
        return tuple(self.mesh.get(m, 1) for m in over)


def axis_size(expression: Expression, axis: Axis, sizes: Mapping[str, int], padded: Mapping[str, int]) -> int:
    """How many indices the axis has. Raises SpecError for a name without a size."""
    if isinstance(axis, Number):
        return axis.value
    if isinstance(axis, (AxisName, Padded)):
        if axis.name not in sizes:
            raise expression.refuse(axis, f"no size is known for '{axis.name}'{suggestion(axis.name, sizes)}")
        true = sizes[axis.name]
        if isinstance(axis, AxisName) or axis.name not in padded:
            return true
        if padded[axis.name] < true:
            raise expression.refuse(axis, f"'{axis.name}' is {true}; padding can't make it {padded[axis.name]}")
        return padded[axis.name]
    if isinstance(axis, Product):
        return numel([axis_size(expression, f, sizes, padded) for f in axis.factors])
    if isinstance(axis, Sum):
        return sum(axis_size(expression, s, sizes, padded) for s in axis.segments)
    return axis_size(expression, axis.axis, sizes, padded)


def shape_of(expression: Expression, sizes: Mapping[str, int], padded: Mapping[str, int] | None = None) -> Shape:
    """The whole tensor's shape: without padding, unless ``padded`` gives widths with it."""
    return tuple(axis_size(expression, dim, sizes, padded or {}) for dim in expression.dims)


def parts(expression: Expression, cut: Cut, n: int, cutting: Cutting) -> list[tuple[int, int]]:
    """Every rank's part ``[first, last)`` of an axis of n indices. Ranks are row-major over the cut's mesh dimensions.

    Raises SpecError if the rule can't cut the axis, or if the widths do not fit it.
    """
    ranks = cutting.ranks(cut.over)
    m = numel(ranks)
    given = cutting.widths.get(spell(cut))
    if given is not None:
        return _given(expression, cut, n, m, given)
    if cut.repeat and m > n:
        if n == 0 or m % n:
            raise expression.refuse(cut, f"'{spell(cut)}' puts {n} on {m} ranks; for copies, {m} must be a multiple")
        return [(r * n // m, r * n // m + 1) for r in range(m)]
    out = [(0, n)]
    for name, count in zip(cut.over, ranks, strict=True):
        if cutting.rule == "exact" and any((last - first) % count for first, last in out):
            raise expression.refuse(
                cut,
                f"'{spell(cut)}' cuts {out[0][1] - out[0][0]} in equal parts for {count} ranks of {name}, which "
                "don't divide it; the rule 'balanced' or 'ceil', or the widths of an uneven cut, must be given",
            )
        out = [p for first, last in out for p in _even(first, last, count, cutting.rule)]
    return out


def _given(expression: Expression, cut: Cut, n: int, m: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    if len(widths) != m:
        raise expression.refuse(cut, f"'{spell(cut)}' has {len(widths)} widths for {m} ranks")
    if sum(widths) == n and min(widths, default=0) >= 0:
        ends = np.cumsum(widths, dtype=np.int64).tolist()
        return [(end - width, end) for end, width in zip(ends, widths, strict=True)]
    if all(width == n for width in widths):
        return [(0, n)] * m
    if cut.repeat and n and m % n == 0 and all(width == 1 for width in widths):
        return [(r * n // m, r * n // m + 1) for r in range(m)]
    raise expression.refuse(
        cut,
        f"'{spell(cut)}' has widths {list(widths)}; they must add up to {n}, or each be {n} for copies",
    )


def _even(first: int, last: int, m: int, rule: str) -> list[tuple[int, int]]:
    n = last - first
    if rule == "ceil":
        width = -(-n // m)
        return [(first + min(r * width, n), first + min((r + 1) * width, n)) for r in range(m)]
    if rule not in RULES:
        raise ValueError(f"unknown rule '{rule}' of cutting; use {', '.join(RULES)}")
    base, more = divmod(n, m)
    starts = [first + r * base + min(r, more) for r in range(m + 1)]
    return list(pairwise(starts))


def position(cut: Cut, mesh: Mesh, coordinate: Mapping[str, int]) -> int:
    """Which of the cut's parts the rank at this coordinate has."""
    at = 0
    for m in cut.over:
        count, here = mesh.get(m, 1), coordinate.get(m, 0)
        if not 0 <= here < count:
            raise ValueError(f"coordinate {m}={here} is outside of the mesh, which has {count} ranks there")
        at = at * count + here
    return at


def intervals(
    expression: Expression, axis: Axis, sizes: Mapping[str, int], cutting: Cutting, coordinate: Mapping[str, int]
) -> Intervals:
    """The intervals of the whole axis that the shard at this coordinate holds, in its order, with neighbours joined."""

    def of(a: Axis) -> tuple[int, Intervals]:
        if isinstance(a, Product):
            n, held = of(a.factors[0])
            for factor in a.factors[1:]:
                inner_n, inner = of(factor)
                n, held = n * inner_n, _filled(held, inner_n, inner)
            return n, held
        if isinstance(a, Sum):
            segments = [of(s) for s in a.segments]
            at, firsts, lengths = 0, [], []
            for n, (first, length) in segments:
                firsts.append(first + at)
                lengths.append(length)
                at += n
            return at, _joined(np.concatenate(firsts), np.concatenate(lengths))
        n = axis_size(expression, a, sizes, cutting.padded)
        lo, hi = 0, n
        if isinstance(a, Cut):
            lo, hi = parts(expression, a, n, cutting)[position(a, cutting.mesh, coordinate)]
        return n, _joined(np.array([lo], np.int64), np.array([hi - lo], np.int64))

    return of(axis)[1]


def _filled(outer: Intervals, size: int, inner: Intervals) -> Intervals:
    """The intervals of a product: every index of the outer ones filled with the inner ones."""
    if len(inner[0]) == 1 and inner[1][0] == size:
        return outer[0] * size, outer[1] * size
    index = np.repeat(outer[0] - (np.cumsum(outer[1]) - outer[1]), outer[1]) + np.arange(int(outer[1].sum()))
    firsts = (index[:, None] * size + inner[0][None, :]).ravel()
    return _joined(firsts, np.tile(inner[1], len(index)))


def _joined(firsts: Ints, lengths: Ints) -> Intervals:
    keep = lengths > 0
    firsts, lengths = firsts[keep], lengths[keep]
    if len(firsts) < 2:
        return firsts, lengths
    begins = np.concatenate([[True], firsts[1:] != firsts[:-1] + lengths[:-1]])
    return firsts[begins], np.add.reduceat(lengths, np.flatnonzero(begins))


def shard(
    expression: Expression,
    sizes: Mapping[str, int],
    cutting: Cutting,
    coordinate: Mapping[str, int],
    keep_padding: bool = False,
) -> Shard:
    """What the rank at this coordinate holds of a tensor of this expression.

    keep_padding: let the logical tensor have the padding, too, for a target of the same width.

    Raises SpecError for a name without a size and for an impossible cut, and ValueError for a coordinate outside of the
    mesh.
    """
    logical = shape_of(expression, sizes, cutting.padded if keep_padding else None)
    columns = []
    shape = []
    for n, dim in zip(logical, expression.dims, strict=True):
        firsts, lengths = intervals(expression, dim, sizes, cutting, coordinate)
        places = np.cumsum(lengths) - lengths
        shape.append(int(lengths.sum()))
        clipped = np.minimum(firsts + lengths, n) - firsts
        keep = clipped > 0
        columns.append((firsts[keep], clipped[keep], places[keep]))
    return Shard(tuple(shape), logical, _boxes(columns, tuple(shape)))


def _boxes(columns: list[tuple[Ints, Ints, Ints]], shape: Shape) -> Blocks:
    """The boxes made of one interval for each dimension. columns: (first, length, place in the shard) per dimension."""
    d = len(columns)
    if d == 0:
        return whole(())
    index = np.stack(np.meshgrid(*(np.arange(len(c[0])) for c in columns), indexing="ij"), axis=-1).reshape(-1, d)
    if not len(index):
        return empty(d)
    strides = np.array(row_major(shape), np.int64)
    offsets, sizes, places = (np.stack([columns[k][part][index[:, k]] for k in range(d)], axis=1) for part in range(3))
    return Blocks(
        offsets,
        sizes,
        (places * strides).sum(axis=1, dtype=np.int64),
        np.tile(strides, (len(index), 1)),
        np.zeros(len(index), np.int64),
    )


def coordinates(expression: Expression, mesh: Mesh) -> list[dict[str, int]]:
    """One coordinate for every shard that can differ, over the mesh dimensions that the expression mentions."""
    over = {m for cut in cuts(expression) for m in cut.over}
    names = sorted(over if expression.average is None else over | {expression.average})
    return [dict(zip(names, at, strict=True)) for at in product(*(range(mesh.get(m, 1)) for m in names))]
