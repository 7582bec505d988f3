"""The digests of many buffers with few bytes each: their rows are multiplied and added up together.

Calling for a product of matrices takes as long as multiplying a row of 1 KiB. So tensors of a few KiB, and the blocks
that a sample picks, are copied one after the other into one memory. Nothing but that copy is done for each of them, and
of whole tensors not even that: many are given in one memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ucp.geometry import Ints
from ucp.logical import digest
from ucp.logical.digest import COLUMNS, DIGITS, LANES, ROW, Bytes, Digest
from ucp.logical.runs import Run

_ROWS = 1024


def lanes_of(digests: Sequence[Digest]) -> NDArray[np.uint64]:
    """(n, 2) both lanes of each."""
    return np.fromiter(chain.from_iterable(digests), np.uint64, 2 * len(digests)).reshape(-1, 2)


class Batch:
    """The sums of ``count`` tensors whose digests are wanted only at the end. Extra memory: about 2 MiB."""

    def __init__(self, count: int) -> None:
        self._sums = np.zeros((LANES, count), np.int64)
        self._rows = np.empty((_ROWS, ROW), np.uint8)
        self._flat = self._rows.reshape(-1)
        self._used = 0
        self._parts: list[tuple[int, int, int]] = []  # whose, the number of the first row, rows

    def add(self, index: int, flat: Bytes, runs: Iterable[Run]) -> None:
        """Add bytes of one of the tensors. runs: where they belong."""
        for source, place, size in runs:
            if place % ROW == size % ROW == 0 and self._used * ROW + size <= len(self._flat):  # nothing to fill up
                low, rows = self._used * ROW, size // ROW
                self._flat[low : low + size] = flat[source : source + size]
                self._used += rows
                self._parts.append((index, place // ROW, rows))
                continue
            at, stop = source, source + size
            while at < stop:
                if self._used == _ROWS:
                    self._flush()
                within, first = (place + at - source) % ROW, (place + at - source) // ROW
                take = min(stop - at, (_ROWS - self._used) * ROW - within)
                rows = -(-(within + take) // ROW)
                low = self._used * ROW
                end = low + within + take
                if within:
                    self._flat[low : low + within] = 0
                self._flat[low + within : end] = flat[at : at + take]
                self._used += rows
                if end < self._used * ROW:
                    self._flat[end : self._used * ROW] = 0
                self._parts.append((index, first, rows))
                at += take

    def add_rows(self, owners: Ints, count: int, rows: Bytes) -> None:
        """Add whole rows of several tensors, each from its first row on, which lie one after the other in memory.

        owners: the tensors' numbers. count: how many rows each has. rows: at most 4 MiB.
        """
        self._add(owners, np.zeros(len(owners), np.int64), np.full(len(owners), count), rows.reshape(-1, ROW))

    def finish(self) -> NDArray[np.uint64]:
        """(count, 2) both lanes of the tensors' digests."""
        self._flush()
        return self._sums.T.view(np.uint64)

    def _flush(self) -> None:
        if self._parts:
            owners, firsts, counts = np.array(self._parts, np.int64).T
            self._add(owners, firsts, counts, self._rows[: self._used])
            self._parts.clear()
            self._used = 0

    def _add(self, owners: Ints, firsts: Ints, counts: Ints, rows: Bytes) -> None:
        begins = np.cumsum(counts) - counts
        numbers = np.repeat(firsts - begins, counts) + np.arange(len(rows))
        exact = digest.products(rows.view(np.int32).reshape(-1, COLUMNS))
        keys = digest.keys_at(numbers)
        for lane in range(LANES):
            own = np.dot(exact[:, lane * DIGITS : (lane + 1) * DIGITS], digest.weights()) * keys[lane]
            np.add.at(self._sums[lane], owners, np.add.reduceat(own, begins))
