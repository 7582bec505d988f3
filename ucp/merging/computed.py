"""A merged tensor's bytes, computed from its sources' when they are read.

To the copy engine the tensor is a file: its elements one after the other, row-major. A read computes what it asks for
in blocks of fixed size, one source after the other. So memory is bounded for any size of tensor and number of sources.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock, local
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ucp import limits
from ucp.catalog import LogicalTensor
from ucp.errors import Mismatch
from ucp.geometry import dense_strides, flat_ranges, numel
from ucp.merging.operations import Combination, Whole
from ucp.storage.digests import CHUNK
from ucp.storage.dtypes import itemsize
from ucp.storage.numbers import Bytes, Numbers, are_finite, as_numbers, round_into, rounding
from ucp.transfer.gather import Want, gather
from ucp.transfer.reader import Cache, Reader

_BLOCK_ELEMENTS = 1 << 15
"""Elements that are computed at a time: 256 KiB as float64. So what several operations need at once stays in the
processor's cache, and is memory that the allocator keeps: larger arrays are new pages each time. Sums over a tensor are
made of sums of such blocks, so they are the same whoever reads it how."""


_READ_ELEMENTS = 524288
_LEAST_ELEMENTS = 1 << 18
"""Elements that are read at a time of all sources together, and of each at least: long enough that planning a read and
the chunks at its ends do not show."""


@dataclass(frozen=True)
class Input:
    """One source's tensor, and what reads it. name: the source's name in the merge."""

    name: str
    tensor: LogicalTensor
    reader: Reader

    @cached_property
    def lies_whole(self) -> bool:
        """Whether all elements lie in one place, in row-major order."""
        blocks, sizes = self.tensor.blocks, np.array([self.tensor.shape], np.int64)
        return (
            len(blocks) == 1
            and np.array_equal(blocks.sizes, sizes)
            and bool(np.all((blocks.strides == dense_strides(sizes)) | (sizes == 1)))
        )

    def to_chunk(self, first: int, most: int) -> int:
        """How many elements from ``first`` on end where a chunk of the file does: at most so many, and as many where
        none do. Pieces that begin there are read whole, straight to where they are wanted."""
        if not self.lies_whole or not len(self.tensor.blocks):
            return most
        width = itemsize(self.tensor.dtype)
        at = int(self.tensor.bases[0]) + (int(self.tensor.blocks.starts[0]) + first) * width
        past = at % CHUNK
        return most - past // width if past % width == 0 and past < most * width else most


@dataclass
class MergedTensor:
    """The bytes of one merged tensor (a `ucp.catalog.ByteSource`). Thread-safe.

    inputs: one for every source, by its number; None for a source that the operation does not read. finite: refuse NaN
    and infinity in what is read and in what comes of it.
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
        whole = self._whole()
        found = self._survey(whole)
        operation = self.operation
        given = [self._input(k) for k in operation.sources]
        looked_at = self.finite and not operation.spreads
        for begin, end, raw in _pieces(given, first, last, by_chunks=True):
            made = out.room((end - begin) * width)
            with rounding():
                for at, numbers in self._blocks(given, raw, begin, end, looked_at):
                    values = operation.combine(whole, found, at, numbers)
                    block = made[(at - begin) * width : (at - begin + len(values)) * width]
                    round_into(values, self.dtype, block)
                    if self.finite and not are_finite(block, self.dtype):
                        self._refuse(at, at + len(values), block)
            out.put(made)

    def _refuse(self, first: int, last: int, made: Bytes) -> None:
        """Raise Mismatch for the first of these elements that is not finite in a source, or else in the result, whose
        bytes are given."""
        for _ in self._stream(self.operation.sources, first, last, by_chunks=False, looked_at=True):
            pass
        numbers = as_numbers(made, self.dtype)
        at = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise Mismatch(
            f"'{self.name}' ({self.state}) would be {numbers[at]:g} at element {first + at}, beyond what {self.dtype} "
            "holds, though all sources are finite there: take a wider type (dtype) or other weights, or allow it with "
            "allow_nonfinite"
        )

    def _whole(self) -> Whole:
        # Sources are named by their numbers, so that draws are the same wherever the checkpoints lie.
        return Whole(f"{self.name}:{self.state}", numel(self.shape), tuple(map(str, range(len(self.inputs)))))

    def _survey(self, whole: Whole) -> Any:
        with self._lock:
            if not self._surveyed:
                self._found = self.operation.survey(whole, self._all)
                self._surveyed = True
            return self._found

    def _all(self, sources: Sequence[int]) -> Iterator[tuple[int, list[Numbers]]]:
        # In blocks that hang on no file's chunks, since sums are made of the sums of blocks.
        return self._stream(sources, 0, numel(self.shape), by_chunks=False, looked_at=self.finite)

    def _stream(
        self, sources: Sequence[int], first: int, last: int, by_chunks: bool, looked_at: bool
    ) -> Iterator[tuple[int, list[Numbers]]]:
        """The elements ``[first, last)`` of these sources, block by block. Reads are longer than a block. The numbers
        are valid until the next block, and may be overwritten. by_chunks: as for `_pieces`. looked_at: raise Mismatch
        for NaN and infinity."""
        given = [self._input(k) for k in sources]
        for begin, end, raw in _pieces(given, first, last, by_chunks):
            yield from self._blocks(given, raw, begin, end, looked_at)

    def _blocks(
        self, given: Sequence[Input], raw: Sequence[Bytes], begin: int, end: int, looked_at: bool
    ) -> Iterator[tuple[int, list[Numbers]]]:
        """As `_stream`, of one piece, whose bytes are given."""
        widths = [itemsize(each.tensor.dtype) for each in given]
        rooms = [_spare.blocks.pop() if _spare.blocks else np.empty(_BLOCK_ELEMENTS) for _ in given]
        try:
            for at in range(begin, end, _BLOCK_ELEMENTS):
                stop = min(at + _BLOCK_ELEMENTS, end)
                numbers = []
                for each, width, bytes_, room in zip(given, widths, raw, rooms, strict=True):
                    part = bytes_[(at - begin) * width : (stop - begin) * width]
                    numbers.append(as_numbers(part, each.tensor.dtype, room[: stop - at]))
                    if looked_at:
                        self._check(each, numbers[-1], at)
                yield at, numbers
        finally:
            _spare.blocks += rooms

    def _check(self, given: Input, numbers: Numbers, first: int) -> None:
        """Raise Mismatch unless a source's elements from ``first`` on are finite."""
        # A finite sum shows that all are finite; where it is too large, each one is looked at. No product of vectors:
        # for one this long BLAS starts threads, which spin, and wait for each other where others work.
        if not math.isfinite(np.add.reduce(numbers)) and not np.isfinite(numbers).all():
            at = first + int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise Mismatch(
                f"'{self.name}' ({self.state}) of '{given.name}' is {numbers[at - first]:g} at element {at}; a merge "
                "of it would be, too: leave that checkpoint out, or allow it with allow_nonfinite"
            )

    def _input(self, source: int) -> Input:
        given = self.inputs[source]
        if given is None:
            raise ValueError(f"source {source} of '{self.name}' is read by its operation and not given")
        return given


class _Spare(local):
    """A thread's memory for reading pieces, and for blocks of numbers. It is kept for the next tensor, since new pages
    cost as much as reading.

    chunks: verified chunks of a reader, for what is read next of the same file: mostly the rest of the last one."""

    def __init__(self) -> None:
        self.free: list[Bytes] = []
        self.blocks: list[Numbers] = []
        self.chunks: WeakKeyDictionary[Reader, list[Cache]] = WeakKeyDictionary()


_spare = _Spare()


def _pieces(given: Sequence[Input], first: int, last: int, by_chunks: bool) -> Iterator[tuple[int, int, list[Bytes]]]:
    """The elements ``[first, last)`` of these tensors in row-major order, piece by piece, each in its own element type:
    (a piece's first element, the one after its last, bytes of each tensor). The bytes are valid until the next piece.
    Verified chunks that two pieces share are kept from one to the next. by_chunks: pieces end where chunks of the first
    source's file do, and so of all files that are laid out alike."""
    piece = _piece_elements(len(given))
    rooms = [_Room(each, piece) for each in given]
    begin = first
    end = min(first + (given[0].to_chunk(first, piece) if by_chunks else piece), last)
    try:
        while begin < last:
            yield begin, end, [room.read(begin, end) for room in rooms]
            begin, end = end, min(end + piece, last)
    finally:
        for room in reversed(rooms):
            room.leave()


class _Room:
    """A thread's memory for the pieces of one tensor, at most so many elements each."""

    def __init__(self, given: Input, elements: int) -> None:
        self._given = given
        self._width = itemsize(given.tensor.dtype)
        self._nbytes = elements * self._width
        self._raw: Bytes | None = None
        kept = _spare.chunks.get(given.reader)
        self._chunks: Cache = kept.pop() if kept else OrderedDict()

    def read(self, first: int, last: int) -> Bytes:
        """The bytes of the elements ``[first, last)``, valid until the next call."""
        given, tensor, nbytes = self._given, self._given.tensor, (last - first) * self._width
        if given.lies_whole:  # needs no planning, which would take as long as the arithmetic
            file = int(tensor.blocks.buffers[0])
            at = int(tensor.bases[0]) + (int(tensor.blocks.starts[0]) + first) * self._width
            seen = given.reader.within_chunk(file, at, nbytes, self._chunks)
            if seen is not None:
                return seen
            given.reader.read_into(file, at, [self._held(nbytes)], self._chunks)
        else:
            want = Want(tensor, flat_ranges(tensor.shape, [first], [last], [0]), tensor.dtype)
            gather(given.reader, [want], [self._held(nbytes)], 1, self._chunks)
        return self._held(nbytes)

    def _held(self, nbytes: int) -> Bytes:
        if self._raw is None:
            self._raw = _memory(self._nbytes)
        return self._raw[:nbytes]

    def leave(self) -> None:
        """Leave the memory to the next tensor."""
        if self._raw is not None:
            _spare.free.append(self._raw)
        _spare.chunks.setdefault(self._given.reader, []).append(self._chunks)


def _memory(nbytes: int) -> Bytes:
    """Spare memory of at least this many bytes."""
    fitting = [k for k, raw in enumerate(_spare.free) if len(raw) >= nbytes]
    if fitting:
        return _spare.free.pop(fitting[0])
    if _spare.free:
        _spare.free.pop()  # too short, so it is replaced
    return np.empty(nbytes, np.uint8)


def scratch_bytes(sources: int) -> int:
    """About how many bytes a thread needs for this many sources, besides the windows that it fills: a piece of each
    source, and the verified chunks at the ends of the piece."""
    return (
        sources * (4 * _piece_elements(sources) + limits.CHUNKS_KEPT_COUNT * CHUNK)
        + 8 * (sources + 6) * _BLOCK_ELEMENTS
    )


def _piece_elements(sources: int) -> int:
    """How many elements are read at a time from each of this many sources."""
    return max(_READ_ELEMENTS // max(sources, 1), _LEAST_ELEMENTS)


def equal(one: Input, two: Input) -> bool:
    """Whether two tensors of one shape and element type have the same bits."""
    pieces = _pieces([one, two], 0, numel(one.tensor.shape), by_chunks=True)
    return all(np.array_equal(here, there) for _, _, (here, there) in pieces)


class _Scatter:
    """Bytes that come piece by piece go into parts. The first ``skip`` bytes are left out."""

    def __init__(self, parts: Sequence[Bytes], skip: int) -> None:
        self._parts = [part for part in parts if len(part)]
        self._skip = skip
        self._part = self._at = 0

    def room(self, nbytes: int) -> Bytes:
        """Where the next piece may be made: its place, or memory to `put` it from."""
        if not self._skip and self._part < len(self._parts) and len(self._parts[self._part]) - self._at >= nbytes:
            return self._parts[self._part][self._at : self._at + nbytes]
        return np.empty(nbytes, np.uint8)

    def put(self, made: Bytes) -> None:
        """The next piece is made, in what `room` has returned."""
        raw, self._skip = made[self._skip :], max(self._skip - len(made), 0)
        while len(raw) and self._part < len(self._parts):
            room = self._parts[self._part][self._at :]
            count = min(len(room), len(raw))
            if not np.shares_memory(room[:1], raw[:1]):
                room[:count] = raw[:count]
            raw = raw[count:]
            self._at += count
            if self._at == len(self._parts[self._part]):
                self._part, self._at = self._part + 1, 0
