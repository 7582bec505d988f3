"""Fresh host memory for what a load brings, in the kind of pages that is fastest to get.

Getting the memory is a third of a load from a warm page cache. Huge pages usually come three times as fast as ordinary
ones. They are several times slower if the system has to compact memory for them, or if a hypervisor to which free pages
were given back has to find them. A few milliseconds show which is the case: if they are slow, both kinds are tried.

Pages come when they are written for the first time, by what is read into them. So they are still in the processor's
cache then, and all threads that read get some. Only where there is time to spare they come before.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ucp import limits

HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
ORDINARY = getattr(mmap, "MADV_NOHUGEPAGE", None)
POPULATE = 23  # MADV_POPULATE_WRITE of Linux 5.14 on; Python's mmap does not name it
_kernel = getattr(ctypes.CDLL(None), "madvise", None)


class Memory:
    """Gives memory in the kind of pages that is fast. Each load has one, which remembers which kind that is now.

    cost: a processor's seconds per byte for the last piece of huge (True) and of ordinary pages (False); 0 if not tried
    yet.
    """

    def __init__(self) -> None:
        self.cost = {True: 0.0, False: 0.0} if HUGE is not None else {False: 0.0}

    @property
    def is_huge(self) -> bool:
        """Whether huge pages are taken next."""
        huge = self.cost.get(True)
        return huge is not None and (huge < limits.SLOW_PAGES_SECONDS_PER_BYTE or huge < self.cost[False])

    def take(self, nbytes: int) -> torch.Tensor:
        """This many zero bytes, flat."""
        if nbytes < limits.OWN_PAGES_BYTES:
            return torch.zeros(nbytes, dtype=torch.uint8)
        out = _mapped(nbytes)
        self.ready([out])
        return out

    def take_together(self, sizes: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """As `take`, for several tensors, which lie one after the other: their memory, and where in it each begins."""
        whole = [-(-size // limits.HOST_ALIGNMENT_BYTES) * limits.HOST_ALIGNMENT_BYTES for size in sizes]
        *starts, end = itertools.accumulate(whole, initial=0)
        return self.take(end), starts

    def ready(self, tensors: Iterable[torch.Tensor]) -> None:
        """Choose the pages of tensors in dense host memory that are new. Their elements stay as they are."""
        for begin, end in joined(map(_pages, tensors)):
            if end - begin >= limits.OWN_PAGES_BYTES:
                pieces = self._populated(begin, end)
                while not self._is_known and next(pieces, self) is not self:
                    pass
                self._advise(begin, end)

    def ready_by_pieces(self, tensor: torch.Tensor) -> Iterator[None]:
        """Get the pages of a tensor as for `ready`, one piece at a time."""
        yield from self._populated(*_pages(tensor))

    @property
    def _is_known(self) -> bool:
        """Whether another trial would not change which pages are taken."""
        return self.cost[self.is_huge] > 0

    def _populated(self, begin: int, end: int) -> Iterator[None]:
        size = limits.HOST_MEMORY_PIECE_BYTES
        for low, high in itertools.pairwise([begin, *range((begin // size + 1) * size, end, size), end]):
            huge = self.is_huge
            began = time.thread_time()
            # A kernel that lacks these calls gives the pages when they are written.
            self._advise(low, high)
            _madvise(low, high - low, POPULATE)
            self.cost[huge] = max(time.thread_time() - began, 1e-9) / (high - low)
            yield

    def _advise(self, begin: int, end: int) -> None:
        advice = HUGE if self.is_huge else ORDINARY
        if advice is not None:
            _madvise(begin, end - begin, advice)


class MemoryToCome:
    """Memory that will be needed, whose pages a thread gets while something else is done: `Memory.take` by keys.

    A load works out what it does with one processor at most, and waits for the rank that opens the checkpoint. The
    thread ends once some of the memory is taken, since then there is other work, or nobody has this object any more.
    """

    def __init__(self, sizes: Mapping[Any, int]) -> None:
        self._rooms = {key: _mapped(size) for key, size in sizes.items() if size >= limits.OWN_PAGES_BYTES}
        self._memory = Memory()
        self._taken = threading.Event()
        if self._rooms:
            given = weakref.ref(self), self._memory, self._taken, list(self._rooms.values())
            threading.Thread(target=_get_pages, args=given, name="ucp-memory", daemon=True).start()

    def take(self, key: object, nbytes: int) -> torch.Tensor | None:
        """The memory of this key, of whose pages some may be there. It is the caller's then. None if there is none of
        this size."""
        room = self._rooms.pop(key, None)
        if room is None or len(room) != nbytes:
            return None
        self._taken.set()
        self._memory.ready([room])
        return room


def _get_pages(
    owner: weakref.ref[MemoryToCome], memory: Memory, taken: threading.Event, rooms: Sequence[torch.Tensor]
) -> None:
    _make_way()
    for room in rooms:
        for _ in memory.ready_by_pieces(room):
            if owner() is None or taken.is_set():
                return


def _make_way() -> None:
    """Give this thread its niceness, unless the process has more. Elsewhere than on Linux a thread's number could be
    another process's."""
    if sys.platform == "linux":
        with suppress(OSError):  # where that is forbidden, only time is lost
            niceness = max(os.getpriority(os.PRIO_PROCESS, 0), limits.MEMORY_NICENESS)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


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
