"""Bring what lies on a device through a few windows of pinned host memory, while the next window is read.

All buffers on one device are laid out behind one another in one imagined file, which is cut into windows. Threads fill
windows from the checkpoint. A stream of its own copies each full window to the device, and the window is filled again
once that copy is done. A window that holds several small tensors is copied to the device once and spread out there.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from ucp import limits
from ucp.job.stopwatch import Stopwatch
from ucp.transfer.gather import Copy, execute
from ucp.transfer.reader import Cache, Reader
from ucp.transfer.windows import MARGIN, Work, cut_at_windows


@dataclass(frozen=True, eq=False)
class Place:
    """A buffer on a device. buffer: its number. live: its bytes. keeps: what no copy fills stays as it is, and is zero
    otherwise. copies: into it, in bytes from its beginning."""

    buffer: int
    live: torch.Tensor
    keeps: bool
    copies: Sequence[Copy]


@dataclass(frozen=True, eq=False)
class _Segment:
    """A part of a place that lies in a window. at: its first byte in the window. live: its bytes."""

    at: int
    live: torch.Tensor
    keeps: bool


@dataclass(frozen=True, eq=False)
class _Window:
    work: Work
    segments: Sequence[_Segment]
    size: int


def through_windows(reader: Reader, places: Sequence[Place], threads: int, watch: Stopwatch) -> None:
    """Fill the places. Raises what reading raises; then some are filled and some are not."""
    by_device: defaultdict[torch.device, list[Place]] = defaultdict(list)
    for place in places:
        by_device[place.live.device].append(place)
    for device, here in by_device.items():
        windows = list(_windows(here, limits.LOAD_WINDOW_BYTES))
        workers = max(min(threads, len(windows)), 1)
        with watch.part("ring"):
            ring = _Ring(device, workers + limits.LOAD_WINDOWS_AHEAD_COUNT, limits.LOAD_WINDOW_BYTES, watch)
        _in_threads(workers, windows, lambda window, cache, ring=ring: _pass(reader, window, ring, cache))  # type: ignore[misc]
        ring.finish()
    reader.records.settle()


def _windows(places: Sequence[Place], size: int) -> Iterator[_Window]:
    """The windows that fill these places, in their order."""
    work: defaultdict[int, Work] = defaultdict(Work)
    segments: defaultdict[int, list[_Segment]] = defaultdict(list)
    ends: dict[int, int] = {}
    at = 0
    for place in places:
        nbytes = len(place.live)
        at = -(-at // limits.WINDOW_ALIGNMENT_BYTES) * limits.WINDOW_ALIGNMENT_BYTES
        if nbytes > size - at % size:
            at = -(-at // size) * size
        for copy in place.copies:
            for index, piece in cut_at_windows(replace(copy, buffer=0, to=copy.to + at), size):
                work[index].copies.append(replace(piece, to=piece.to - index * size + MARGIN))
        for index in range(at // size, -(-(at + nbytes) // size)):
            low, high = max(index * size, at), min((index + 1) * size, at + nbytes)
            segments[index].append(_Segment(low - index * size, place.live[low - at : high - at], place.keeps))
            ends[index] = high - index * size
        at += nbytes
    for index in sorted(segments):
        found = work.pop(index, Work())
        found.copies.sort(key=lambda copy: (copy.file, copy.at))
        yield _Window(found, segments[index], ends[index])


def _in_threads(workers: int, windows: Sequence[_Window], do: Callable[[_Window, Cache], None]) -> None:
    """Do something with every window, in their order. After an error no further one is begun."""
    left = iter(windows)
    lock, failed = threading.Lock(), threading.Event()

    def work() -> None:
        cache: Cache = OrderedDict()
        while not failed.is_set():
            with lock:
                window = next(left, None)
            if window is None:
                return
            try:
                do(window, cache)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()


def _pass(reader: Reader, window: _Window, ring: _Ring, cache: Cache) -> None:
    buffer = ring.take()
    try:
        inside = buffer[MARGIN : MARGIN + window.size]
        with ring.watch.part("fill"):
            if not window.work.fills(window.size):
                ring.prepare(inside, window.segments)
            execute(reader, window.work.copies, [buffer.numpy()], cache)
        ring.send(inside, window.segments, buffer)
    except BaseException:
        ring.put_back(buffer)
        raise


class _Ring:
    """The windows of host memory for one device, and its stream."""

    def __init__(self, device: torch.device, count: int, size: int, watch: Stopwatch) -> None:
        self.watch = watch
        self._device = device
        self._cuda: Any = torch.cuda if device.type == "cuda" else None
        self._free: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()
        self._stream = None
        self._lock = threading.Lock()
        if self._cuda is not None:
            self._stream = self._cuda.Stream(device)
            # What the program has asked of the device before comes first.
            self._stream.wait_stream(self._cuda.current_stream(device))
        for _ in range(count):
            memory = torch.empty(size + 2 * MARGIN, dtype=torch.uint8, pin_memory=self._cuda is not None)
            self._free.put((memory, None))

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._cuda.stream(self._stream)

    def take(self) -> torch.Tensor:
        """A window whose last copy is done."""
        with self.watch.part("device"):
            memory, copied = self._free.get()
            if copied is not None:
                copied.synchronize()
        return memory

    def put_back(self, memory: torch.Tensor) -> None:
        self._free.put((memory, None))

    def prepare(self, inside: torch.Tensor, segments: Sequence[_Segment]) -> None:
        """Clear a window, or fetch what is to stay."""
        for segment in segments:
            part = inside[segment.at : segment.at + len(segment.live)]
            if segment.keeps:
                with self._lock, self._on_stream():
                    part.copy_(segment.live)
            else:
                part.zero_()

    def send(self, inside: torch.Tensor, segments: Sequence[_Segment], memory: torch.Tensor) -> None:
        """Copy a window's parts to where they live, and make the window free for the time after that."""
        with self._lock, self._on_stream():
            if len(segments) == 1:
                segments[0].live.copy_(inside[segments[0].at :][: len(segments[0].live)], non_blocking=True)
            else:
                there = inside.to(self._device, non_blocking=True)
                parts = [there[segment.at : segment.at + len(segment.live)] for segment in segments]
                torch._foreach_copy_([segment.live for segment in segments], parts)
            copied = None
            if self._stream is not None:
                copied = self._cuda.Event()
                copied.record(self._stream)
        self._free.put((memory, copied))

    def finish(self) -> None:
        """Return once everything is on the device."""
        with self.watch.part("device"):
            if self._stream is not None:
                self._stream.synchronize()
