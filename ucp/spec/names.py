"""Names and tensors of another framework, made of this spec's parameters: a re-arrangement by named axes.

Both sides count the same axes by name, so an element of the one is found in the other by its index on every named axis;
another order of the same names is a transposition. Sources fill the segments of ``as`` in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from ucp.geometry import Blocks, Shape, concat, empty, numel, row_major
from ucp.spec.axes import Axis, Cut, Expression, Name, Number, Padded, Product, Sum, spell, walk
from ucp.spec.bound import Bound
from ucp.spec.language import Renaming
from ucp.spec.meaning import axis_size, shape_of


@dataclass(frozen=True)
class Leaf:
    """A named axis in a dimension: neighbours on it are ``stride`` indices apart there."""

    name: str
    size: int
    stride: int
    axis: Axis


@dataclass(frozen=True)
class Lay:
    """How a tensor, or one segment of it, lies: for each dimension its first index and its named axes."""

    shape: Shape
    dims: tuple[tuple[int, tuple[Leaf, ...]], ...]


@dataclass(frozen=True)
class Part:
    """What one source gives to a tensor.

    into: boxes of the tensor, and where their elements lie in the source's row-major buffer.
    back: boxes of the source, and where their elements lie in the tensor's row-major buffer.
    """

    source: str
    into: Blocks
    back: Blocks


@dataclass(frozen=True)
class Assembled:
    """A parameter of another framework: its shape, and the parts that make it."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def assemble(bound: Bound, framework: str, name: str) -> Assembled | None:
    """How a parameter of another framework is made of this spec's parameters; None where nothing is said of it.

    Raises SpecError where the axes of the two sides don't match by name, or two lines are equally specific.
    """
    matches = [(r, c) for r in bound.spec.names.get(framework, ()) if (c := r.pattern.match(name)) is not None]
    if not matches:
        return None
    best = max(r.pattern.rank for r, _ in matches)
    (renaming, captures), *others = [(r, c) for r, c in matches if r.pattern.rank == best]
    if others:
        raise others[0][0].pattern.refuse(f"'{name}' matches '{renaming.pattern}' as well, equally specific")
    return _assembled(bound, renaming, captures, name)


def _assembled(bound: Bound, renaming: Renaming, captures: Mapping[str, int], name: str) -> Assembled:
    given: list[tuple[str, Expression, dict[str, int]]] = []
    for index in product(*(range(_size(bound, renaming, axis)) for axis in renaming.stack.values())):
        stacked = dict(zip(renaming.stack, index, strict=True))
        for template in renaming.sources:
            source = template.fill({**captures, **stacked})
            found = bound.find(source) if source is not None else None
            if source is None or found is None:
                raise template.source.refuse(
                    (0, len(template.source.text)), f"'{name}' is made of '{source}', which no line names"
                )
            fixed = {renaming.stack[c]: n for c, n in stacked.items()}
            given.append((source, found.expression, fixed))
    target = renaming.expression or given[0][1]
    kinds = len(renaming.sources)
    shape = shape_of(target, bound.sizes)
    segments = _segments(target)
    parts: list[Part] = []
    for k, (source, expression, fixed) in enumerate(given):
        own = _segments(expression)
        if kinds * own != segments:
            raise target.source.refuse(
                (0, len(target.source.text)),
                f"'{target}' has {segments} segments, and its sources {kinds * own}; each source fills one",
            )
        into, back = [], []
        for j in range(own):
            there = lay(target, bound.sizes, (k % kinds) * own + j, fixed)
            here = lay(expression, bound.sizes, j, {})
            _matching(target, there, here, source)
            into.append(_blocks(there, here))
            back.append(_blocks(here, there))
        parts.append(Part(source, concat(into, len(shape)), concat(back, len(expression.dims))))
    return Assembled(name, shape, tuple(parts))


def _size(bound: Bound, renaming: Renaming, axis: str) -> int:
    if axis in bound.absent:
        raise renaming.pattern.refuse(f"stack: '{axis}' has no size")
    return bound.sizes[axis]


def _segments(expression: Expression) -> int:
    """How many segments the one sum in it has; 1 without a sum."""
    sums = [a for dim in expression.dims for a in walk(dim) if isinstance(a, Sum)]
    if len(sums) > 1:
        raise expression.refuse(sums[1], "only one '( | )' can be filled from several parameters")
    return len(sums[0].segments) if sums else 1


def lay(expression: Expression, sizes: Mapping[str, int], segment: int, fixed: Mapping[str, int]) -> Lay:
    """How one segment of a tensor lies in it, cuts and padding left aside. fixed: named axis -> its only index."""

    def of(axis: Axis, stride: int) -> tuple[int, list[Leaf]]:
        if isinstance(axis, Cut):
            return of(axis.axis, stride)
        if isinstance(axis, Product):
            begin = 0
            out: list[Leaf] = []
            for factor in reversed(axis.factors):
                first, leaves = of(factor, stride)
                begin, out = begin + first, leaves + out
                stride *= axis_size(expression, factor, sizes, {})
            return begin, out
        if isinstance(axis, Sum):
            before = sum(axis_size(expression, s, sizes, {}) for s in axis.segments[:segment])
            first, leaves = of(axis.segments[segment], stride)
            return first + before * stride, leaves
        n = axis_size(expression, axis, sizes, {})
        if isinstance(axis, (Name, Padded)) and axis.name in fixed:
            return fixed[axis.name] * stride, []
        if isinstance(axis, Number):
            if axis.value > 1:
                raise expression.refuse(
                    axis, f"the number {axis.value} can't be matched by name; give it one under sizes:"
                )
            return 0, []
        return 0, [Leaf(spell(axis) if isinstance(axis, Name) else axis.name, n, stride, axis)] if n != 1 else []

    dims = []
    seen: set[str] = set()
    for dim in expression.dims:
        begin, leaves = of(dim, 1)
        for leaf in leaves:
            if leaf.name in seen:
                raise expression.refuse(leaf.axis, f"'{leaf.name}' stands twice, so it can't be matched by name")
            seen.add(leaf.name)
        dims.append((begin, tuple(leaves)))
    return Lay(shape_of(expression, sizes), tuple(dims))


def _matching(target: Expression, there: Lay, here: Lay, source: str) -> None:
    a = {leaf.name for _, leaves in there.dims for leaf in leaves}
    b = {leaf.name for _, leaves in here.dims for leaf in leaves}
    if a != b:
        only = ", ".join(sorted(a - b)) or "none"
        theirs = ", ".join(sorted(b - a)) or "none"
        raise target.source.refuse(
            (0, len(target.source.text)),
            f"the axes of '{source}' don't match by name: only here {only}, only there {theirs}",
        )


def _blocks(boxes: Lay, flat: Lay) -> Blocks:
    """Boxes of the one tensor, and where their elements lie in the other's row-major buffer."""
    strides = row_major(flat.shape)
    places: dict[str, int] = {}
    start = 0
    for (begin, leaves), stride in zip(flat.dims, strides, strict=True):
        start += begin * stride
        places |= {leaf.name: leaf.stride * stride for leaf in leaves}
    d = len(boxes.shape)
    # For each dimension: (first index, place) of every run, and the length and stride that all of its runs have.
    columns, lengths, steps = [], [], []
    for begin, leaves in boxes.dims:
        outer, length, step = _run(leaves, places)
        index = np.array([[begin, 0]], np.int64)
        for leaf in outer:
            along = np.arange(leaf.size)[:, None] * np.array([leaf.stride, places[leaf.name]], np.int64)
            index = (index[:, None, :] + along[None, :, :]).reshape(-1, 2)
        columns.append(index)
        lengths.append(length)
        steps.append(step)
    n = numel([len(c) for c in columns])
    if n == 0 or numel(lengths) == 0:
        return empty(d)
    grid = np.stack(np.meshgrid(*(np.arange(len(c)) for c in columns), indexing="ij"), axis=-1).reshape(n, d)
    offsets = np.stack([columns[k][grid[:, k], 0] for k in range(d)], axis=1) if d else np.zeros((1, 0), np.int64)
    starts = start + sum((columns[k][grid[:, k], 1] for k in range(d)), np.zeros(n, np.int64))
    tile = np.ones((n, 1), np.int64)
    return Blocks(
        offsets, tile * np.array(lengths, np.int64), starts, tile * np.array(steps, np.int64), np.zeros(n, np.int64)
    )


def _run(leaves: tuple[Leaf, ...], places: Mapping[str, int]) -> tuple[tuple[Leaf, ...], int, int]:
    """The longest run of neighbours that lie evenly in the other tensor: (leaves around it, its length, its stride)."""
    if not leaves or leaves[-1].stride != 1:
        return leaves, 1, 1
    k = len(leaves) - 1
    length, step = leaves[k].size, places[leaves[k].name]
    while k and leaves[k - 1].stride == length and places[leaves[k - 1].name] == step * length:
        k -= 1
        length *= leaves[k].size
    return leaves[:k], length, step
