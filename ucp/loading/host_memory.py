"""Fresh host memory for what a load brings, in the kind of pages that is fastest to get.

Getting the memory is a third of a load from a warm page cache. Huge pages usually come three times as fast as ordinary
ones. They are several times slower if the system has to compact memory for them, or if a hypervisor to which free pages
were given back has to find them. A few milliseconds show which is the case, so both kinds are tried.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ucp import limits

HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
POPULATE = 23  # MADV_POPULATE_WRITE of Linux 5.14 on; Python's mmap does not name it
_kernel = getattr(ctypes.CDLL(None), "madvise", None)


class Memory:
    """Gets memory whose pages are already there. Each load has one, which remembers which pages are fast now.

    cost: seconds per byte for the last piece of huge (True) and of ordinary pages (False); 0 if not tried yet.
    """

    def __init__(self) -> None:
        self.cost = {True: 0.0, False: 0.0} if HUGE is not None else {False: 0.0}

    def take(self, nbytes: int) -> torch.Tensor:
        """This many zero bytes, flat."""
        if nbytes < limits.OWN_PAGES_BYTES:
            return torch.zeros(nbytes, dtype=torch.uint8)
        out = _mapped(nbytes)
        self.ready([out])
        return out

    def take_all(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """As `take`, for several tensors. They lie one after the other in one memory, which lives as long as any of
        them."""
        starts = [
            0,
            *itertools.accumulate(
                -(-size // limits.HOST_ALIGNMENT_BYTES) * limits.HOST_ALIGNMENT_BYTES for size in sizes
            ),
        ]
        memory = self.take(starts[-1])
        return [memory[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def ready(self, tensors: Iterable[torch.Tensor]) -> None:
        """Get the pages of tensors in dense host memory that were just allocated. Their elements stay as they are."""
        for _ in self.ready_by_pieces(tensors):
            pass

    def ready_by_pieces(self, tensors: Iterable[torch.Tensor]) -> Iterator[None]:
        """`ready`, one piece at a time."""
        size = limits.HOST_MEMORY_PIECE_BYTES
        for begin, end in joined(map(_pages, tensors)):
            if end - begin < limits.OWN_PAGES_BYTES:
                continue
            cuts = [begin, *range((begin // size + 1) * size, end, size), end]
            for low, high in itertools.pairwise(cuts):
                self._populate(low, high - low)
                yield

    def _populate(self, address: int, count: int) -> None:
        huge = min(self.cost, key=lambda kind: self.cost[kind])
        began = time.perf_counter()
        # A kernel that lacks these calls gives the pages when they are written.
        if huge and HUGE is not None:
            _madvise(address, count, HUGE)
        _madvise(address, count, POPULATE)
        self.cost[huge] = (time.perf_counter() - began) / count


class MemoryToCome:
    """Memory that will be needed, whose pages a thread gets while something else is done: `Memory.take` by keys.

    A load works out what it does with one processor at most, and waits for the rank that opens the checkpoint. The
    thread ends early if nobody has this object any more.
    """

    def __init__(self, sizes: Mapping[Any, int]) -> None:
        rooms = {key: _mapped(size) for key, size in sizes.items() if size >= limits.OWN_PAGES_BYTES}
        self._rooms = {key: (room, threading.Event()) for key, room in rooms.items()}
        if rooms:
            given = weakref.ref(self), list(self._rooms.values())
            threading.Thread(target=_get_pages, args=given, name="ucp-memory", daemon=True).start()

    def take(self, key: object, nbytes: int) -> torch.Tensor | None:
        """The memory of this key, once its pages are there. It is the caller's then. None if there is none of this
        size."""
        room, there = self._rooms.pop(key, (None, None))
        if room is None or there is None or len(room) != nbytes:
            return None
        there.wait()
        return room


def _get_pages(owner: weakref.ref[MemoryToCome], rooms: Sequence[tuple[torch.Tensor, threading.Event]]) -> None:
    memory = Memory()
    try:
        for room, there in rooms:
            for _ in memory.ready_by_pieces([room]):
                if owner() is None:
                    return
            there.set()
    finally:
        for _, there in rooms:  # whatever went wrong, nobody waits for this thread
            there.set()


def _mapped(nbytes: int) -> torch.Tensor:
    """This many zero bytes, whose pages come when they are written."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pages(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses where the first page with elements of the tensor begins, and where the last one ends."""
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    return begin // page * page, -(-(begin + tensor.numel() * tensor.element_size()) // page) * page


def joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same addresses, with adjoining ranges joined, since a huge page may hold several tensors."""
    last: tuple[int, int] | None = None
    for begin, end in sorted(ranges):
        if last is not None and begin <= last[1]:
            last = last[0], max(last[1], end)
            continue
        if last is not None:
            yield last
        last = begin, end
    if last is not None:
        yield last


def _madvise(address: int, count: int, advice: int) -> None:
    if _kernel is not None:
        _kernel(ctypes.c_void_p(address), ctypes.c_size_t(count), ctypes.c_int(advice))
