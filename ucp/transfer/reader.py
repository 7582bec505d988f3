"""Byte ranges of a catalog's files, verified as they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import Catalog
from ucp.errors import DamagedCheckpoint
from ucp.storage.digests import CHUNK, ChunkDigests, covering, verify_chunks, verify_parts
from ucp.storage.files import Files
from ucp.storage.read_ahead import FileRange, reading_ahead
from ucp.transfer.checksums import RecordChecks
from ucp.transfer.chunk_parts import ChunkParts

Bytes = NDArray[np.uint8]
# A thread's verified chunks: (file, chunk) -> its bytes.
Cache = OrderedDict[tuple[int, int], Bytes]


@dataclass(eq=False)
class _Tally:
    """Of a reader and those made from it: seconds that checking took, bytes of chunks that are verified, and bytes that
    were compared with nothing."""

    seconds: float = 0.0
    digested: int = 0
    unchecked: int = 0
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes that a process has read, compared with digests of chunks, and compared with nothing. What was compared with
    CRC-32s is left out: who completes a record counts it."""

    read: int = 0
    digested: int = 0
    unchecked: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.read + other.read, self.digested + other.digested, self.unchecked + other.unchecked)


class Reader:
    """Byte ranges of a catalog's files, verified against its digests if it has them, else against the CRC-32s of
    torch's records if these are read whole. Thread-safe.

    keeps_pieces: as for `ucp.transfer.checksums.RecordChecks`. parts: of chunks that this rank and others verify
    together.
    """

    def __init__(
        self,
        catalog: Catalog,
        files: Files,
        verify: bool = True,
        keeps_pieces: bool = False,
        parts: ChunkParts | None = None,
    ) -> None:
        self._tally = _Tally()
        self._again = False
        self._paths = [f.path for f in catalog.files]
        self._files = files
        self._at_once = limits.chunks_at_once(limits.CHUNKS_AT_ONCE_COUNT)
        self._computed = dict(catalog.computed)
        self._digests: dict[int, ChunkDigests] = dict(catalog.chunk_digests) if verify else {}
        self._parts = parts or ChunkParts({}, frozenset())
        self.records = RecordChecks(catalog.crc_records if verify else {}, self._paths, files, keeps_pieces)

    def again(self) -> Reader:
        """A reader of bytes that were compared with their digests before. It reads them without comparing them once
        more, and counts them as verified, together with this one's."""
        out = copy(self)
        out._again = True
        return out

    @property
    def digest_seconds(self) -> float:
        """The time that checking digests and CRC-32s has taken so far, in all threads together."""
        return self._tally.seconds

    @property
    def counts(self) -> Counts:
        return Counts(self._files.bytes_read, self._tally.digested, self._tally.unchecked)

    @property
    def verified_bytes(self) -> int:
        """Bytes that were compared with a digest or a CRC-32: whole chunks, each time they are read, and whole
        records."""
        return self._tally.digested + self.records.verified_bytes

    @property
    def unverified_bytes(self) -> int:
        """Bytes that were read and compared with nothing: there is no digest, or the record was not read whole."""
        return self._tally.unchecked + self.records.unverified_bytes

    @property
    def verifies(self) -> bool:
        """Whether chunks are read whole and verified, in some of the files at least."""
        return bool(self._digests)

    def path(self, file: int) -> str | None:
        """Where a file of the catalog lies; None for one that is computed when it is read."""
        return None if file in self._computed else self._paths[file]

    def is_far(self, file: int) -> bool:
        """Whether the bytes of a file have to be fetched from another machine."""
        return file not in self._computed and self._files.is_far(self._paths[file])

    def reading_ahead(
        self, shares: Iterable[Iterable[tuple[int, int, int]]]
    ) -> AbstractContextManager[list[list[int]] | None]:
        """As `ucp.storage.read_ahead.reading_ahead`. shares: what each thread reads, (file, first byte, bytes)."""
        return reading_ahead(self._files, [[self._file_range(*one) for one in share] for share in shares])

    def _file_range(self, file: int, at: int, size: int) -> FileRange:
        path = self.path(file)
        return ("", 0, 0) if path is None or self.is_far(file) else (path, at, at + size)

    def has_digests(self, file: int) -> bool:
        """Whether the file has digests of its chunks."""
        return file in self._digests

    def comparable(self, file: int, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What can be compared of these byte ranges of a file, which are in order and disjoint: the whole chunks that
        they touch, parts of chunks that may be read alone, or the records that they cover."""
        if file in self._computed:
            return []
        digests = self._digests.get(file)
        if digests is None:
            return self.records.whole_records(file, ranges)
        out: list[tuple[int, int]] = []
        alone: list[tuple[int, int]] = []
        for low, high in ranges:
            if (file, low, min(high, stop := (low // CHUNK + 1) * CHUNK)) in self._parts:
                alone.append((low, min(high, stop)))
                low = min(high, stop)
            if low < high and (file, begin := max(low, (high - 1) // CHUNK * CHUNK), high) in self._parts:
                alone.append((begin, high))
                high = begin
            low, high = covering(low, high, max(digests.size, high))
            if out and low <= out[-1][1]:
                out[-1] = out[-1][0], max(high, out[-1][1])
            elif low < high:
                out.append((low, high))
        return sorted([*out, *_outside(alone, out)])

    def read_into(self, file: int, offset: int, parts: Sequence[Bytes], cache: Cache) -> None:
        """Fill the parts, one after the other, with the bytes from ``offset`` on; ``cache`` is the calling thread's own
        store of verified chunks.

        Chunks that are wanted whole are read straight to where they belong, in one part or in several. Other chunks are
        read into the cache, and what is wanted of them is copied.
        """
        if file in self._computed:
            self._computed[file].read_into(offset, parts)
            return
        path, digests = self._paths[file], self._digests.get(file)
        if digests is None:
            self._read_records(file, path, offset, parts)
            return
        at, stop = offset, offset + sum(map(len, parts))
        if stop > digests.size:
            raise DamagedCheckpoint(
                f"{path}: bytes up to {stop} are wanted, but digests cover {digests.size}; the manifest and the file "
                "do not belong together"
            )
        if self._again and len(parts) <= limits.READ_PARTS_COUNT:
            self._files.read_parts(path, offset, [part.data for part in parts])
            self._count(0.0, digested=stop - at)
            return
        rest = deque(parts)
        most = limits.CHUNKS_FETCHED_COUNT if self._files.is_far(path) else self._at_once
        while at < stop:
            index, within = divmod(at, CHUNK)
            end = min((index + 1) * CHUNK, stop)
            is_part = within or (end - at < CHUNK and end != digests.size)
            if is_part and (file, at, end) in self._parts:
                self._read_part(file, at, end, _taken(rest, end - at))
            elif is_part:
                chunk = self._chunk(file, path, digests, index, cache)
                _spread(chunk[within:], _taken(rest, end - at))
            else:
                end = max(end, at + min((stop - at) // CHUNK, most) * CHUNK)
                self._read_whole(path, digests, at, end, _taken(rest, end - at))
            at = end

    def within_chunk(self, file: int, offset: int, count: int, cache: Cache) -> Bytes | None:
        """The bytes from ``offset`` on where the chunk is in memory, if they lie in one that has a digest; else None.
        They are valid until the cache is used again, which has no other chunk of a local file then: the next one takes
        the same memory, while it is in the processor's cache."""
        digests = None if file in self._computed else self._digests.get(file)
        index, within = divmod(offset, CHUNK)
        if digests is None or not 0 < count <= min(CHUNK, digests.size - index * CHUNK) - within:
            return None
        return self._chunk(file, self._paths[file], digests, index, cache, keep=1)[within : within + count]

    def compare(self, file: int, offset: int, buffer: Bytes) -> None:
        """Fill the buffer with bytes from ``offset`` on and verify them: what `comparable` gave, cut at chunks.

        Raises what reading raises, and DigestMismatch.
        """
        digests = self._digests.get(file)
        if digests is None or offset + len(buffer) > digests.size:
            self.read_into(file, offset, [buffer], OrderedDict())
        elif (file, offset, offset + len(buffer)) in self._parts:
            self._read_part(file, offset, offset + len(buffer), [buffer])
        else:
            self._read_whole(self._paths[file], digests, offset, offset + len(buffer), [buffer])
            if self._parts.owned:
                for at in range(0, len(buffer), CHUNK):
                    self._parts.add_chunk(file, (offset + at) // CHUNK, buffer[at : at + CHUNK])

    def compare_parts(self, told: Sequence[NDArray[np.int64]]) -> None:
        """Compare the parts of chunks that were read alone, as `ChunkParts.compare`. Raises what reading raises."""

        def chunk_of(file: int, index: int) -> Bytes:
            return self._chunk(file, self._paths[file], self._digests[file], index, OrderedDict())

        self._parts.compare(told, self._paths, chunk_of)

    def _read_records(self, file: int, path: str, offset: int, parts: Sequence[Bytes]) -> None:
        """Bytes of a file without digests, which may lie in records with CRC-32s."""
        checked = self.records.covers(file)
        for part in parts:
            step = limits.RECORD_STEP_BYTES * self._at_once if checked and not self._files.is_far(path) else len(part)
            for at in range(0, len(part), step or 1):
                piece = part[at : at + step]
                self._files.read_into(path, offset + at, piece.data)
                if checked:
                    began = perf_counter()
                    self.records.add(file, offset + at, piece)
                    self._count(perf_counter() - began)
            offset += len(part)
        if not checked:
            self._count(0.0, unchecked=sum(map(len, parts)))

    def _fetch(self, path: str, at: int, end: int, parts: list[Bytes]) -> list[Bytes]:
        """Read bytes, straight into the parts unless there are too many of them. Returns what holds the bytes: the
        parts, or one buffer that is yet to be spread over them."""
        if len(parts) <= limits.READ_PARTS_COUNT:
            self._files.read_parts(path, at, [part.data for part in parts])
            return parts
        raw = np.empty(end - at, np.uint8)
        self._files.read_into(path, at, raw.data)
        return [raw]

    def _read_whole(self, path: str, digests: ChunkDigests, at: int, end: int, parts: list[Bytes]) -> None:
        """Read whole chunks and verify them."""
        held = self._fetch(path, at, end, parts)
        self._check(path, digests, at // CHUNK, held)
        if held is not parts:
            _spread(held[0], parts)

    def _read_part(self, file: int, at: int, end: int, parts: list[Bytes]) -> None:
        """Read a part of a chunk alone."""
        path = self._paths[file]
        held = self._fetch(path, at, end, parts)
        if held is not parts:
            _spread(held[0], parts)
        began = perf_counter()
        self._parts.add(path, (file, at, end), parts)
        self._count(perf_counter() - began, digested=end - at)

    def _chunk(
        self, file: int, path: str, digests: ChunkDigests, index: int, cache: Cache, keep: int | None = None
    ) -> Bytes:
        """A verified chunk, in the cache. keep: of how many chunks the cache has the memory then."""
        key = (file, index)
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
        size = min(CHUNK, digests.size - index * CHUNK)
        # The new chunk takes the oldest one's memory, so that the system need not clear pages for each.
        room = np.empty(0, np.uint8)
        while len(cache) >= (keep or limits.CHUNKS_KEPT_COUNT):
            room = cache.popitem(last=False)[1]
        chunk = room[:size] if len(room) >= size else np.empty(CHUNK, np.uint8)[:size]
        self._files.read_into(path, index * CHUNK, chunk.data)
        self._check(path, digests, index, [chunk])
        self._parts.add_chunk(file, index, chunk)
        cache[key] = chunk
        return chunk

    def _check(self, path: str, digests: ChunkDigests, index: int, parts: list[Bytes]) -> None:
        """Verify whole chunks, in one part or one after the other in several."""
        began, nbytes = perf_counter(), sum(map(len, parts))
        if len(parts) == 1:
            verify_chunks(path, digests, index, parts[0].data)
        else:
            rest = deque(parts)
            while rest:
                size = min(CHUNK, digests.size - index * CHUNK)
                verify_parts(path, digests, index, [part.data for part in _taken(rest, size)])
                index += 1
        self._count(perf_counter() - began, digested=nbytes)

    def _count(self, seconds: float, digested: int = 0, unchecked: int = 0) -> None:
        tally = self._tally
        with tally.lock:
            tally.seconds += seconds
            tally.digested += digested
            tally.unchecked += unchecked


def _outside(alone: Sequence[tuple[int, int]], whole: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of chunks that are in none of the ranges of whole chunks. Both are in order."""
    for low, high in alone:
        first = bisect_right(whole, low, key=lambda held: held[1])
        if first == len(whole) or whole[first][0] >= high:
            yield low, high


def _spread(raw: Bytes, parts: Sequence[Bytes]) -> None:
    """Copy the first bytes into the parts, one after the other."""
    at = 0
    for part in parts:
        part[:] = raw[at : at + len(part)]
        at += len(part)


def _taken(rest: deque[Bytes], count: int) -> list[Bytes]:
    """Take the first ``count`` bytes away from the parts and return them."""
    out: list[Bytes] = []
    while count:
        part = rest.popleft()
        if len(part) > count:
            rest.appendleft(part[count:])
            part = part[:count]
        if len(part):
            out.append(part)
        count -= len(part)
    return out
