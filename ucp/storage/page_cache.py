"""What of files the system has in memory already, and how much memory it could still give.

Linux 6.5 counts a file's cached pages in one call (``cachestat``). On older systems, and where it finds none, the file
is mapped, and ``mincore`` says it page by page. Where neither is possible, nothing counts as cached.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ucp import limits

CACHESTAT = 451
"""The system call's number, the same on every kind of processor."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recent"))


def cached_bytes(path: str, ranges: Sequence[tuple[int, int]]) -> int:
    """How many bytes of these ranges [first, last) of a local file lie in the page cache, counted in whole pages. 0 if
    the system does not say."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        return sum(_cached(fd, first, last) for first, last in ranges if first < last)
    finally:
        os.close(fd)


def _cached(fd: int, first: int, last: int) -> int:
    asked, counts = _Range(first, last - first), _Counts()
    done = _libc.syscall(CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(counts), 0) == 0
    if done and counts.cached:  # files of an overlay have their pages elsewhere, where only a mapping finds them
        return min(int(counts.cached) * mmap.PAGESIZE, last - first)
    return min(_mapped_and_cached(fd, first, last), last - first)


def _mapped_and_cached(fd: int, first: int, last: int) -> int:
    """The same by ``mincore``."""
    begin = first // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with suppress(OSError, ValueError, AttributeError), mmap.mmap(fd, last - begin, flags=mmap.MAP_PRIVATE) as memory:
        pages = (ctypes.c_ubyte * -(-(last - begin) // mmap.PAGESIZE))()
        seen = (ctypes.c_char * (last - begin)).from_buffer(memory)
        address = ctypes.addressof(seen)
        del seen  # a mapping that is looked at cannot be closed
        done = _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(last - begin), pages)
        if done == 0:
            return int((np.frombuffer(memoryview(pages), np.uint8) & 1).sum(dtype=np.int64)) * mmap.PAGESIZE
    return 0


def available_bytes(root: Path = Path("/")) -> int | None:
    """How much memory the system and this process's control group could give now, counting what the page cache could
    drop. None if they do not say.

    root: where /proc and /sys are.
    """
    found = [_meminfo(root / "proc/meminfo"), _of_group(root / "sys/fs/cgroup", root / "proc/self/cgroup")]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def has_room(nbytes: int) -> bool:
    """Whether the page cache would keep so many more bytes of each rank on this machine."""
    available = available_bytes()
    return available is not None and nbytes * limits.ranks_here() <= available * limits.CACHE_PART


def _meminfo(path: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def _of_group(top: Path, groups: Path) -> int | None:
    """What is left of the smallest limit of the control group and those above it (version 2)."""
    found: list[int] = []
    with suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = top / path.lstrip("/")
            for at in (folder, *folder.parents) if not controllers else ():
                left = _left(at)
                if left is not None:
                    found.append(left)
                if at == top:
                    break
    return min(found) if found else None


def _left(folder: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError):
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return max(limit - used + int(kinds["inactive_file"]) + int(kinds["active_file"]), 0)
    return None
