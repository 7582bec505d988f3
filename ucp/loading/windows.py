"""Bring what lies on a device through a few windows of pinned host memory, while the next window is read.

All buffers on one device are laid out behind one another in one imagined file, which is cut into windows. Threads fill
windows from the checkpoint. One more sends each full window to the device, on a stream of its own, and the window is
filled again once that copy is done. A window that holds several small tensors is copied to the device once and spread
out there.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ucp import limits
from ucp.job.stopwatch import Stopwatch
from ucp.storage.digests import CHUNK
from ucp.transfer.copies import Copy, CopyTable
from ucp.transfer.gather import Run, runs, serve
from ucp.transfer.reader import Cache, Reader
from ucp.transfer.windows import MARGIN, cut_at_windows


@dataclass(frozen=True, eq=False)
class Place:
    """A buffer on a device. buffer: its number. live: its bytes. keeps: what no copy fills stays as it is, and is zero
    otherwise. copies: into it, in bytes from its beginning."""

    buffer: int
    live: torch.Tensor
    keeps: bool
    copies: Sequence[Copy]


class _Segment(NamedTuple):
    """A part of a place that lies in a window. at: its first byte in the window. live: its bytes."""

    at: int
    live: torch.Tensor
    keeps: bool


@dataclass(frozen=True, eq=False)
class _Window:
    """reads: into a buffer of this index, with a margin, the window's bytes, of which there are ``size``, and a margin.
    segments: in their order. is_filled: whether the reads overwrite all of its bytes, so that old ones need no
    clearing."""

    index: int
    reads: Sequence[Run]
    segments: Sequence[_Segment]
    size: int
    is_filled: bool

    def parts_of(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Each segment's bytes in the window's memory."""
        cuts = [0]
        for segment in self.segments:
            cuts += (segment.at, segment.at + len(segment.live))
        sizes = [high - low for low, high in pairwise(cuts)]
        return list(memory[: cuts[-1]].split_with_sizes(sizes))[1::2]


def through_windows(reader: Reader, places: Sequence[Place], threads: int, memory: int, watch: Stopwatch) -> None:
    """Fill the places. Raises what reading raises; then some are filled and some are not.

    threads: that read. memory: bytes of host memory that the load may take; windows have at most half of it.
    """
    size = window_bytes(memory, threads)
    by_device: defaultdict[torch.device, list[Place]] = defaultdict(list)
    for place in places:
        by_device[place.live.device].append(place)
    for device, here in by_device.items():
        _Passing(reader, _Ring(device, size, watch), list(_windows(here, size))).run(threads)
    reader.records.settle()


def window_bytes(memory: int, threads: int) -> int:
    """The size of windows of which a load with so many bytes of memory can have enough: whole chunks, and with their
    margins a power of two, since torch's pinned memory comes in those."""
    count = _fillers(threads) + limits.LOAD_WINDOWS_AHEAD_COUNT
    room = 1 << (memory // 2 // count).bit_length() - 1
    return min(limits.LOAD_WINDOW_BYTES, max(room - CHUNK, CHUNK))


def _fillers(threads: int) -> int:
    return max(min(threads, limits.LOAD_FILLING_THREADS_COUNT), 1)


def _windows(places: Sequence[Place], size: int) -> Iterator[_Window]:
    """The windows that fill these places, in their order."""
    segments: defaultdict[int, list[_Segment]] = defaultdict(list)
    ends: dict[int, int] = {}
    begins: list[int] = []
    at = 0
    for place in places:
        nbytes = len(place.live)
        at = -(-at // limits.WINDOW_ALIGNMENT_BYTES) * limits.WINDOW_ALIGNMENT_BYTES
        if nbytes > size - at % size:
            at = -(-at // size) * size + _phase(place)
        begins.append(at)
        for index in range(at // size, -(-(at + nbytes) // size)):
            low, high = max(index * size, at), min((index + 1) * size, at + nbytes)
            live = place.live if high - low == nbytes else place.live[low - at : high - at]
            segments[index].append(_Segment(low - index * size, live, place.keeps))
            ends[index] = high - index * size
        at += nbytes
    copies = _copies_by_window([CopyTable.of(place.copies) for place in places], begins, size)
    # All that has to be worked out is, for all windows together: threads that fill them would wait for one another.
    reads, firsts = runs(copies, apart=True)
    filled = _filled(copies, ends)
    of = copies.buffer[firsts]
    indices = sorted(segments)
    lows, highs = np.searchsorted(of, indices).tolist(), np.searchsorted(of, indices, "right").tolist()
    for index, low, high in zip(indices, lows, highs, strict=True):
        yield _Window(index, reads[low:high], segments[index], ends[index], filled[index])


def _copies_by_window(tables: Sequence[CopyTable], begins: Sequence[int], size: int) -> CopyTable:
    """The copies into places that begin at these bytes of all windows together, cut where windows meet, each into the
    window that it is in, ascending. In a window they are in the order of the files."""
    table = CopyTable.joined(tables)
    to = table.to + np.repeat(np.array(begins, np.int64), [len(one) for one in tables])
    last, is_plain = to + table.extents - 1, table.is_plain
    whole = to // size == last // size
    apart = table.into(np.zeros(len(table), np.int64), to)
    plain = _cut_bytes(apart[~whole & is_plain], size)
    odd = [found for copy in apart[~whole & ~is_plain] for found in cut_at_windows(copy, size)]
    copies = CopyTable.joined([apart[whole], plain, CopyTable.of(piece for _, piece in odd)])
    window = copies.to // size
    # An element on a boundary is in the pieces of both windows.
    window[len(window) - len(odd) :] = [index for index, _ in odd]
    order = np.lexsort((copies.at, copies.file, window))
    return copies.into(window, copies.to - window * size + MARGIN)[order]


def _cut_bytes(copies: CopyTable, size: int) -> CopyTable:
    """Copies of plain bytes, cut where windows of this size meet."""
    end = copies.to + copies.nbytes
    first = copies.to // size
    count = (end - 1) // size - first + 1
    of = np.repeat(np.arange(len(copies)), count)
    window = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count) + first[of]
    low, high = np.maximum(window * size, copies.to[of]), np.minimum((window + 1) * size, end[of])
    at = copies.at[of] + low - copies.to[of]
    return CopyTable.plain(copies.file[of], at, copies.buffer[of], low, high - low)


def _filled(copies: CopyTable, ends: Mapping[int, int]) -> NDArray[np.bool_]:
    """By index, whether copies overwrite all bytes of a window. ends: how many each has."""
    count = max(ends, default=-1) + 1
    size = np.zeros(count, np.int64)
    size[list(ends)] = list(ends.values())
    window, low, nbytes = copies.buffer, copies.to - MARGIN, copies.target_nbytes
    out = np.bincount(window, nbytes, count).astype(np.int64) == size
    out[window[(low < 0) | (low + nbytes > size[window])]] = False
    return out


def _phase(place: Place) -> int:
    """How far from a window's beginning the place should lie, so that windows end where chunks of its file end. Chunks
    that lie in two windows are read twice."""
    table = CopyTable.of(place.copies)
    first = int(np.argmin(table.to)) if len(table) else None
    phase = 0 if first is None else int(table.at[first] - table.to[first]) % CHUNK
    return phase if phase % limits.WINDOW_ALIGNMENT_BYTES == 0 else 0


class _Passing:
    """Threads fill the windows, in their order, and this one sends them to the device.

    After an error no further window is begun. One thread alone sends: several would wait for one another.
    """

    def __init__(self, reader: Reader, ring: _Ring, windows: Sequence[_Window]) -> None:
        self._reader = reader
        self._ring = ring
        self._left = iter(windows)
        self._count = len(windows)
        self._lock = threading.Lock()
        self._failed = threading.Event()
        # What threads have done: a filled window with its memory, or None from a thread that ends.
        self._filled: queue.SimpleQueue[tuple[_Window, torch.Tensor] | None] = queue.SimpleQueue()

    def run(self, threads: int) -> None:
        workers = max(min(_fillers(threads), self._count), 1)
        with ThreadPoolExecutor(workers) as pool:
            results = [pool.submit(self._fill) for _ in range(workers)]
            try:
                self._send(workers, workers + limits.LOAD_WINDOWS_AHEAD_COUNT)
            except BaseException:
                self._failed.set()
                self._ring.close(workers)
                raise
        for done in results:
            done.result()
        self._ring.finish()

    def _send(self, running: int, most: int) -> None:
        """Send what is filled until all threads have ended. Memory for windows is taken when a thread waits for it."""
        while running:
            try:
                done = self._filled.get_nowait()
            except queue.Empty:
                if self._ring.give_again(wait=False) or self._ring.grow(most) or self._ring.give_again(wait=True):
                    continue
                done = self._filled.get()
            if done is None:
                running -= 1
            else:
                self._ring.send(*done)

    def _fill(self) -> None:
        cache: Cache = OrderedDict()
        try:
            while not self._failed.is_set():
                with self._lock:
                    window = next(self._left, None)
                memory = self._ring.take() if window is not None else None
                if window is None or memory is None or self._failed.is_set():
                    return
                with self._ring.watch.part("fill"):
                    if not window.is_filled:
                        self._ring.prepare(memory[MARGIN:], window)
                    serve(self._reader, window.reads, {window.index: memory.numpy()}, cache)
                self._filled.put((window, memory))
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._filled.put(None)


class _Ring:
    """The windows of host memory for one device, of so many bytes each, and its stream."""

    def __init__(self, device: torch.device, size: int, watch: Stopwatch) -> None:
        self.watch = watch
        self._device = device
        self._size = size
        self._cuda: Any = torch.cuda if device.type == "cuda" else None
        self._count = 0
        self._free: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        # What is on its way to the device, in its order, and an event for each that says when it is there.
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()
        self._stream = None
        if self._cuda is not None:
            self._stream = self._cuda.Stream(device)
            # What the program has asked of the device before comes first.
            self._stream.wait_stream(self._cuda.current_stream(device))

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._cuda.stream(self._stream)

    def grow(self, most: int) -> bool:
        """Make memory for one more window, unless there are so many."""
        if self._count == most:
            return False
        with self.watch.part("ring"):
            self._free.put(torch.empty(self._size + 2 * MARGIN, dtype=torch.uint8, pin_memory=self._cuda is not None))
            self._count += 1
        return True

    def take(self) -> torch.Tensor | None:
        """A window's memory; None if nothing more is to be filled."""
        with self.watch.part("device"):
            return self._free.get()

    def close(self, waiting: int) -> None:
        """Let so many threads end that wait for memory, or will."""
        for _ in range(waiting):
            self._free.put(None)

    def give_again(self, wait: bool) -> bool:
        """Let windows whose copies are done be filled again; the oldest one at least, if ``wait``. Returns whether
        there are any."""
        found = False
        while self._sent and (self._sent[0][1] is None or self._sent[0][1].query() or (wait and not found)):
            memory, copied = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            self._free.put(memory)
            found = True
        return found

    def prepare(self, inside: torch.Tensor, window: _Window) -> None:
        """Clear a window, and fetch what is to stay."""
        inside[: window.size].zero_()
        for segment in window.segments:
            if segment.keeps:
                with self._on_stream():
                    inside[segment.at : segment.at + len(segment.live)].copy_(segment.live)

    def send(self, window: _Window, memory: torch.Tensor) -> None:
        """Copy a window's parts to where they live. `give_again` makes it free after that."""
        inside, segments = memory[MARGIN : MARGIN + window.size], window.segments
        with self._on_stream():
            if len(segments) == 1:
                segments[0].live.copy_(inside[segments[0].at :][: len(segments[0].live)], non_blocking=True)
            else:
                there = inside.to(self._device, non_blocking=True)
                torch._foreach_copy_([segment.live for segment in segments], window.parts_of(there))
            copied = None
            if self._stream is not None:
                copied = self._cuda.Event()
                copied.record(self._stream)
        self._sent.append((memory, copied))

    def finish(self) -> None:
        """Return once everything is on the device."""
        with self.watch.part("device"):
            if self._stream is not None:
                self._stream.synchronize()
