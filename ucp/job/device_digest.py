"""Sums of logical digests on a device, by plain torch operations, in at most 64 MiB of its memory.

A device waits longer for an operation to be requested than it takes for a small one. So whole rows of many tensors are
copied one after the other into one memory, with one operation for each tensor, and multiplied together. What remains is
done for about 100 MiB of rows at once. Runs that are too short for that are put together, too, and added word by word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ucp.geometry import Ints
from ucp.job.device_products import ByteProducts, DoubleProducts, column_keys, has_byte_products, keys_at, keys_of
from ucp.logical.digest import COLUMNS, LANES, ROW, padded_batches
from ucp.logical.runs import Run, Runs

PIECE = 16 << 20
"""How many bytes of a tensor are converted or copied at once."""

LONG = 64 << 10
"""Runs of at least this many bytes are multiplied where they lie."""

# Runs of at least this many bytes get rows of their own, if there are many alike.
_SHORT = 128
# How many words of short runs are added at once, over all tensors.
_ITEMS = 1 << 18
# Up to so many tensors the sums of rows are made one by one.
_FEW = 3


class DeviceSums:
    """The sums of several tensors of a device, which is asked for them once, at the end."""

    def __init__(self, device: torch.device, count: int, *, by_bytes: bool | None = None) -> None:
        self._device = device
        self._sums = torch.zeros((count, LANES), dtype=torch.int64, device=device)
        self._runs: list[tuple[int, torch.Tensor, Runs]] = []
        self._single: list[tuple[int, torch.Tensor, int, int]] = []
        self._held = 0  # bytes of these two
        chosen = has_byte_products(device) if by_bytes is None else by_bytes
        self._products: ByteProducts | DoubleProducts = (ByteProducts if chosen else DoubleProducts)(device)
        self._segments: list[tuple[int, int | Ints, int]] = []
        self._rows = 0  # that are held in ``_products``

    def add(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Bytes of one of them, and where they belong."""
        long = runs.sizes >= LONG
        for k in np.flatnonzero(long).tolist():
            self.add_run(index, raw, int(runs.sources[k]), int(runs.places[k]), int(runs.sizes[k]))
        rest = runs.take(np.flatnonzero(~long))
        if not len(rest):
            return
        padded = rest.sizes >= _SHORT
        if padded.sum() >= 64:
            self._add_padded(index, raw, rest.take(np.flatnonzero(padded)))
            rest = rest.take(np.flatnonzero(~padded))
        if len(rest):
            self._add_later(index, raw, rest)

    def add_run(self, index: int, raw: torch.Tensor, source: int, place: int, size: int) -> None:
        """As `add`, of one run."""
        if size < LONG:
            self._add_single(index, raw[source : source + size], place, size)
            return
        head = -place % ROW
        body = (size - head) // ROW * ROW
        self._add_rows(index, raw[source + head : source + head + body], (place + head) // ROW)
        for low, high in ((0, head), (head + body, size)):
            if high > low:
                self._add_single(index, raw[source + low : source + high], place + low, high - low)

    def add_alike(self, owners: Ints, tensors: Sequence[torch.Tensor], runs: Sequence[Run]) -> None:
        """As `add`, of contiguous tensors that are cut alike. owners: (n,) which of them each is. runs: of each."""
        for index, tensor in zip(owners.tolist(), tensors, strict=True):
            raw = tensor.detach().reshape(-1).view(torch.uint8)
            for run in runs:
                self.add_run(index, raw, *run)

    def finish(self) -> NDArray[np.uint64]:
        """(count, 2) both lanes of the tensors' digests."""
        self._flush()
        self._flush_rows()
        return self._sums.cpu().numpy().view(np.uint64)

    # --- whole rows ---

    def _add_rows(self, index: int, raw: torch.Tensor, first: int | Ints) -> None:
        """Whole rows; first: the number of the first one, if they follow one another, or the number of each."""
        if raw.data_ptr() % 4 or raw.storage_offset() % 4:
            raw = raw.clone()
        words = raw.view(torch.int32).view(-1, COLUMNS)
        at = 0
        while at < len(words):
            count = self._products.take(words[at:])
            self._note(index, first + at if isinstance(first, int) else first[at : at + count], count)
            at += count
            if not self._products.room:
                self._flush_rows()

    def _note(self, index: int, numbers: int | Ints, count: int) -> None:
        """Remember whose the next rows are."""
        self._rows += count
        if self._segments and isinstance(numbers, int):
            owner, before, held = self._segments[-1]
            if owner == index and isinstance(before, int) and before + held == numbers:
                self._segments[-1] = (owner, before, held + count)
                return
        self._segments.append((index, numbers, count))

    def _flush_rows(self) -> None:
        """Add the rows whose products are kept."""
        if not self._rows:
            return
        sums = (self._keys() * self._products.values().t()).contiguous()
        if len(self._segments) <= _FEW:
            at = 0
            for index, _, count in self._segments:
                self._sums[index] += sums[:, at : at + count].sum(1)
                at += count
        else:
            # The sum over each segment is the difference of two sums over all rows before. Both lanes are one row here,
            # since a device adds up one long row well, and several of them not.
            counts = np.array([count for _, _, count in self._segments])
            last = np.cumsum(counts) - 1
            lanes = np.arange(LANES)[:, None] * self._rows
            table = np.concatenate([(last + lanes).reshape(-1), (last - counts + lanes).reshape(-1)])
            owners = np.array([index for index, _, _ in self._segments])
            ends = self._sent(np.concatenate([table, owners]))
            running = torch.cumsum(sums.view(-1), 0)
            before = ends[LANES * len(last) : 2 * LANES * len(last)]
            found = running[ends[: LANES * len(last)]] - torch.where(before < 0, 0, running[before.clamp(min=0)])
            self._sums.index_add_(0, ends[2 * LANES * len(last) :], found.view(LANES, -1).t())
        self._segments.clear()
        self._rows = 0

    def _keys(self) -> torch.Tensor:
        """(2, rows) the keys of the rows that are kept."""
        follow = [(numbers, count) for _, numbers, count in self._segments if isinstance(numbers, int)]
        if len(follow) == len(self._segments) <= 4 * _FEW:
            parts = [keys_of(self._device, first, count) for first, count in follow]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        numbers = [
            np.arange(numbers, numbers + count) if isinstance(numbers, int) else numbers
            for _, numbers, count in self._segments
        ]
        return keys_at(self._device, np.concatenate(numbers))

    def _sent(self, table: Ints) -> torch.Tensor:
        return torch.from_numpy(table).to(self._device)

    def _add_padded(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Runs alike are copied into rows of their own, all at once."""
        for part in padded_batches(runs, PIECE // ROW):
            stretches = part.stretches()
            if 16 * len(stretches) > len(part.runs):
                self._add_later(index, raw, part.runs)
                continue
            padded = torch.zeros(part.used * ROW, dtype=torch.uint8, device=self._device)
            starts = (np.cumsum(part.rows) - part.rows) * ROW + part.runs.places % ROW
            for first, last in stretches:
                size, source, wide = (
                    int(part.runs.sizes[first]),
                    int(part.runs.sources[first]),
                    int(part.rows[first]) * ROW,
                )
                step = int(part.runs.sources[first + 1]) - source if last - first > 1 else size
                shape = (last - first, size)
                target = padded.as_strided(shape, (wide, 1), int(starts[first]))
                target.copy_(raw.as_strided(shape, (step, 1), raw.storage_offset() + source))
            self._add_rows(index, padded, part.numbers)

    # --- short runs ---

    def _add_single(self, index: int, piece: torch.Tensor, place: int, size: int) -> None:
        """One short run, which is the whole piece."""
        if self._held + size > _ITEMS:
            self._flush()
        self._single.append((index, piece, place, size))
        self._held += size

    def _add_later(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Short runs, which are put together with those of other tensors."""
        ends = np.cumsum(runs.sizes)
        at = 0
        while at < len(runs):
            room = _ITEMS - self._held
            stop = int(np.searchsorted(ends, (int(ends[at - 1]) if at else 0) + room, "right"))
            if stop == at and self._held:
                self._flush()
                continue
            stop = max(stop, at + 1)
            part = runs.take(np.arange(at, stop))
            low, high = int(part.sources.min()), int((part.sources + part.sizes).max())
            if high - low > 4 * int(part.sizes.sum()) and high - low > PIECE:
                self._flush()
            self._runs.append((index, raw[low:high], Runs(part.sources - low, part.places, part.sizes)))
            self._held += int(part.sizes.sum())
            if self._held >= _ITEMS or high - low > PIECE // 2:
                self._flush()
            at = stop

    def _flush(self) -> None:
        """Add what was put together, byte by byte where it is odd, else by halves or whole words."""
        raw, owners, runs = self._together()
        if not len(runs):
            return
        bits = int(np.bitwise_or.reduce(runs.places | runs.sizes | runs.sources))
        width = 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1
        counts = runs.sizes // width
        # Of each item: which run, and its number in it.
        n = int(counts.sum())
        table = self._sent(
            np.stack([runs.places, runs.sources // width, owners, np.cumsum(counts) - counts, counts]),
        )
        which = torch.repeat_interleave(table[4], output_size=n)
        number = torch.arange(n, device=self._device) - table[3, which]
        values = _items(raw, width)[table[1, which] + number].to(torch.int64)
        places = table[0, which] + number * width
        if width < 4:
            values = (values & ((1 << 8 * width) - 1)) << 8 * (places & 3)
            values = values.to(torch.int32).to(torch.int64)  # a word's last byte carries its sign
        words = places >> 2
        keys = keys_at(self._device, words >> 8)
        keys *= column_keys(self._device)[:, words & (COLUMNS - 1)]
        keys *= values
        self._sums.index_add_(0, table[2, which], keys.t())

    def _together(self) -> tuple[torch.Tensor, Ints, Runs]:
        """All short runs in one memory, with whose each is; then there are none any more."""
        pieces = [piece for _, piece, _, _ in self._single] + [raw for _, raw, _ in self._runs]
        raw = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)
        single = np.array([(index, place, size) for index, _, place, size in self._single], np.int64).reshape(-1, 3)
        ends = np.cumsum(single[:, 2])
        shifts = np.cumsum([ends[-1] if len(ends) else 0, *(len(piece) for _, piece, _ in self._runs)])
        runs = Runs(
            np.concatenate(
                [ends - single[:, 2], *(r.sources + at for (_, _, r), at in zip(self._runs, shifts, strict=False))]
            ),
            np.concatenate([single[:, 1], *(r.places for _, _, r in self._runs)]),
            np.concatenate([single[:, 2], *(r.sizes for _, _, r in self._runs)]),
        )
        owners = np.concatenate([single[:, 0], *(np.full(len(r), index) for index, _, r in self._runs)])
        self._single.clear()
        self._runs.clear()
        self._held = 0
        return raw, owners, runs


def _items(raw: torch.Tensor, width: int) -> torch.Tensor:
    if width == 1:
        return raw
    return raw[: len(raw) // width * width].view(torch.int32 if width == 4 else torch.int16)
