"""Logical digests of live tensors on any device: one pass, nothing gathered, at most 64 MiB of memory.

In host memory `ucp.logical.digest` reads them where they are, with several threads. On a device the same sums are made
by plain torch operations: products of matrices of doubles, exact as there. Both are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from ucp.geometry import Blocks, Ints, Shape, numel
from ucp.job.float_types import converted
from ucp.logical import digest
from ucp.logical.batch import Batch
from ucp.logical.digest import COLUMNS, DIGIT_BITS, DIGITS, LANES, ROW, Digest, digest_bytes, padded_batches
from ucp.logical.runs import Run, Runs, Sample, few_runs, runs_of, within_buffer
from ucp.storage.dtypes import itemsize, to_torch

# How many bytes of a tensor one thread, or the device, takes at once.
PIECE = 16 << 20
# In host memory: tensors of fewer bytes are digested together.
_TOGETHER = 2 << 20
# On a device: runs of at least this many bytes are multiplied where they lie.
_LONG = 256 << 10
# On a device: runs of at least this many bytes get rows of their own.
_SHORT = 128
# On a device: how many words of short runs are added at once, over all tensors.
_ITEMS = 1 << 19
# On a device: how many rows are multiplied at once (44 MiB as doubles), and of how many the products are kept (6 MiB),
# in three turns. There are few operations, since a device waits longer for one to be requested than it takes.
_ROWS_AT_ONCE, _ROWS_KEPT = 22 << 10, 64 << 10
# How many row keys are kept on a device (16 MiB).
_KEPT = 1 << 20


@dataclass(frozen=True, eq=False)
class LiveElements:
    """Elements of a logical tensor in memory, on any device.

    tensor: the memory, read as one flat row-major buffer. blocks: which elements of the logical tensor of this shape
    these are, and where they lie in it, in elements. dtype: convert the elements into this type first
    (`ucp.storage.dtypes`); None: digest them as they are. back: then convert them back into their own type, to see
    whether the other type holds them exactly. rounded: convert as a copy does, with rounding. one_nan: give all NaNs
    the same bits, since the bits of a rounded NaN depend on how torch rounded it.
    """

    tensor: torch.Tensor
    shape: Shape
    blocks: Blocks
    dtype: str | None = None
    back: bool = False
    rounded: bool = False
    one_nan: bool = False

    @property
    def width(self) -> int:
        """Bytes of an element that is digested."""
        return self.tensor.element_size() if self.dtype is None or self.back else itemsize(self.dtype)

    @cached_property
    def elements(self) -> int:
        return int(self.blocks.counts.sum())

    @property
    def nbytes(self) -> int:
        return self.elements * self.width


@torch.no_grad()
def digests(lives: Sequence[LiveElements], *, sample: Sample | None = None, threads: int = 1) -> list[Digest]:
    """The digest of each. sample: of the blocks that it picks alone. threads: for those in host memory.

    A tensor that is not contiguous is copied.
    """
    out: list[Digest] = [Digest()] * len(lives)
    by_device: dict[torch.device, list[int]] = {}
    for k, live in enumerate(lives):
        if len(live.blocks):
            by_device.setdefault(live.tensor.device, []).append(k)
    for device, members in by_device.items():
        work = _on_host if device.type in ("cpu", "mps") else on_device
        for k, found in zip(members, work([lives[k] for k in members], sample, threads), strict=True):
            out[k] = found
    return out


def _windows(live: LiveElements, sample: Sample | None, most: int) -> Iterator[tuple[torch.Tensor, Runs]]:
    """The tensor's memory in pieces of bytes, and the runs in each. A piece has at most about ``most`` bytes, since it
    may be converted, or copied from a device."""
    flat = live.tensor.detach().reshape(-1)
    nbytes = numel(live.shape) * live.width
    for every in runs_of(live.shape, live.blocks, live.width):
        found = every if sample is None else sample.of(every, nbytes)
        if not len(found):
            continue
        first, last = int(found.sources.min()), int((found.sources + found.sizes).max())
        step = most // ROW * ROW
        for low in range(first // live.width * live.width, last, step):
            part = within_buffer(found, low, min(low + step, last))
            if len(part):
                # Only the part with the runs, since most of a sampled tensor need not be read.
                begin = int(part.sources.min()) // live.width * live.width
                end = int((part.sources + part.sizes).max())
                piece = flat[(low + begin) // live.width : -(-(low + end) // live.width)]
                yield _bits(piece, live), Runs(part.sources - begin, part.places, part.sizes)


def _bits(piece: torch.Tensor, live: LiveElements) -> torch.Tensor:
    """The elements' bytes, converted first where a type is given. Elements that lie apart are put together."""
    piece = piece.contiguous()
    if live.dtype is not None:
        kind = to_torch(live.dtype)
        there = piece.to(kind) if live.rounded else converted(piece, kind)
        piece = converted(there, piece.dtype) if live.back else there
    if live.one_nan:
        piece = torch.where(piece.isnan(), torch.full_like(piece, torch.nan), piece)
    return piece.view(torch.uint8)


def _listed(live: LiveElements, sample: Sample | None) -> list[Run] | None:
    """The runs to digest, if they are few and lie in the tensor's memory as they are digested; else None."""
    if live.dtype is not None or live.one_nan or not live.tensor.is_contiguous():
        return None
    found = few_runs(live.shape, live.blocks, live.width)
    return found if found is None or sample is None else sample.cut(found, numel(live.shape) * live.width)


def _on_host(lives: Sequence[LiveElements], sample: Sample | None, threads: int) -> list[Digest]:
    """Digest tensors with little to read together in this thread, and the others in pieces by all threads."""
    batch, large = Batch(len(lives)), []
    for k, live in enumerate(lives):
        listed = _listed(live, sample)
        if listed is not None and sum(size for _, _, size in listed) < _TOGETHER:
            batch.add(k, live.tensor.detach().reshape(-1).view(torch.uint8).numpy(), listed)
        else:
            large.append(k)
    out = batch.finish()
    for k, found in zip(large, _piecewise([lives[k] for k in large], sample, threads), strict=True):
        out[k] = found
    return out


def _piecewise(lives: Sequence[LiveElements], sample: Sample | None, threads: int) -> list[Digest]:
    def work(job: tuple[int, torch.Tensor, Runs]) -> tuple[int, Digest]:
        k, raw, runs = job
        return k, digest_bytes(raw.cpu().numpy(), runs)

    jobs = ((k, raw, runs) for k, live in enumerate(lives) for raw, runs in _windows(live, sample, PIECE))
    out = [Digest()] * len(lives)
    if threads <= 1 or sum(live.nbytes for live in lives) < PIECE:
        for k, found in map(work, jobs):
            out[k] += found
        return out
    with ThreadPoolExecutor(threads, "ucp-digest") as pool:
        # A bounded number at a time: what is converted takes memory.
        for batch in _batched(jobs, 2 * threads):
            for k, found in pool.map(work, batch):
                out[k] += found
    return out


def _batched(
    jobs: Iterator[tuple[int, torch.Tensor, Runs]], count: int
) -> Iterator[list[tuple[int, torch.Tensor, Runs]]]:
    batch = []
    for job in jobs:
        batch.append(job)
        if len(batch) == count:
            yield batch
            batch = []
    yield batch


# --- on a device -----------------------------------------------------------------------------------------------------


def on_device(lives: Sequence[LiveElements], sample: Sample | None = None, threads: int = 1) -> list[Digest]:
    """As `digests`, of tensors of one device, by torch's operations; works for those in host memory, too."""
    sums = _Sums(lives[0].tensor.device, len(lives))
    for k, live in enumerate(lives):
        listed = _listed(live, sample)
        if listed is not None:
            raw = live.tensor.detach().reshape(-1).view(torch.uint8)
            if all(size >= _LONG for _, _, size in listed):
                for run in listed:
                    sums.add_long(k, raw, *run)
            elif listed:
                sums.add(k, raw, Runs(*np.array(listed, np.int64).T))
            continue
        for raw, runs in _windows(live, sample, PIECE):
            sums.add(k, raw, runs)
    return sums.finish()


class _Sums:
    """The sums of several tensors of a device, which is asked for them once, at the end."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        self._sums = torch.zeros((count, LANES), dtype=torch.int64, device=device)
        self._pending: list[tuple[int, torch.Tensor, Runs]] = []
        self._held = 0
        self._doubles = torch.empty((_ROWS_AT_ONCE, COLUMNS), dtype=torch.float64, device=device)
        self._exact = torch.empty((_ROWS_KEPT, LANES * DIGITS), dtype=torch.float64, device=device)
        self._segments: list[tuple[int, int | Ints, int]] = []
        self._rows = 0  # of ``_exact`` that are in use

    def add(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Bytes of one of them, and where they belong."""
        long = runs.sizes >= _LONG
        for k in np.flatnonzero(long).tolist():
            self.add_long(index, raw, int(runs.sources[k]), int(runs.places[k]), int(runs.sizes[k]))
        rest = runs.take(np.flatnonzero(~long))
        if not len(rest):
            return
        padded = rest.sizes >= _SHORT
        if padded.sum() >= 64:
            self._add_padded(index, raw, rest.take(np.flatnonzero(padded)))
            rest = rest.take(np.flatnonzero(~padded))
        if len(rest):
            self._add_later(index, raw, rest)

    def finish(self) -> list[Digest]:
        self._flush()
        self._flush_rows()
        found = self._sums.cpu().numpy().view(np.uint64).tolist()
        return [Digest(first, second) for first, second in found]

    def add_long(self, index: int, raw: torch.Tensor, source: int, place: int, size: int) -> None:
        head = -place % ROW
        body = (size - head) // ROW * ROW
        whole = raw[source + head : source + head + body]
        self._add_rows(index, whole, (place + head) // ROW)
        for low, high in ((0, head), (head + body, size)):
            if high > low:
                piece = raw[source + low : source + high]
                self._add_later(index, piece, _run(place + low, high - low))

    def _add_rows(self, index: int, raw: torch.Tensor, first: int | Ints) -> None:
        """Whole rows; first: the number of the first one, if they follow one another, or the number of each.

        Each piece takes two operations, a conversion and a product; what is left is done for many rows at once, since a
        device waits longer for an operation to be asked for than it takes for such a piece.
        """
        if raw.data_ptr() % 4 or raw.storage_offset() % 4:
            raw = raw.clone()
        words = raw.view(torch.int32).view(-1, COLUMNS)
        at = 0
        while at < len(words):
            count = min(len(words) - at, _ROWS_AT_ONCE, _ROWS_KEPT - self._rows)
            self._doubles[:count].copy_(words[at : at + count])
            exact = self._exact[self._rows : self._rows + count]
            torch.mm(self._doubles[:count], _digits(self._device), out=exact)
            numbers = first + at if isinstance(first, int) else first[at : at + count]
            self._note(index, numbers, count)
            at += count
            if self._rows == _ROWS_KEPT:
                self._flush_rows()

    def _note(self, index: int, numbers: int | Ints, count: int) -> None:
        """Remember whose the next rows are."""
        if self._segments and isinstance(numbers, int):
            owner, before, held = self._segments[-1]
            if owner == index and isinstance(before, int) and before + held == numbers:
                self._segments[-1] = (owner, before, held + count)
                self._rows += count
                return
        self._segments.append((index, numbers, count))
        self._rows += count

    def _flush_rows(self) -> None:
        """Add the rows whose exact products are kept."""
        if not self._rows:
            return
        exact = self._exact[: self._rows].to(torch.int64).view(-1, LANES, DIGITS)
        rows = (exact * _weights(self._device)).sum(2)
        at = 0
        for index, numbers, count in self._segments:
            if isinstance(numbers, int):
                keys = _keys_of(self._device, numbers, count)
            else:
                keys = _keys_at(self._device, numbers)
            self._sums[index] += (rows[at : at + count] * keys.t()).sum(0)
            at += count
        self._segments.clear()
        self._rows = 0

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

    def _add_later(self, index: int, raw: torch.Tensor, runs: Runs) -> None:
        """Short runs, which are put together with those of other tensors: a device works on many at once."""
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
            self._pending.append((index, raw[low:high], Runs(part.sources - low, part.places, part.sizes)))
            self._held += int(part.sizes.sum())
            if self._held >= _ITEMS or high - low > PIECE // 2:
                self._flush()
            at = stop

    def _flush(self) -> None:
        """Add what was put together, byte by byte where it is odd, else by halves or whole words."""
        if not self._pending:
            return
        pieces = [raw for _, raw, _ in self._pending]
        raw = pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces)
        shifts = np.cumsum([0, *(len(piece) for piece in pieces)])
        runs = Runs(
            np.concatenate([r.sources + shift for (_, _, r), shift in zip(self._pending, shifts, strict=False)]),
            np.concatenate([r.places for _, _, r in self._pending]),
            np.concatenate([r.sizes for _, _, r in self._pending]),
        )
        owners = np.repeat([index for index, _, _ in self._pending], [len(r) for _, _, r in self._pending])
        bits = int(np.bitwise_or.reduce(runs.places | runs.sizes | runs.sources))
        width = 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1
        counts = runs.sizes // width
        # Of each item: which run, and its number in it.
        n = int(counts.sum())
        columns = np.stack([runs.places, runs.sources // width, owners, np.cumsum(counts) - counts])
        table = torch.from_numpy(columns).to(self._device)
        which = torch.repeat_interleave(torch.from_numpy(counts).to(self._device), output_size=n)
        number = torch.arange(n, device=self._device) - table[3, which]
        values = _items(raw, width)[table[1, which] + number].to(torch.int64)
        places = table[0, which] + number * width
        if width < 4:
            values = (values & ((1 << 8 * width) - 1)) << 8 * (places & 3)
            values = values.to(torch.int32).to(torch.int64)  # a word's last byte carries its sign
        words = places >> 2
        keys = _keys_at(self._device, words >> 8)
        keys *= _table(self._device)[:, words & (COLUMNS - 1)]
        keys *= values
        self._sums.index_add_(0, table[2, which], keys.t())
        self._pending.clear()
        self._held = 0


def _items(raw: torch.Tensor, width: int) -> torch.Tensor:
    if width == 1:
        return raw
    return raw[: len(raw) // width * width].view(torch.int32 if width == 4 else torch.int16)


def _run(place: int, size: int) -> Runs:
    return Runs(*(np.array([n], np.int64) for n in (0, place, size)))


@lru_cache(16)
def _digits(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(digest.digits()).to(device)


@lru_cache(16)
def _weights(device: torch.device) -> torch.Tensor:
    return torch.tensor([1 << DIGIT_BITS * k for k in range(DIGITS)], device=device)


@lru_cache(16)
def _table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(digest.table()).to(device)


_keys: dict[torch.device, torch.Tensor] = {}


def _keys_of(device: torch.device, first: int, count: int) -> torch.Tensor:
    """(2, count) the keys of rows from ``first`` on."""
    if first + count > _KEPT:
        return _row_keys(torch.arange(first, first + count, device=device))
    return _kept(device, first + count)[:, first : first + count]


def _keys_at(device: torch.device, rows: torch.Tensor | Ints) -> torch.Tensor:
    """(2, n) the keys of these rows."""
    if isinstance(rows, np.ndarray):
        highest, rows = int(rows.max()), torch.from_numpy(rows).to(device)
        if highest < _KEPT:
            return _kept(device, highest + 1)[:, rows]
    return _row_keys(rows)


def _kept(device: torch.device, count: int) -> torch.Tensor:
    found = _keys.get(device)
    if found is None or found.shape[1] < count:
        step = 1 << 16
        wanted = min(_KEPT, max(step, 1 << (count - 1).bit_length()))
        found = torch.empty((LANES, wanted), dtype=torch.int64, device=device)
        for at in range(0, wanted, step):
            found[:, at : at + step] = _row_keys(torch.arange(at, at + step, device=device))
        _keys[device] = found
    return found


def _row_keys(rows: torch.Tensor) -> torch.Tensor:
    """`ucp.logical.digest.row_keys` in torch, whose 64-bit words have a sign."""
    z = rows * LANES + torch.arange(LANES, device=rows.device)[:, None]
    z = z + (digest.KEY_SEED + 1)
    z = z * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << 64 - shift) - 1))) * _signed(factor)
    return (z ^ ((z >> 31) & ((1 << 33) - 1))) | 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
