"""Compare with their digests all bytes that some copies use, and keep nothing of them.

A load does this before it changes anything. Each chunk that the copies touch is read once, in the order of the files,
into one small buffer of each thread that is used again and again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, UcpError
from ucp.geometry import Ints
from ucp.storage.digests import CHUNK
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.transfer.copies import Copy, CopyTable
from ucp.transfer.reader import Reader

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""A file's index -> byte ranges [first, last) of it, in order and disjoint."""

_Step = tuple[int, int, int]
"""A file's index, the first byte and how many to read at once."""


def used(copies: Iterable[Copy]) -> dict[int, list[tuple[int, int]]]:
    """The byte ranges that the copies use. Gaps of less than a chunk between the rows of a copy are counted in."""
    table = CopyTable.of(copies)
    # Most copies have no gaps, or such that are shorter all together.
    dense = table.spans - table.nbytes < CHUNK
    rows = [(copy.file, low, high) for copy in table[~dense] for low, high in _ranges_of(copy)]
    apart = np.array(rows, np.int64).reshape(-1, 3).T
    file, low, high = table.file[dense], table.at[dense], (table.at + table.spans)[dense]
    return _joined_in_files(*(np.concatenate(pair) for pair in zip((file, low, high), apart, strict=True)))


def _joined_in_files(file: Ints, low: Ints, high: Ints) -> dict[int, list[tuple[int, int]]]:
    """File -> the ranges in it, in order and disjoint."""
    kept = np.flatnonzero(high > low)
    order = kept[np.lexsort((low[kept], file[kept]))]
    out: dict[int, list[tuple[int, int]]] = {one: [] for one in sorted(set(file.tolist()))}
    file, low, high = file[order], low[order], high[order]
    begins = np.concatenate([np.ones(1, bool), file[1:] != file[:-1]])[: len(file)]
    begins[1:] |= low[1:] > high[:-1]
    # Where a range ends after those that follow it, a beginning may still lie within an earlier one: joined below.
    firsts = np.flatnonzero(begins)
    ends = np.maximum.reduceat(high, firsts) if len(firsts) else high
    for one, first, last in zip(file[firsts].tolist(), low[firsts].tolist(), ends.tolist(), strict=True):
        held = out[one]
        if held and first <= held[-1][1]:
            held[-1] = held[-1][0], max(last, held[-1][1])
        else:
            held.append((first, last))
    return out


def _ranges_of(copy: Copy) -> Iterable[tuple[int, int]]:
    span = copy.span
    # Most copies have no gaps, or such that are shorter all together.
    return _rows_of(copy) if span - copy.nbytes >= CHUNK else ((copy.at, copy.at + span),)


def _rows_of(copy: Copy) -> Iterator[tuple[int, int]]:
    axis = next((k for k, n in enumerate(copy.sizes) if n > 1), None)
    if axis is not None:
        gap = copy.steps[axis] * itemsize(copy.source_dtype) - copy.narrow(axis, 0, 1).span
        if gap >= CHUNK:
            for index in range(copy.sizes[axis]):
                yield from _ranges_of(copy.narrow(axis, index, 1))
            return
    yield copy.at, copy.at + copy.span


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1]:
            out[-1] = out[-1][0], max(high, out[-1][1])
        elif low < high:
            out.append((low, high))
    return out


def comparable(
    reader: Reader, ranges: Ranges, every: Ranges | None = None, together: bool = False
) -> dict[int, list[tuple[int, int]]]:
    """What of these ranges can be compared with digests or CRC-32s. every: with what else will be read. A record that
    is read whole by both together is compared whole. together: other ranks read the rest of records, so that parts of
    them count."""
    found = {}
    for file, held in ranges.items():
        if reader.has_digests(file) or every is None:
            found[file] = reader.comparable(file, held)
        else:
            records = [(low, high) for low, high in reader.comparable(file, every[file]) if _meets(held, low, high)]
            found[file] = _joined([*records, *held]) if together and reader.records.covers(file) else records
    return {file: held for file, held in found.items() if held}


def _meets(ranges: Sequence[tuple[int, int]], low: int, high: int) -> bool:
    """Whether one of the ranges, which are in order, has a byte of [low, high)."""
    first = bisect_right(ranges, low, key=lambda one: one[1])
    return first < len(ranges) and ranges[first][0] < high


def nbytes(ranges: Ranges) -> int:
    return sum(high - low for held in ranges.values() for low, high in held)


def compare(reader: Reader, ranges: Ranges, threads: int) -> None:
    """Read what `comparable` gave, and compare it.

    Raises what reading raises, and DigestMismatch for the first damage that a thread finds.
    """
    steps = list(_steps(reader, ranges))
    workers = min(threads, 1 + nbytes(ranges) // limits.BYTES_PER_READER)
    if workers <= 1:
        _compare(reader, [deque(steps)], steps)
        return
    shares = [steps[len(steps) * k // workers : len(steps) * (k + 1) // workers] for k in range(workers)]
    with reader.reading_ahead(shares) as orders, ThreadPoolExecutor(workers) as pool:
        if orders is not None:
            shares = [[share[k] for k in order] for share, order in zip(shares, orders, strict=True)]
        left = [deque(share) for share in shares]
        found = [pool.submit(_compare, reader, [*left[k:], *left[:k]], steps) for k in range(workers)]
        for done in found:
            done.result()


def _steps(reader: Reader, ranges: Ranges) -> Iterator[_Step]:
    """The ranges in pieces for one read each."""
    near = limits.chunks_at_once(limits.CHUNKS_COMPARED_COUNT)
    for file, held in ranges.items():
        size = CHUNK * (limits.CHUNKS_FETCHED_COUNT if reader.is_far(file) else near)
        for low, high in held:
            for at in range(low, high, size):
                yield file, at, min(size, high - at)


def _compare(reader: Reader, shares: Sequence[deque[_Step]], every: Sequence[_Step]) -> None:
    """Take steps from the first share, then from the ends of the others: no thread is done long before the others."""
    buffer = np.empty(max((size for _, _, size in every), default=0), np.uint8)
    for share in shares:
        take = share.popleft if share is shares[0] else share.pop
        while (step := _taken(take)) is not None:
            file, at, size = step
            reader.compare(file, at, buffer[:size])


def _taken(take: Callable[[], _Step]) -> _Step | None:
    try:
        return take()
    except IndexError:  # another thread was faster
        return None


@dataclass(frozen=True)
class FileMarks:
    """Sizes and times of files, to see whether one of them is changed meanwhile. marks: path -> (bytes, nanoseconds)"""

    marks: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, reader: Reader, files: Files, ranges: Ranges) -> FileMarks:
        """Those of the files that the ranges lie in. Raises DamagedCheckpoint if one is missing or too short."""
        marks = {}
        for file, held in ranges.items():
            path = reader.path(file)
            if path is None:
                continue
            size = files.size(path)
            if held and held[-1][1] > size:
                raise DamagedCheckpoint(
                    f"{path}: the file is truncated: bytes up to {held[-1][1]} are wanted, and it has {size}"
                )
            marks[path] = size, files.mtime_ns(path)
        return cls(marks)

    def check(self, files: Files) -> None:
        """Raise DamagedCheckpoint if one of the files is not what it was."""
        for path, (size, time) in self.marks.items():
            try:
                now = files.size(path), files.mtime_ns(path)
            except UcpError as error:
                raise DamagedCheckpoint(f"{error}; it was there when this load began") from error
            if now != (size, time):
                raise DamagedCheckpoint(
                    f"{path}: the file was changed while it was loaded: it had {size} bytes and has {now[0]}, or was "
                    "written again; load it once nothing writes to it"
                )
