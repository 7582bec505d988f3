"""The elements of a tensor as elements of another that has the same named axes in another arrangement.

Both tensors are taken apart into their named axes. On these, an element has the same index on either side. A box of one
tensor becomes boxes with a dimension for each named axis. Those dimensions change places and are put together again as
the other tensor has them. Each box keeps its place in its buffer and its strides, so fragments of a file are rearranged
without being read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ucp.geometry import Blocks, Ints, Shape, numel
from ucp.spec.evaluate import axis_size, shape_of
from ucp.spec.grammar import Axis, AxisName, Cut, Expression, Number, Padded, Product, Sum, spell, walk


@dataclass(frozen=True)
class View:
    """A tensor, or one segment of it, seen as its named axes. Cuts and padding are ignored.

    segment: which of the segments, if the expression has a sum.
    fixed: named axis -> the only index of it that is seen.
    """

    expression: Expression
    sizes: Mapping[str, int]
    segment: int
    fixed: Mapping[str, int]

    @property
    def shape(self) -> Shape:
        return shape_of(self.expression, self.sizes)

    def size(self, axis: Axis) -> int:
        """The number of indices of the axis."""
        return axis_size(self.expression, axis, self.sizes, {})

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The named axes that are seen and have more than one index, in the tensor's order.

        Raises SpecError if a name appears twice, and for a number, which has no name to match by.
        """
        out: list[str] = []
        for axis in (leaf for dim in self.expression.dims for leaf in self._leaves(dim)):
            name = spell(axis) if isinstance(axis, (AxisName, Number)) else axis.name
            if isinstance(axis, Number):
                raise self.expression.refuse(
                    axis, f"the number {name} can't be matched by name; give it one under sizes:"
                )
            if name in out:
                raise self.expression.refuse(axis, f"'{name}' stands twice, so it can't be matched by name")
            out.append(name)
        return tuple(out)

    def _leaves(self, axis: Axis) -> Iterator[AxisName | Padded | Number]:
        if isinstance(axis, Cut):
            yield from self._leaves(axis.axis)
        elif isinstance(axis, Product):
            for factor in axis.factors:
                yield from self._leaves(factor)
        elif isinstance(axis, Sum):
            yield from self._leaves(axis.segments[self.segment])
        elif self.is_leaf(axis):
            yield axis

    def is_leaf(self, axis: AxisName | Padded | Number) -> bool:
        """Whether the axis is a dimension of its own once the tensor is taken apart."""
        return self.size(axis) != 1 and (isinstance(axis, Number) or axis.name not in self.fixed)


def segments(expression: Expression) -> int:
    """How many segments the sum in the expression has; 1 if there is no sum. Raises SpecError if there are two sums."""
    sums = [a for dim in expression.dims for a in walk(dim) if isinstance(a, Sum)]
    if len(sums) > 1:
        raise expression.refuse(sums[1], "only one '( | )' can be filled from several parameters")
    return len(sums[0].segments) if sums else 1


def piece(expression: Expression, segment: int | None, fixed: Mapping[str, int]) -> Expression:
    """What is left of a tensor if one segment (None: all of them) and one index of each of the fixed axes are taken."""

    def of(axis: Axis) -> Axis | None:
        if isinstance(axis, Cut):
            inner = of(axis.axis)
            return inner if inner is None else replace(axis, axis=inner)
        if isinstance(axis, Product):
            factors = tuple(f for f in map(of, axis.factors) if f is not None)
            return replace(axis, factors=factors) if factors else None
        if isinstance(axis, Sum):
            return axis if segment is None else of(axis.segments[segment])
        return None if isinstance(axis, (AxisName, Padded)) and axis.name in fixed else axis

    return replace(expression, dims=tuple(d for d in map(of, expression.dims) if d is not None))


def carry(blocks: Blocks, source: View, target: View) -> tuple[Blocks, Ints]:
    """Boxes of the source as boxes of the target: (blocks, for each of them the block that it is a part of).

    Elements that the source's view leaves out (other segments, other indices of fixed axes) are dropped. The two views
    must have the same `leaves`, in any order.
    """
    boxes = _Boxes(blocks.offsets, blocks.sizes, blocks.strides, blocks.starts, np.arange(len(blocks), dtype=np.int64))
    for k in reversed(range(len(source.expression.dims))):
        boxes = _apart(boxes, k, source.expression.dims[k], source)
    order = [source.leaves.index(name) for name in target.leaves]
    boxes = boxes.permuted(order)
    for k, dim in enumerate(target.expression.dims):
        boxes = _together(boxes, k, dim, target)
    return (
        Blocks(boxes.offsets, boxes.sizes, boxes.starts, boxes.strides, blocks.buffers[boxes.which]),
        boxes.which,
    )


@dataclass(frozen=True)
class _Boxes:
    """Blocks while they are rearranged: the columns of `Blocks`, and for each box which block it is a part of."""

    offsets: Ints
    sizes: Ints
    strides: Ints
    starts: Ints
    which: Ints

    def take(self, index: Ints) -> _Boxes:
        return _Boxes(*(column[index] for column in vars(self).values()))

    def permuted(self, order: list[int]) -> _Boxes:
        return replace(self, offsets=self.offsets[:, order], sizes=self.sizes[:, order], strides=self.strides[:, order])

    def with_column(self, k: int, offsets: Ints, sizes: Ints, strides: Ints, starts: Ints | None = None) -> _Boxes:
        """The same boxes with another column ``k``."""

        def put(column: Ints, values: Ints) -> Ints:
            out = column.copy()
            out[:, k] = values
            return out

        return _Boxes(
            put(self.offsets, offsets),
            put(self.sizes, sizes),
            put(self.strides, strides),
            self.starts if starts is None else starts,
            self.which,
        )

    def insert(self, k: int, offset: int) -> _Boxes:
        """The boxes with a new column before column ``k``. In it every box has the one index ``offset``."""
        return replace(
            self,
            offsets=np.insert(self.offsets, k, offset, axis=1),
            sizes=np.insert(self.sizes, k, 1, axis=1),
            strides=np.insert(self.strides, k, 1, axis=1),
        )

    def delete(self, k: int) -> _Boxes:
        offsets, sizes, strides = (np.delete(c, k, axis=1) for c in (self.offsets, self.sizes, self.strides))
        return replace(self, offsets=offsets, sizes=sizes, strides=strides)

    def cropped(self, k: int, first: int, count: int) -> _Boxes:
        """The parts of the boxes in ``[first, first + count)`` of column ``k``, counted from ``first``."""
        low = np.maximum(self.offsets[:, k], first)
        size = np.minimum(self.offsets[:, k] + self.sizes[:, k], first + count) - low
        starts = self.starts + (low - self.offsets[:, k]) * self.strides[:, k]
        return self.with_column(k, low - first, size, self.strides[:, k], starts).take(np.flatnonzero(size > 0))

    def split(self, k: int, inner: int) -> _Boxes:
        """Column ``k`` as two columns, the second with ``inner`` indices.

        Each box becomes at most three: its whole rows and its two ragged ends.
        """
        first, size, step = self.offsets[:, k], self.sizes[:, k], self.strides[:, k]
        last = first + size
        up, down = -(-first // inner), last // inner
        within = up > down  # inside one row, and touching neither of its ends
        middle = np.where(within, 0, down - up)
        head = np.where(within, size, up * inner - first)
        tail = np.where(within, 0, last - down * inner)
        parts = []
        for outer, rows, inside, width in (
            (first // inner, np.ones_like(up), first % inner, head),
            (up, middle, np.zeros_like(up), np.where(middle > 0, inner, 0)),
            (down, np.ones_like(up), np.zeros_like(up), tail),
        ):
            starts = self.starts + (outer * inner + inside - first) * step
            part = self.insert(k, 0).with_column(k, outer, rows, step * inner, starts)
            parts.append(part.with_column(k + 1, inside, width, step).take(np.flatnonzero(width > 0)))
        return _Boxes(*(np.concatenate([vars(p)[name] for p in parts]) for name in vars(self)))

    def merged(self, k: int, inner: int) -> _Boxes:
        """Columns ``k`` and ``k + 1`` as one column; the second has ``inner`` indices.

        If the two don't make one dense and even run, each index of the outer one gets a box of its own.
        """
        rows, width = self.sizes[:, k], self.sizes[:, k + 1]
        even = (width == inner) & ((width == 1) | (self.strides[:, k] == self.strides[:, k + 1] * inner))
        copies = np.where((rows == 1) | even, 1, rows)
        index = np.repeat(np.arange(len(rows)), copies)
        row = np.arange(len(index)) - np.repeat(np.cumsum(copies) - copies, copies)
        out = self.take(index)
        starts = out.starts + row * out.strides[:, k]
        offsets = (out.offsets[:, k] + row) * inner + out.offsets[:, k + 1]
        sizes = np.where(copies[index] == 1, out.sizes[:, k], 1) * out.sizes[:, k + 1]
        strides = np.where(out.sizes[:, k + 1] == 1, out.strides[:, k], out.strides[:, k + 1])
        return out.with_column(k + 1, offsets, sizes, strides, starts).delete(k)


def _apart(boxes: _Boxes, k: int, axis: Axis, view: View) -> _Boxes:
    """Replace column ``k``, which is this axis, by a column for each of its leaves."""
    if isinstance(axis, Cut):
        return _apart(boxes, k, axis.axis, view)
    if isinstance(axis, Product):
        for j in range(len(axis.factors) - 1):
            boxes = boxes.split(k + j, numel([view.size(f) for f in axis.factors[j + 1 :]]))
        for j in reversed(range(len(axis.factors))):
            boxes = _apart(boxes, k + j, axis.factors[j], view)
        return boxes
    if isinstance(axis, Sum):
        segment = axis.segments[view.segment]
        return _apart(boxes.cropped(k, _before(axis, view), view.size(segment)), k, segment, view)
    if view.is_leaf(axis):
        return boxes
    return boxes.cropped(k, _index(axis, view), 1).delete(k)


def _together(boxes: _Boxes, k: int, axis: Axis, view: View) -> _Boxes:
    """Join the leaves of this axis, from column ``k`` on, into one column: the reverse of `_apart`."""
    if isinstance(axis, Cut):
        return _together(boxes, k, axis.axis, view)
    if isinstance(axis, Product):
        for j, factor in enumerate(axis.factors):
            boxes = _together(boxes, k + j, factor, view)
        for j in reversed(range(len(axis.factors) - 1)):
            boxes = boxes.merged(k + j, numel([view.size(f) for f in axis.factors[j + 1 :]]))
        return boxes
    if isinstance(axis, Sum):
        boxes = _together(boxes, k, axis.segments[view.segment], view)
        offsets = boxes.offsets[:, k] + _before(axis, view)
        return boxes.with_column(k, offsets, boxes.sizes[:, k], boxes.strides[:, k])
    if view.is_leaf(axis):
        return boxes
    return boxes.insert(k, _index(axis, view))


def _before(axis: Sum, view: View) -> int:
    return sum(view.size(s) for s in axis.segments[: view.segment])


def _index(axis: AxisName | Padded | Number, view: View) -> int:
    return 0 if isinstance(axis, Number) else view.fixed.get(axis.name, 0)
