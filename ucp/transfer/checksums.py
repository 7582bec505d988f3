"""The CRC-32s of a source's records, compared while their bytes are read, in whatever pieces and order.

A record of a torch file (a tensor's storage) has one CRC-32 for all its bytes. Several threads read parts of it at
once. Each part's CRC is computed where it is read, once for every byte. The parts of a record are combined when they
cover it, so a record that is read whole is compared at once. What is missing of other records is read later. In a
conversion, which must not pass on damage as valid, `finish` reads all of it. In a load, `settle` reads it if it is
little (padding that nobody wants), and ranks tell one another what they have read (`compare_together`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.errors import DigestMismatch
from ucp.storage.crc32 import StoredCrc32, combine, combine_all, crc32
from ucp.storage.files import Files

RecordPiece = tuple[int, int, int, int]
"""A part of a record that was read: the file's index, the first byte, the number of bytes, their CRC-32."""


@dataclass
class _Progress:
    """What has been read of one record.

    starts, stops: of the byte ranges that have been read or are being read, disjoint and in order.
    pieces: (first byte, bytes, CRC-32) of the parts that are done. done: their bytes in all.
    compared: all of it was read, and its CRC-32 is compared. together: so it is, but others have read parts of it.
    to_compare: whether so much of it will be read that it can be.
    """

    record: StoredCrc32
    starts: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    done: int = 0
    compared: bool = False
    together: bool = False
    to_compare: bool = True

    @property
    def size(self) -> int:
        return self.record.stop - self.record.start

    def claim(self, low: int, high: int) -> list[tuple[int, int]]:
        """Take the bytes [low, high). Returns the parts of them that nobody had taken before."""
        first = bisect_left(self.stops, low)
        last = first
        free = []
        at = low
        while last < len(self.starts) and self.starts[last] <= high:
            if self.starts[last] > at:
                free.append((at, self.starts[last]))
            at = max(at, self.stops[last])
            last += 1
        if at < high:
            free.append((at, high))
        if last > first:
            low, high = min(low, self.starts[first]), max(high, self.stops[last - 1])
        self.starts[first:last], self.stops[first:last] = [low], [high]
        return free

    def missing(self) -> list[tuple[int, int]]:
        """The byte ranges that nobody has taken."""
        edges = [self.record.start, *(edge for pair in zip(self.starts, self.stops, strict=True) for edge in pair)]
        edges.append(self.record.stop)
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


class RecordChecks:
    """The state of checking one source. Thread-safe.

    records: the index of a file -> its records, in the order of the file; for files that have any.
    paths: of all files.
    keeps_pieces: remember what `take_pieces` returns.
    """

    def __init__(
        self,
        records: Mapping[int, Sequence[StoredCrc32]],
        paths: Sequence[str],
        files: Files,
        keeps_pieces: bool = False,
    ) -> None:
        self._files = files
        self._paths = paths
        self._progress = {index: [_Progress(record) for record in found] for index, found in records.items()}
        self._stops = {index: [record.stop for record in found] for index, found in records.items()}
        self._touched: dict[tuple[int, int], _Progress] = {}
        self._unsettled: dict[tuple[int, int], _Progress] = {}
        self._new: list[RecordPiece] | None = [] if keeps_pieces else None
        self._lock = Lock()
        self.verified_bytes = 0
        """Bytes of records that were compared with their CRC-32."""

    def expect(self, ranges: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        """Say which bytes of the files will be read, in order and disjoint. Of records that this leaves in part no
        CRC-32s are computed, since they would be compared with nothing."""
        for file, found in self._progress.items():
            whole = {low for low, _ in self.whole_records(file, ranges.get(file, ()))}
            for progress in found:
                progress.to_compare = progress.record.start in whole

    def covers(self, file: int) -> bool:
        """Whether the file has records with CRC-32s."""
        return file in self._progress

    @property
    def unverified_bytes(self) -> int:
        """Bytes read of those records that were not read whole."""
        with self._lock:
            return sum(progress.done for progress in self._touched.values())

    def add(self, file: int, start: int, data: Any) -> None:
        """Take bytes that were read, which begin at byte ``start`` of the file.

        Raises DigestMismatch if they complete a record that differs from its CRC-32.
        """
        stop = start + len(data)
        if stop == start:
            return  # nothing was read, so no record is read in part for `finish` to complete
        for progress in self._within(file, start, stop):
            low, high = max(progress.record.start, start), min(progress.record.stop, stop)
            with self._lock:
                if progress.compared:
                    continue
                free = progress.claim(low, high)
                if not progress.to_compare:
                    progress.done += sum(b - a for a, b in free)
                    self._touched[file, progress.record.start] = progress
                    continue
            self._put(file, progress, [(a, b - a, crc32(data[a - start : b - start])) for a, b in free])

    def add_known(self, pieces: Iterable[RecordPiece]) -> None:
        """Take what other processes or an earlier attempt have read. What overlaps with known pieces is skipped."""
        for file, start, size, crc in sorted(pieces, key=lambda piece: (piece[0], piece[1], -piece[2])):
            for progress in self._within(file, start, start + size):
                with self._lock:
                    whole = progress.record.start <= start and start + size <= progress.record.stop
                    overlaps = any(a < start + size and start < b for a, b in self._taken(progress, start))
                    if progress.compared or overlaps or not whole:
                        continue
                    progress.claim(start, start + size)
                self._put(file, progress, [(start, size, crc)])

    @staticmethod
    def _taken(progress: _Progress, start: int) -> list[tuple[int, int]]:
        """The first range that ends after ``start``."""
        k = bisect_right(progress.stops, start)
        return list(zip(progress.starts[k : k + 1], progress.stops[k : k + 1], strict=True))

    def whole_records(self, file: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The records of which these byte ranges hold so much that a load compares them (see `settle`), as ranges.
        ``ranges`` are in order and disjoint."""
        out = []
        for progress in self._progress.get(file, ()):
            low, high = progress.record.start, progress.record.stop
            first = bisect_right(ranges, low, key=lambda held: held[1])
            inside = 0
            for start, stop in ranges[first:]:
                if start >= high:
                    break
                inside += min(stop, high) - max(start, low)
            if high > low and progress.size - inside <= progress.size * limits.RECORD_MISSING_PART:
                out.append((low, high))
        return out

    def take_pieces(self) -> list[RecordPiece]:
        """What was read since this was last called."""
        with self._lock:
            if self._new is None:
                return []
            out, self._new = self._new, []
            return out

    def parts(self, most: int) -> list[RecordPiece]:
        """What was read of records that are not compared yet: parts without gaps, at most so many, the longest ones."""
        with self._lock:
            held = [(file, sorted(progress.pieces)) for (file, _), progress in self._touched.items()]
        out = [(file, *part) for file, pieces in held for part in _joined(pieces)]
        return heapq.nlargest(most, out, key=lambda piece: piece[2]) if len(out) > most else out

    def compare_together(self, pieces: Mapping[int, Sequence[tuple[int, int, int]]]) -> None:
        """Compare the records that were read in part with the help of what others have read of them.

        pieces: of all, this one's own too: file -> (first byte, bytes, CRC-32). What nobody has read is read, if it is
        as little as for `settle`; else the record stays as it is. Raises what reading raises, and DigestMismatch.
        """
        with self._lock:
            touched = list(self._touched.items())
        starts = {file: sorted(found, key=lambda piece: (piece[0], -piece[1])) for file, found in pieces.items()}
        for (file, start), progress in touched:
            chain = _chain(starts.get(file, ()), start, progress.record.stop)
            missing = progress.size - sum(size for _, size, _ in chain)
            if missing > progress.size * limits.RECORD_MISSING_PART:
                continue
            found = combine_all((crc, size) for _, size, crc in self._filled(file, progress, chain))
            _check(self._files, self._paths[file], progress.record, found)
            progress.together = True
            with self._lock:
                self._compared(file, progress, progress.done)

    def trust(self, other: RecordChecks) -> None:
        """Take as compared what another reader of the same files has compared together with other ranks. What it could
        not compare is not compared here either."""
        for file, found in self._progress.items():
            for progress, theirs in zip(found, other._progress[file], strict=True):
                if theirs.together and not progress.compared:
                    with self._lock:
                        self._compared(file, progress, theirs.done)
                progress.to_compare = theirs.compared

    def _compared(self, file: int, progress: _Progress, nbytes: int) -> None:
        progress.compared = True
        progress.pieces.clear()
        self._touched.pop((file, progress.record.start), None)
        self._unsettled.pop((file, progress.record.start), None)
        self.verified_bytes += nbytes

    def _filled(
        self, file: int, progress: _Progress, chain: Iterable[tuple[int, int, int]]
    ) -> Iterator[tuple[int, int, int]]:
        """The pieces from one end of the record to the other; what lies between them is read."""
        at = progress.record.start
        for start, size, crc in (*chain, (progress.record.stop, 0, 0)):
            for low, data in self._read(file, at, start):
                yield low, len(data), crc32(data)
            yield start, size, crc
            at = start + size

    def settle(self) -> None:
        """Read what is missing of records that lack only little. Raises what reading raises, and DigestMismatch."""
        with self._lock:
            recent, self._unsettled = self._unsettled, {}
        for (file, _), progress in recent.items():
            with self._lock:
                missing = [] if progress.compared else progress.missing()
            if sum(b - a for a, b in missing) <= progress.size * limits.RECORD_MISSING_PART:
                self._complete(file, missing)

    def finish(self) -> None:
        """Read what is missing of every record that was read in part. Raises what reading raises, and DigestMismatch.

        No other thread may read meanwhile.
        """
        for (file, _), progress in list(self._touched.items()):
            self._complete(file, progress.missing())

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(progress.size for found in self._progress.values() for progress in found)

    def read_all(self) -> Iterator[int]:
        """Read every record to its end, and yield the bytes of each. Raises as `finish` does."""
        for file, found in self._progress.items():
            for progress in found:
                self._complete(file, progress.missing())
                yield progress.size

    def _complete(self, file: int, missing: Iterable[tuple[int, int]]) -> None:
        for low, high in missing:
            for at, data in self._read(file, low, high):
                self.add(file, at, data)

    def _read(self, file: int, low: int, high: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The bytes [low, high) of a file, a step at a time, each with its first byte's number."""
        for at in range(low, high, limits.RECORD_STEP_BYTES):
            buffer: NDArray[np.uint8] = np.empty(min(limits.RECORD_STEP_BYTES, high - at), np.uint8)
            self._files.read_into(self._paths[file], at, buffer.data)
            yield at, buffer

    def _within(self, file: int, start: int, stop: int) -> list[_Progress]:
        """The records that these bytes are part of."""
        records, stops = self._progress[file], self._stops[file]
        first = last = bisect_right(stops, start)
        while last < len(records) and records[last].record.start < stop:
            last += 1
        return records[first:last]

    def _put(self, file: int, progress: _Progress, pieces: Sequence[tuple[int, int, int]]) -> None:
        key = (file, progress.record.start)
        with self._lock:
            progress.pieces += pieces
            progress.done += sum(size for _, size, _ in pieces)
            if self._new is not None:
                self._new += [(file, *piece) for piece in pieces]
            if progress.done < progress.size:
                self._touched[key] = self._unsettled[key] = progress
                return
            if progress.compared:
                return
            pieces = sorted(progress.pieces)
            self._compared(file, progress, progress.size)
        _check(self._files, self._paths[file], progress.record, combine_all((crc, size) for _, size, crc in pieces))


def _joined(pieces: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """The pieces, which are in order and disjoint, with those that touch as one."""
    start = size = crc = 0
    for at, more, found in pieces:
        if size and at == start + size:
            size, crc = size + more, combine(crc, found, more)
            continue
        if size:
            yield start, size, crc
        start, size, crc = at, more, found
    if size:
        yield start, size, crc


def _chain(pieces: Sequence[tuple[int, int, int]], low: int, high: int) -> list[tuple[int, int, int]]:
    """Of pieces in order, the longest first of those that begin at the same byte: such that lie in [low, high) one
    behind the other, as long as can be from each on."""
    out = []
    at = low
    for k in range(bisect_left(pieces, low, key=lambda piece: piece[0]), len(pieces)):
        start, size, _ = pieces[k]
        if start >= high:
            break
        if start >= at and start + size <= high:
            out.append(pieces[k])
            at = start + size
    return out


def read_record(files: Files, path: str, record: StoredCrc32) -> bytes:
    """A whole record, for small ones. Raises what reading raises, and DigestMismatch if its CRC-32 differs."""
    raw = bytearray(record.stop - record.start)
    files.read_into(path, record.start, raw)
    _check(files, path, record, crc32(raw))
    return bytes(raw)


def _check(files: Files, path: str, record: StoredCrc32, found: int) -> None:
    wanted = record.crc
    if wanted is None:
        raw = bytearray(4)
        files.read_into(path, record.at, raw)
        wanted = int.from_bytes(raw, "little")
    if found != wanted:
        raise DigestMismatch(record.differs(path, wanted, found))
