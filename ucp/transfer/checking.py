"""Compare with their digests all bytes that some copies use, and keep nothing of them.

A load does this before it changes anything. Each chunk that the copies touch is read once, in the order of the files,
into one small buffer of each thread that is used again and again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ucp import limits
from ucp.errors import DamagedCheckpoint, UcpError
from ucp.storage.digests import CHUNK
from ucp.storage.dtypes import itemsize
from ucp.storage.files import Files
from ucp.transfer.gather import Copy
from ucp.transfer.reader import Reader

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""A file's index -> byte ranges [first, last) of it, in order and disjoint."""


def used(copies: Iterable[Copy]) -> dict[int, list[tuple[int, int]]]:
    """The byte ranges that the copies use. Gaps of less than a chunk between the rows of a copy are counted in."""
    found: dict[int, list[tuple[int, int]]] = {}
    for copy in copies:
        found.setdefault(copy.file, []).extend(_ranges_of(copy))
    return {file: _joined(ranges) for file, ranges in sorted(found.items())}


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
        _compare(reader, steps)
        return
    with ThreadPoolExecutor(workers) as pool:
        shares = [steps[len(steps) * k // workers : len(steps) * (k + 1) // workers] for k in range(workers)]
        for done in [pool.submit(_compare, reader, share) for share in shares]:
            done.result()


def _steps(reader: Reader, ranges: Ranges) -> Iterator[tuple[int, int, int]]:
    """The ranges in pieces for one read each: (file, first byte, bytes)."""
    for file, held in ranges.items():
        size = CHUNK * (limits.CHUNKS_FETCHED_COUNT if reader.is_far(file) else limits.CHUNKS_COMPARED_COUNT)
        for low, high in held:
            for at in range(low, high, size):
                yield file, at, min(size, high - at)


def _compare(reader: Reader, steps: Sequence[tuple[int, int, int]]) -> None:
    buffer = np.empty(max((size for _, _, size in steps), default=0), np.uint8)
    for file, at, size in steps:
        reader.compare(file, at, buffer[:size])


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
