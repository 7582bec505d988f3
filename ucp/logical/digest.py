"""The digest of a logical tensor: of all its elements and their places, independent of how they are cut.

**Construction.** A tensor is a row of bytes (`ucp.logical.runs`). The bytes are taken as signed little-endian words of
32 bits, and the words as rows of 256. The word w at column c of row r adds, in each of two lanes,

    M[lane](r) * V[lane](c) * w    modulo 2^64

M is a strong mixer of the row's number, made odd, so that it never repeats. V is a table of 256 fixed random numbers of
60 bits. The digest is the two sums. A word's contribution is the sum of those of its bytes, the last of which carries
the sign. So any bytes of a word may be added anywhere: ranks, shards, chunks and files add up what they have in any
order.

**Why place and value are both bound.** A word is multiplied by a key that no other place of the tensor has. If two
elements, two rows or two blocks change places, at any distance, the sum changes unless they are equal. It also changes
if an element is counted twice or if any bit changes, since the bits themselves are added: a zero's sign, a NaN's
payload.

**How likely a collision is.** The digest is linear: changes d(i) go unseen if the sum of key(i) * d(i) is 0 in both
lanes. For changes that do not depend on the keys, the chance of that is about 2^-110. The worst case is about 2^-56: if
nothing but sign bits of 32-bit floats differ, multiples of 2^31 meet only the lowest 33 bits of a key. The keys are
fixed, so digests of different checkpoints and runs can be compared. The digest guards against faults, but not against
somebody who makes a change to fit: that would need keys that he doesn't know.

**What is not bound.** The element type and the shape: equal bytes have equal digests. Whoever compares digests compares
those, too (`Digest` is kept with the tensor's name, shape and type).

**Speed.** Each number of the table is four digits of 15 bits, so a row times the table is one product of matrices of
doubles. Every sum in it stays below 2^53 and so is exact, in whatever order it is added: 4 GB/s a core. What remains is
two 64-bit products for each row of 1 KiB. Nothing here needs torch; `ucp.job.live_digest` does the same on devices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ucp.columns import tuples_of
from ucp.logical.runs import SAMPLE_BLOCK, Runs, Sample, mixed

Bytes = NDArray[np.uint8]

SCHEME = "rows-256x2"
"""The construction's name, kept beside the digests: those of another one are not compared."""

COLUMNS = 256
ROW = 4 * COLUMNS  # bytes
LANES, DIGITS, DIGIT_BITS = 2, 4, 15

_MASK = (1 << 64) - 1
_HEXADECIMAL = "0123456789abcdef"
KEY_SEED, _TABLE_SEED = 0x5563_7044_6967_6573, 0x6C6F_6769_6361_6C31

# Rows of one product of matrices: so small that BLAS does it in the calling thread, while it is in the cache.
_ROWS = 128
# Rows whose products are added up at once, and rows of words that are put together before they are multiplied.
_TOGETHER, _PADDED = 4096, 1024
# Runs of at least so many bytes are multiplied where they are; shorter ones are copied into rows first.
_LONG = 64 << 10
# Up to so many runs are copied one by one: looking for those that are alike would take longer.
_FEW = 8
# Runs shorter than this are added word by word, unless so many in a row are alike.
_SHORT = 64
_ALIKE = 32
# Items of short runs that are added at once.
_ITEMS = 64 << 10
# Row keys that are kept: 4 MiB, enough for 256 MiB of a tensor.
_KEPT = 1 << 18
_BLOCK_ROWS = SAMPLE_BLOCK // ROW


class Digest(NamedTuple):
    """The two sums of some of a tensor's bytes. The digests of disjoint parts add up (``+``) to the digest of all."""

    first: int = 0
    second: int = 0

    def __add__(self, other: Digest) -> Digest:  # type: ignore[override]
        return Digest((self.first + other.first) & _MASK, (self.second + other.second) & _MASK)

    def __mul__(self, times: int) -> Digest:  # type: ignore[override]
        """The digest of the same elements, held so many times."""
        return Digest(self.first * times & _MASK, self.second * times & _MASK)

    def __str__(self) -> str:
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """The inverse of ``str``. Raises ValueError."""
        return cls.parse_all([text])[0]

    @classmethod
    def parse_all(cls, texts: Sequence[str]) -> list[Digest]:
        """The inverse of ``str``, of many at once. Raises ValueError for the first that is no digest."""
        joined = "".join(texts)
        try:
            raw = bytes.fromhex(joined)
        except ValueError:
            raw = b""
        if set(map(len, texts)) - {32} or raw.hex() != joined:
            wrong = next(text for text in texts if len(text) != 32 or text.strip(_HEXADECIMAL))
            raise ValueError(f"{wrong[:40]!r} is no logical digest: 32 hexadecimal digits are one")
        numbers = np.frombuffer(raw, ">u8").tolist()
        return tuples_of(cls, numbers[::2], numbers[1::2])


def total(parts: Iterable[Digest]) -> Digest:
    """The digest of all these parts together."""
    first = second = 0
    for part in parts:
        first, second = first + part.first, second + part.second
    return Digest(first & _MASK, second & _MASK)


@lru_cache(1)
def digits() -> NDArray[np.float64]:
    """(256, 8) the table's digits, as doubles: those of the first lane, least significant first, then the second's."""
    drawn = mixed(np.arange(COLUMNS * LANES * DIGITS, dtype=np.uint64) + np.uint64(_TABLE_SEED))
    small = (drawn >> np.uint64(64 - DIGIT_BITS)).astype(np.int64) - (1 << (DIGIT_BITS - 1))
    return np.ascontiguousarray(small.reshape(COLUMNS, LANES * DIGITS).astype(np.float64))


@lru_cache(1)
def weights() -> NDArray[np.int64]:
    """(4,) the place value of each digit of a number."""
    return np.int64(1) << np.arange(DIGITS, dtype=np.int64) * DIGIT_BITS


@lru_cache(1)
def table() -> NDArray[np.int64]:
    """(2, 256) the key of each column in both lanes."""
    keys = (digits().astype(np.int64).reshape(COLUMNS, LANES, DIGITS) * weights()).sum(axis=2)
    return np.ascontiguousarray(keys.T)


def row_keys(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(2, n) the keys of these rows in both lanes."""
    numbers = rows.astype(np.uint64) * np.uint64(LANES) + np.arange(LANES, dtype=np.uint64)[:, None]
    return (mixed(numbers + np.uint64(KEY_SEED)) | np.uint64(1)).view(np.int64)


class _Scratch(threading.local):
    """A thread's own memory for products of matrices."""

    def __init__(self) -> None:
        self.words = np.empty((_ROWS, COLUMNS), np.float64)
        self.found = np.empty((_TOGETHER, LANES * DIGITS), np.float64)
        self.exact = np.empty((_TOGETHER, LANES * DIGITS), np.int64)
        self.padded = np.empty(_PADDED * ROW, np.uint8)


_scratch = _Scratch()
_keys = np.zeros((LANES, 0), np.int64)


class _RowSums:
    """The sums so far: of all bytes, and of those that a sample picks. nbytes: of the whole tensor."""

    def __init__(self, sample: Sample | None, nbytes: int) -> None:
        self.whole = [0] * LANES
        self.sampled = [0] * LANES
        self._sample = sample
        self._nbytes = nbytes

    def add(self, words: NDArray[np.int32], rows: int | NDArray[np.int64], column: int = 0) -> None:
        """Add at most `_TOGETHER` rows of words, or parts of rows that all begin at the same column.

        rows: the first row's number, if they follow one another, else all numbers.

        The products with the row's key are products of integers. They take little time, since there are eight of them
        for 256 words.
        """
        count = len(words)
        exact = products(words, column)
        keys = _keys_of(rows, count) if isinstance(rows, int) else keys_at(rows)
        _weigh(self.whole, exact, keys)
        if self._sample is None:
            return
        if not isinstance(rows, int):
            picked = np.flatnonzero(self._sample.takes(rows // _BLOCK_ROWS, self._nbytes))
            if len(picked):
                _weigh(self.sampled, exact[picked], keys[:, picked])
            return
        first = rows // _BLOCK_ROWS
        blocks = np.arange(first, (rows + count - 1) // _BLOCK_ROWS + 1)
        taken = np.flatnonzero(self._sample.takes(blocks, self._nbytes))
        for block in (taken + first).tolist():
            low, high = max(block * _BLOCK_ROWS - rows, 0), min((block + 1) * _BLOCK_ROWS - rows, count)
            _weigh(self.sampled, exact[low:high], keys[:, low:high])

    def items(self, rows: NDArray[np.int64], columns: NDArray[np.int64], values: NDArray[np.int64]) -> None:
        """Add words one by one, each with its row and column."""
        keys = keys_at(rows)
        picked = None if self._sample is None else self._sample.takes(rows // _BLOCK_ROWS, self._nbytes)
        for lane in range(LANES):
            products = keys[lane] * table()[lane, columns] * values
            self.whole[lane] += int(products.sum())
            if picked is not None:
                self.sampled[lane] += int(products[picked].sum())


def products(words: NDArray[np.int32], column: int = 0) -> NDArray[np.int64]:
    """(n, 8) the digits' sums of at most `_TOGETHER` rows of words, or of parts of rows that begin at a column. This
    thread's next call overwrites them."""
    count, wide = words.shape
    known = digits()[column : column + wide]
    doubles, found, exact = _scratch.words, _scratch.found[:count], _scratch.exact[:count]
    for at in range(0, count, _ROWS):
        part = words[at : at + _ROWS]
        own = doubles[: len(part), :wide]
        own[...] = part
        np.dot(own, known, out=found[at : at + len(part)])
    exact[...] = found
    return exact


def _weigh(sums: list[int], exact: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
    """Add rows of digits, each times its row's key."""
    for lane in range(LANES):
        own = np.dot(keys[lane], exact[:, lane * DIGITS : (lane + 1) * DIGITS])
        sums[lane] += int(np.dot(own, weights()))


def digest_bytes(buffer: Any, runs: Runs) -> Digest:
    """The digest of a buffer's bytes.

    buffer: anything with bytes.
    runs: where the bytes belong. Each byte of the tensor counts as often as a run has it.

    Extra memory: about 4 MiB for each thread, whatever the buffer's size, and as much again that all threads share.
    """
    return digest_sampling(buffer, runs, None, 0)[0]


def digest_sampling(buffer: Any, runs: Runs, sample: Sample | None, nbytes: int) -> tuple[Digest, Digest]:
    """As `digest_bytes`, and also the digest of the bytes that a sample picks, in the same pass. nbytes: of the whole
    tensor."""
    flat = np.frombuffer(buffer, np.uint8) if not isinstance(buffer, np.ndarray) else buffer.view(np.uint8).reshape(-1)
    sums = _RowSums(sample, nbytes)
    ends: list[tuple[int, int, int]] = []
    if len(runs) <= _FEW:
        for source, place, size in zip(runs.sources.tolist(), runs.places.tolist(), runs.sizes.tolist(), strict=True):
            ends += _add_long(sums, flat, source, place, size) if size >= _LONG else [(source, place, size)]
        _add_few(sums, flat, ends)
    else:
        long = runs.sizes >= _LONG
        for k in np.flatnonzero(long).tolist():
            ends += _add_long(sums, flat, int(runs.sources[k]), int(runs.places[k]), int(runs.sizes[k]))
        _add_few(sums, flat, ends)
        rest = _add_alike(sums, flat, runs if not long.any() else runs.take(np.flatnonzero(~long)))
        short = rest.sizes < _SHORT
        if short.any():
            _add_items(sums, flat, rest.take(np.flatnonzero(short)))
        if not short.all():
            _add_padded(sums, flat, rest.take(np.flatnonzero(~short)))
    found = [Digest(first & _MASK, second & _MASK) for first, second in (sums.whole, sums.sampled)]
    return found[0], found[1]


def _add_long(sums: _RowSums, flat: Bytes, source: int, place: int, size: int) -> list[tuple[int, int, int]]:
    """Add the whole rows of a run. Returns its ends, as (source, place, size)."""
    head = -place % ROW
    body = (size - head) // ROW * ROW
    words = flat[source + head : source + head + body].view(np.int32).reshape(-1, COLUMNS)
    for at in range(0, len(words), _TOGETHER):
        sums.add(words[at : at + _TOGETHER], (place + head) // ROW + at)
    return [(source + low, place + low, high - low) for low, high in ((0, head), (head + body, size)) if high > low]


def _add_few(sums: _RowSums, flat: Bytes, runs: list[tuple[int, int, int]]) -> None:
    """Add a few short runs, as (source, place, size). Each is copied into rows of its own with zeros around it."""
    padded, used = _scratch.padded, 0
    numbers: list[int] = []

    def flush() -> None:
        nonlocal used
        words = padded[:used].view(np.int32).reshape(-1, COLUMNS)
        sums.add(words, np.array(numbers, np.int64))
        numbers.clear()
        used = 0

    for source, place, size in runs:
        within, first = place % ROW, place // ROW
        rows = (within + size - 1) // ROW + 1
        if used + rows * ROW > len(padded):
            flush()
        stop = used + rows * ROW
        padded[used : used + within] = 0
        padded[used + within : used + within + size] = flat[source : source + size]
        padded[used + within + size : stop] = 0
        numbers.extend(range(first, first + rows))
        used = stop
    if numbers:
        flush()


def _keys_of(first: int, count: int) -> NDArray[np.int64]:
    """As `row_keys`, kept for the rows that most tensors have."""
    if first + count > _KEPT:
        return row_keys(np.arange(first, first + count))
    return _kept(first + count)[:, first : first + count]


def _kept(count: int) -> NDArray[np.int64]:
    global _keys
    if _keys.shape[1] < count:
        _keys = row_keys(np.arange(min(_KEPT, 1 << (count - 1).bit_length())))
    return _keys


def keys_at(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(2, n) the keys of these rows."""
    highest = int(rows.max()) + 1
    return _kept(highest)[:, rows] if highest <= _KEPT else row_keys(rows)


def _add_alike(sums: _RowSums, flat: Bytes, runs: Runs) -> Runs:
    """Add runs of whole words that lie in one row each, where many are alike: they are multiplied where they are, by
    their columns of the table alone. Returns the others."""
    if len(runs) < _ALIKE:
        return runs
    runs = by_column(runs)
    left = np.ones(len(runs), bool)
    for first, last in stretches(runs):
        place, size, source = int(runs.places[first]), int(runs.sizes[first]), int(runs.sources[first])
        within = place % ROW
        if last - first < _ALIKE or (within | size) % 4 or within + size > ROW:
            continue
        step = int(runs.sources[first + 1]) - source
        words = np.ndarray((last - first, size // 4), np.int32, flat.data, source, (step, 4))
        rows = runs.places[first:last] // ROW
        for at in range(0, len(words), _TOGETHER):
            sums.add(words[at : at + _TOGETHER], rows[at : at + _TOGETHER], within // 4)
        left[first:last] = False
    return runs if left.all() else runs.take(np.flatnonzero(left))


def _add_padded(sums: _RowSums, flat: Bytes, runs: Runs) -> None:
    """Add runs that are copied into rows of their own, with zeros around them, before they are multiplied."""
    padded = _scratch.padded
    for part in padded_batches(runs, _PADDED):
        padded[: part.used * ROW] = 0
        _copy_into_rows(padded, flat, part)
        sums.add(padded[: part.used * ROW].view(np.int32).reshape(-1, COLUMNS), part.numbers)


@dataclass(frozen=True)
class PaddedRuns:
    """Runs and the rows that they are copied into, one after the other.

    rows: how many rows each run takes.
    numbers: (used,) which row of the tensor each of them is.
    used: rows in all.
    """

    runs: Runs
    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]

    @property
    def used(self) -> int:
        return len(self.numbers)

    def stretches(self) -> list[tuple[int, int]]:
        """The runs' `stretches`."""
        return stretches(self.runs)


def stretches(runs: Runs) -> list[tuple[int, int]]:
    """Stretches ``[first, last)`` of runs that have the same size, the same place in their rows and the same distance
    in the buffer, like those of a tensor cut by columns."""
    size, within, step = runs.sizes, runs.places % ROW, np.diff(runs.sources)
    alike = (size[1:] == size[:-1]) & (within[1:] == within[:-1]) & (step > 0)
    begins = np.ones(len(size), bool)
    begins[1:] = ~alike
    begins[2:] |= alike[:-1] & (step[1:] != step[:-1])
    first = np.flatnonzero(begins)
    return list(zip(first.tolist(), [*first[1:].tolist(), len(size)], strict=True))


def by_column(runs: Runs) -> Runs:
    """The runs, those that begin at the same place of their rows one after the other."""
    return runs.take(np.argsort(runs.places % ROW, kind="stable"))


def padded_batches(runs: Runs, most: int) -> Iterator[PaddedRuns]:
    """The runs in batches of at most ``most`` rows. No run may need more."""
    runs = by_column(runs)
    first = runs.places // ROW
    rows = (runs.places + runs.sizes - 1) // ROW - first + 1
    ends = np.cumsum(rows)
    at = 0
    while at < len(runs):
        done = int(ends[at - 1]) if at else 0
        stop = int(np.searchsorted(ends, done + most, "right"))
        counts = rows[at:stop]
        numbers = np.arange(int(ends[stop - 1]) - done) + np.repeat(
            first[at:stop] - (ends[at:stop] - counts - done), counts
        )
        yield PaddedRuns(runs.take(np.arange(at, stop)), counts, numbers)
        at = stop


def _copy_into_rows(padded: Bytes, flat: Bytes, part: PaddedRuns) -> None:
    """Copy each run into its rows, at its place in them. Runs that are alike take one assignment."""
    runs = part.runs
    starts = (np.cumsum(part.rows) - part.rows) * ROW + runs.places % ROW
    listed = list(zip(runs.sources.tolist(), starts.tolist(), runs.sizes.tolist(), strict=True))
    for first, last in part.stretches():
        source, place, size = listed[first]
        if last - first == 1:
            padded[place : place + size] = flat[source : source + size]
            continue
        shape, step = (last - first, size), listed[first + 1][0] - source
        wide = int(part.rows[first]) * ROW
        target = np.ndarray(shape, np.uint8, padded.data, place, (wide, 1))
        target[...] = np.ndarray(shape, np.uint8, flat.data, source, (step, 1))


def _add_items(sums: _RowSums, flat: Bytes, runs: Runs) -> None:
    """Add very short runs word by word, or by halves or quarters of words if they are not whole words."""
    bits = int(np.bitwise_or.reduce(runs.places | runs.sizes))
    width = 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1
    kind: np.dtype[Any] = np.dtype({4: "<i4", 2: "<u2", 1: "u1"}[width])
    # An item may begin at any byte: each of these overlaps the next one.
    items: NDArray[Any] = np.ndarray((len(flat) - width + 1,), kind, flat.data, 0, (1,))
    counts = runs.sizes // width
    ends = np.cumsum(counts)
    at = 0
    while at < len(runs):
        stop = max(int(np.searchsorted(ends, (ends[at - 1] if at else 0) + _ITEMS, "right")), at + 1)
        part = counts[at:stop]
        step = (np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)) * width
        places = np.repeat(runs.places[at:stop], part) + step
        values = items[np.repeat(runs.sources[at:stop], part) + step].astype(np.int64)
        if width < 4:
            values <<= 8 * (places & 3)
            values = values.astype(np.int32).astype(np.int64)  # a word's last byte carries its sign
        words = places >> 2
        sums.items(words >> 8, words & (COLUMNS - 1), values)
        at = stop
