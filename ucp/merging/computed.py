"""A merged tensor's bytes, computed from its sources' when they are read.

To the copy engine it is a file: its elements one after the other, row-major. A read computes what it asks for in blocks
of fixed size, one source after the other, so memory is bounded whatever the tensor's size and the number of sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import flat_ranges, numel
from ucp.merging.numbers import Bytes, Numbers, as_bytes, as_numbers
from ucp.merging.operations import Combination, Copied, Whole
from ucp.storage.dtypes import itemsize
from ucp.transfer.gather import Reader, Want, gather

_BLOCK_ELEMENTS = 1 << 17
"""Elements that are computed at a time: 1 MiB as float64, which fits the processor's cache. Sums over a tensor are made
of sums of such blocks, so they are the same whoever reads it how."""


@dataclass(frozen=True)
class Input:
    """One source's tensor, and what reads it. name: of the source in the merge."""

    name: str
    tensor: LogicalTensor
    reader: Reader


@dataclass
class MergedTensor:
    """The bytes of one merged tensor (a `ucp.catalog.ByteSource`). Thread-safe.

    inputs: of every source, by its number; None for one that the operation does not read. finite: refuse NaN and
    infinity in what is read.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    dtype: str
    operation: Combination
    inputs: Sequence[Input | None]
    finite: bool = True
    _lock: Lock = field(default_factory=Lock)
    _surveyed: bool = False
    _found: Any = None

    @property
    def nbytes(self) -> int:
        return numel(self.shape) * itemsize(self.dtype)

    def read_into(self, offset: int, parts: Sequence[Bytes]) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on.

        Raises Mismatch for elements that are not finite, and what reading the sources raises.
        """
        width = itemsize(self.dtype)
        stop = offset + sum(map(len, parts))
        first, last = offset // width, -(-stop // width)
        out = _Scatter(parts, skip=offset - first * width)
        for begin in range(first, last, _BLOCK_ELEMENTS):
            out.take(self._block(begin, min(begin + _BLOCK_ELEMENTS, last)))

    def _block(self, first: int, last: int) -> Bytes:
        if isinstance(self.operation, Copied):
            source = self._input(self.operation.source)
            if source.tensor.dtype == self.dtype:
                return _read(source, first, last)
        whole = self._whole()
        found = self._survey(whole)
        parts = [self._numbers(k, first, last) for k in self.operation.sources]
        return as_bytes(self.operation.combine(whole, found, first, parts), self.dtype)

    def _whole(self) -> Whole:
        # Sources by their numbers: draws are the same wherever the checkpoints lie.
        return Whole(f"{self.name}:{self.state}", numel(self.shape), tuple(map(str, range(len(self.inputs)))))

    def _survey(self, whole: Whole) -> Any:
        with self._lock:
            if not self._surveyed:
                self._found = self.operation.survey(whole, self._stream)
                self._surveyed = True
            return self._found

    def _stream(self, sources: Sequence[int]) -> Iterator[tuple[int, list[Numbers]]]:
        total = numel(self.shape)
        for first in range(0, total, _BLOCK_ELEMENTS):
            yield first, [self._numbers(k, first, min(first + _BLOCK_ELEMENTS, total)) for k in sources]

    def _numbers(self, source: int, first: int, last: int) -> Numbers:
        given = self._input(source)
        numbers = as_numbers(_read(given, first, last), given.tensor.dtype)
        if self.finite and not np.isfinite(numbers).all():
            at = first + int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise Mismatch(
                f"'{self.name}' ({self.state}) of '{given.name}' is {numbers[at - first]:g} at element {at}; a merge "
                "of it would be, too: leave that checkpoint out, or allow it with allow_nonfinite"
            )
        return numbers

    def _input(self, source: int) -> Input:
        given = self.inputs[source]
        if given is None:
            raise ValueError(f"source {source} of '{self.name}' is read by its operation and not given")
        return given


def _read(source: Input, first: int, last: int) -> Bytes:
    """The elements ``[first, last)`` in row-major order, in the source's own element type."""
    tensor = source.tensor
    raw = np.empty((last - first) * itemsize(tensor.dtype), np.uint8)
    gather(source.reader, [Want(tensor, flat_ranges(tensor.shape, [first], [last], [0]), tensor.dtype)], [raw], 1)
    return raw


def equal(one: Input, two: Input) -> bool:
    """Whether two tensors of one shape and element type have the same bits."""
    total = numel(one.tensor.shape)
    for first in range(0, total, _BLOCK_ELEMENTS):
        last = min(first + _BLOCK_ELEMENTS, total)
        if not np.array_equal(_read(one, first, last), _read(two, first, last)):
            return False
    return True


class _Scatter:
    """Bytes that come block by block, into parts; the first ``skip`` of them are left out."""

    def __init__(self, parts: Sequence[Bytes], skip: int) -> None:
        self._parts = [part for part in parts if len(part)]
        self._skip = skip
        self._part = self._at = 0

    def take(self, raw: Bytes) -> None:
        raw, self._skip = raw[self._skip :], max(self._skip - len(raw), 0)
        while len(raw) and self._part < len(self._parts):
            room = self._parts[self._part][self._at :]
            count = min(len(room), len(raw))
            room[:count] = raw[:count]
            raw, self._at = raw[count:], self._at + count
            if count == len(room):
                self._part, self._at = self._part + 1, 0
