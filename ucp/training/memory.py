"""Fresh host memory for what a load brings, in the pages that are quickest to get.

Getting the memory is a third of a load from a warm page cache. Huge pages are had three times as quickly as ordinary
ones, unless the system has to compact memory for them, or a hypervisor, to which free ones were given back, has to find
them: then they are several times as slow. Which it is shows within a few milliseconds, so that it is tried.
"""

from __future__ import annotations

import mmap
import time

import torch

_PIECE = 16 << 20
# Bytes from which memory gets pages of its own.
_OWN = 1 << 20
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
_POPULATE = 23  # MADV_POPULATE_WRITE of Linux 5.14 on; Python's mmap does not name it


class Memory:
    """Gives out zeroed memory whose pages are there already. One for each load: it remembers which are quick now."""

    def __init__(self) -> None:
        # Seconds per byte of the last piece of ordinary and of huge pages. What was not tried yet comes first.
        self._cost = {True: 0.0, False: 0.0} if _HUGE is not None else {False: 0.0}

    def take(self, nbytes: int) -> torch.Tensor:
        """That many zero bytes, flat."""
        if nbytes < _OWN:
            return torch.zeros(nbytes, dtype=torch.uint8)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        out = torch.frombuffer(memory, dtype=torch.uint8)
        for start in range(0, nbytes, _PIECE):
            self._populate(memory, out, start, min(_PIECE, nbytes - start))
        return out

    def _populate(self, memory: mmap.mmap, out: torch.Tensor, start: int, count: int) -> None:
        huge = min(self._cost, key=lambda kind: self._cost[kind])
        began = time.perf_counter()
        try:
            if huge and _HUGE is not None:
                memory.madvise(_HUGE, start, count)
            memory.madvise(_POPULATE, start, count)
        except OSError:  # a kernel without them
            out[start : start + count : mmap.PAGESIZE] = 0
        self._cost[huge] = (time.perf_counter() - began) / count
