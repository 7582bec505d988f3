"""Writing a file's bytes so that the device works meanwhile and the processors have little to do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.storage import disk

# Memory, offset and length must be multiples of so many bytes to bypass the page cache.
ALIGNMENT = 4096
_SYNC_FILE_RANGE_WRITE = 2


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of the data at a byte offset of an open file, in short pieces. Raises OSError."""
    done = 0
    while done < len(data):
        done += disk.write_at(fd, data[done : done + limits.WRITE_PIECE_BYTES], offset + done)


def write_cached(fd: int, data: memoryview, offset: int) -> None:
    """Write all of the data through the page cache, where it stays, and let the device begin. Raises OSError."""
    write_at(fd, data, offset)
    start_writeback(fd, offset, len(data))


def write_past_cache(fd: int, data: memoryview, offset: int) -> None:
    """Write all of the data without the page cache, in one call if its memory, its length and the offset are aligned.

    That takes a tenth of the processor time, and the thread does not need Python's lock 64 times for 16 MiB. What is
    not aligned, and everything on file systems that cannot do it, is written as by `write_at`. Raises OSError.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    done = 0
    if direct and offset % ALIGNMENT == 0 and _address(data) % ALIGNMENT == 0:
        whole = len(data) // ALIGNMENT * ALIGNMENT
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | direct)
            while done < whole and done % ALIGNMENT == 0:
                done += disk.write_at(fd, data[done:whole], offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    write_at(fd, data[done:], offset + done)


def memory_to_write(nbytes: int) -> NDArray[np.uint8]:
    """Memory for bytes that will be written past the cache, aligned as that needs it.

    It is in huge pages where the system has them: a write from them takes a third of the processor time, and filling
    them again after it takes half."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data if len(data) else 0


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the device begin with these bytes while others are being made. Nothing happens if the system has no such
    call. Errors of the device show when the file is flushed."""
    call = _sync_file_range()
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's sync_file_range(2), which Python's os lacks."""
    try:
        return ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
