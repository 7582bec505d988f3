"""CRC-32 of data that is seen in pieces and in any order.

Zip records carry the CRC-32 of their bytes. Where those bytes are written by several threads, each computes the CRC of
what it writes, and the results are combined: appending n bytes to a message multiplies its CRC by x^8n modulo the
polynomial, an operation on 32 bits whatever n is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

# zlib's polynomial in the bit order of its CRC register: the highest power of x is the lowest bit.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


@dataclass(frozen=True)
class Crc32Entry:
    """A byte range of a file whose CRC-32 must be known in the file itself.

    offset, size: the range, in bytes. positions: byte offsets at which the CRC is stored, as 4 little-endian bytes
    each (a zip record has two: its local header's and its central directory entry's).
    """

    offset: int
    size: int
    positions: tuple[int, ...]


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo zlib's, both in its bit order."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@lru_cache(maxsize=4096)
def _shift(size: int) -> int:
    """x^(8 size) modulo the polynomial."""
    result, power = _ONE, 1 << 23  # x^0 and x^8
    while size:
        if size & 1:
            result = _multiply(result, power)
        power = _multiply(power, power)
        size >>= 1
    return result


def combine(first: int, second: int, second_size: int) -> int:
    """The CRC-32 of two messages one after the other, from theirs; ``second_size`` is in bytes."""
    return _multiply(_shift(second_size), first) ^ second


def combine_all(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces given in order as (crc, size in bytes)."""
    crc = 0
    for piece, size in pieces:
        crc = combine(crc, piece, size)
    return crc
