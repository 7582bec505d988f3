"""CRC-32 of data that is seen in pieces and in any order.

Zip records carry the CRC-32 of their bytes. If several threads write those bytes, each computes the CRC of what it
writes, and the results are combined. Appending n bytes to a message multiplies its CRC by x^8n modulo the polynomial.
That is an operation on 32 bits, however large n is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

try:
    # It uses the processor's carry-less multiplication and is as fast as the memory; zlib does 1 GB/s on a core.
    from isal.isal_zlib import crc32
except ImportError:  # no build of it for this machine
    from zlib import crc32

__all__ = ["Crc32Entry", "PassingEntries", "StoredCrc32", "combine", "combine_all", "crc32", "in_order", "within"]

# zlib's polynomial in the bit order of its CRC register: the highest power of x is the lowest bit.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


@dataclass(frozen=True)
class Crc32Entry:
    """A byte range of a file whose CRC-32 must be known in the file itself.

    offset, size: the range, in bytes.
    positions: byte offsets at which the CRC is stored, as 4 little-endian bytes each. They lie after the range (a zip
    record has two: in its data descriptor and in the central directory).
    """

    offset: int
    size: int
    positions: tuple[int, ...]

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True)
class StoredCrc32:
    """A byte range of a file whose CRC-32 is stored in the file: a record of a zip archive.

    name: the record's name.
    start, stop: the range, in bytes.
    crc: the CRC-32 that the bytes should have; None if only the place where it is stored is known.
    at: the byte at which it is stored, as 4 little-endian bytes.
    """

    name: str
    start: int
    stop: int
    crc: int | None
    at: int

    def differs(self, path: str, wanted: int, found: int) -> str:
        """The sentence for bytes whose CRC-32 is not what it should be."""
        return (
            f"{path}: its record '{self.name}' ({self.stop - self.start} bytes from byte {self.start}) is damaged: its "
            f"CRC-32 should be {wanted:08x} and is {found:08x}; take another copy of the file"
        )


def in_order(records: Mapping[int, Mapping[int, StoredCrc32]]) -> dict[int, tuple[StoredCrc32, ...]]:
    """Each file's records, ordered by their first bytes, which are the keys."""
    return {file: tuple(found[start] for start in sorted(found)) for file, found in sorted(records.items())}


def within(entries: Sequence[Crc32Entry], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(index, first byte, byte after the last) of each part of an entry that lies in the bytes ``[start, stop)``. The
    entries are in the order of the file."""
    for index in range(bisect_right(entries, start, key=lambda entry: entry.end), len(entries)):
        entry = entries[index]
        if entry.offset >= stop:
            break
        yield index, max(entry.offset, start), min(entry.end, stop)


class PassingEntries:
    """The CRC-32s of a file's entries, stored while its bytes pass from the first to the last.

    Raises ValueError for an entry whose CRC is wanted before its last byte has passed.
    """

    def __init__(self, entries: Sequence[Crc32Entry]) -> None:
        self._entries = entries
        self._crcs = [0] * len(entries)
        self._stores = sorted((position, k) for k, entry in enumerate(entries) for position in entry.positions)
        if any(position < entries[k].end for position, k in self._stores):
            raise ValueError("a CRC-32 is to be stored ahead of the bytes that it is of")

    def store(self, start: int, data: memoryview) -> None:
        """Take the file's next bytes, which begin at byte ``start``, and put into them the CRCs that belong there."""
        stop = start + len(data)
        for index, first, last in within(self._entries, start, stop):
            self._crcs[index] = crc32(data[first - start : last - start], self._crcs[index])
        # From 3 bytes before: a CRC may lie across two pieces.
        for k in range(bisect_right(self._stores, (start - 4, len(self._crcs))), len(self._stores)):
            position, index = self._stores[k]
            if position >= stop:
                break
            raw = self._crcs[index].to_bytes(4, "little")
            first, last = max(position, start), min(position + 4, stop)
            data[first - start : last - start] = raw[first - position : last - position]


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo zlib's polynomial, all in zlib's bit order."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=64)
def _power(k: int) -> int:
    """x^(8 * 2^k) modulo the polynomial."""
    return 1 << 23 if k == 0 else _multiply(_power(k - 1), _power(k - 1))


@lru_cache(maxsize=4096)
def _shift(size: int) -> int:
    """x^(8 size) modulo the polynomial."""
    result = _ONE
    for k in range(size.bit_length()):
        if size >> k & 1:
            result = _multiply(result, _power(k))
    return result


def combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two messages one after the other, from the CRC-32 of each. ``second_size`` is in bytes."""
    return _multiply(_shift(second_size), first) ^ second


def combine_all(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces given in order as (crc, size in bytes)."""
    crc = 0
    for piece, size in pieces:
        crc = combine(crc, piece, size)
    return crc
