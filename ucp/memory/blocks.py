"""Memory with a descriptor, so that other processes of this node can map it."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """Memory that can be shared. fd: the descriptor of a file in memory without a name. view: its writable bytes."""

    fd: int
    size: int
    view: memoryview

    @classmethod
    def of(cls, size: int) -> SharedMemory:
        """New memory, with all of its pages allocated. Raises OSError if the machine has no room for them."""
        fd = os.memfd_create("ucp-kept", os.MFD_CLOEXEC)
        try:
            if size:
                _refuse_scarce(size)
                os.posix_fallocate(fd, 0, size)
            view = memoryview(mmap.mmap(fd, size)) if size else memoryview(bytearray())
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size, view)

    def write(self, at: int, body: Any) -> None:
        self.view[at : at + len(body)] = body

    def close(self) -> None:
        """Give the memory back once nobody else has mapped it."""
        os.close(self.fd)


def _refuse_scarce(size: int) -> None:
    """Raise OSError if there is too little memory. If memory is overcommitted, taking it would succeed, and the system
    would later kill some process."""
    free = available()
    if free is not None and size > free:
        raise OSError(errno.ENOMEM, f"{size} bytes of memory are needed, and this machine has {free} to spare")


def available() -> int | None:
    """How many bytes of memory this machine, or this container, can spare. None if unknown."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            rows = dict(line.split(":", 1) for line in stream)
        found.append(int(rows["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        found = []
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            most = stream.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as stream:
            used = int(stream.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as stream:
            kinds = dict(line.split() for line in stream)
        if most != "max":  # the page cache can be dropped
            found.append(int(most) - used + int(kinds["inactive_file"]) + int(kinds["active_file"]))
    except (OSError, KeyError, ValueError):
        return min(found, default=None)
    return min(found, default=None)
