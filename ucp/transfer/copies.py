"""Copies from a catalog's files into buffers: one of them, and many as columns.

A model has thousands of tensors and few kinds of them. What all copies of a kind have in common (sizes, steps, element
types) is kept once, and what differs is columns of numbers. So whatever is asked of all copies is asked of arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from math import prod
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ucp.geometry import Ints, span
from ucp.storage.dtypes import itemsize


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy, in elements of the source's dtype on the source side and of the target's on the other.

    The last dimension is contiguous on both sides; the others follow the file, widest step first.
    """

    file: int
    at: int  # byte offset of the first element in the file
    buffer: int
    to: int  # byte offset of the first element in the buffer
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    target_steps: tuple[int, ...]
    source_dtype: str
    target_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes read from the file, without the gaps."""
        return prod(self.sizes) * itemsize(self.source_dtype)

    @property
    def span(self) -> int:
        """Bytes of the file from the first element to the end of the last, gaps included."""
        return span(self.sizes, self.steps) * itemsize(self.source_dtype)

    @property
    def extent(self) -> int:
        """Bytes in the target from the first element to the end of the last, gaps included."""
        return span(self.sizes, self.target_steps) * itemsize(self.target_dtype)

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are one run on both sides."""
        return self.source_dtype == self.target_dtype and prod(self.sizes) == self.sizes[-1]

    def narrow(self, axis: int, first: int, count: int) -> Copy:
        """The part with ``count`` indices of one dimension, from ``first`` on."""
        return Copy(
            self.file,
            self.at + first * self.steps[axis] * itemsize(self.source_dtype),
            self.buffer,
            self.to + first * self.target_steps[axis] * itemsize(self.target_dtype),
            (*self.sizes[:axis], count, *self.sizes[axis + 1 :]),
            self.steps,
            self.target_steps,
            self.source_dtype,
            self.target_dtype,
        )


@dataclass(frozen=True, eq=False, slots=True)
class CopyTable(Sequence[Copy]):
    """Many copies as columns. kinds: copies at the beginning of file and buffer 0, for what those that are alike have
    in common. kind: (n,) which of these each is. file, at, buffer, to: (n,) as in `Copy`."""

    kinds: tuple[Copy, ...]
    kind: Ints
    file: Ints
    at: Ints
    buffer: Ints
    to: Ints

    @classmethod
    def of(cls, copies: Iterable[Copy]) -> CopyTable:
        """These copies, in their order."""
        if isinstance(copies, CopyTable):
            return copies
        kinds: dict[Copy, int] = {}
        rows = [
            (
                kinds.setdefault(
                    Copy(0, 0, 0, 0, c.sizes, c.steps, c.target_steps, c.source_dtype, c.target_dtype), len(kinds)
                ),
                c.file,
                c.at,
                c.buffer,
                c.to,
            )
            for c in copies
        ]
        return cls(tuple(kinds), *np.array(rows, np.int64).reshape(-1, 5).T)

    @classmethod
    def joined(cls, tables: Iterable[CopyTable]) -> CopyTable:
        """The copies of all tables, one after the other."""
        tables = [table for table in tables if len(table)]
        if len(tables) == 1:
            return tables[0]
        if not tables:
            return cls.of(())
        distinct = {id(table.kinds): table.kinds for table in tables}  # parts of one table share their kinds
        before = dict(zip(distinct, accumulate(map(len, distinct.values()), initial=0), strict=False))
        first = np.repeat([before[id(table.kinds)] for table in tables], [len(table) for table in tables])
        columns = ([getattr(t, name) for t in tables] for name in ("kind", "file", "at", "buffer", "to"))
        kind, *rest = map(np.concatenate, columns)
        return cls(tuple(chain.from_iterable(distinct.values())), kind + first, *rest)

    @classmethod
    def plain(cls, file: Ints, at: Ints, buffer: Ints, to: Ints, nbytes: Ints) -> CopyTable:
        """Copies of so many bytes each, whatever elements they are."""
        sizes, kind = np.unique(nbytes, return_inverse=True)
        kinds = (Copy(0, 0, 0, 0, (size,), (1,), (1,), "uint8", "uint8") for size in sizes.tolist())
        return cls(tuple(kinds), kind, file, at, buffer, to)

    def __len__(self) -> int:
        return len(self.kind)

    @overload
    def __getitem__(self, index: int) -> Copy: ...
    @overload
    def __getitem__(self, index: slice | Ints | NDArray[np.bool_]) -> CopyTable: ...
    def __getitem__(self, index: int | slice | Ints | NDArray[np.bool_]) -> Copy | CopyTable:
        columns = (column[index] for column in (self.kind, self.file, self.at, self.buffer, self.to))
        if not isinstance(index, int):
            return CopyTable(self.kinds, *columns)
        kind, *place = (int(value) for value in columns)
        return self._copy(kind, *place)

    def __iter__(self) -> Iterator[Copy]:
        columns = (self.kind, self.file, self.at, self.buffer, self.to)
        return map(self._copy, *(column.tolist() for column in columns))

    def _copy(self, kind: int, file: int, at: int, buffer: int, to: int) -> Copy:
        c = self.kinds[kind]
        return Copy(file, at, buffer, to, c.sizes, c.steps, c.target_steps, c.source_dtype, c.target_dtype)

    @property
    def nbytes(self) -> Ints:
        """(n,) bytes that each reads."""
        return np.array([c.nbytes for c in self.kinds], np.int64)[self.kind]

    @property
    def elements(self) -> Ints:
        """(n,) elements that each reads."""
        return np.array([prod(c.sizes) for c in self.kinds], np.int64)[self.kind]

    @property
    def spans(self) -> Ints:
        """(n,) bytes of the file from each one's first element to the end of its last, gaps included."""
        return np.array([c.span for c in self.kinds], np.int64)[self.kind]

    @property
    def extents(self) -> Ints:
        """(n,) bytes in the target from each one's first element to the end of its last, gaps included."""
        return np.array([c.extent for c in self.kinds], np.int64)[self.kind]

    @property
    def target_nbytes(self) -> Ints:
        """(n,) bytes that each fills, without the gaps."""
        return np.array([prod(c.sizes) * itemsize(c.target_dtype) for c in self.kinds], np.int64)[self.kind]

    @property
    def is_plain(self) -> NDArray[np.bool_]:
        """(n,) whether each one's bytes are one run on both sides."""
        return np.array([c.is_plain for c in self.kinds], bool)[self.kind]

    def in_order(self) -> CopyTable:
        """The same, by file and offset."""
        return self[np.lexsort((self.at, self.file))]

    def into(self, buffer: Ints, to: Ints) -> CopyTable:
        """The same into other places: (n,) numbers of buffers, and bytes from their beginnings."""
        return CopyTable(self.kinds, self.kind, self.file, self.at, buffer, to)
