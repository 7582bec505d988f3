"""Sums of bytes over ranks of one machine, through memory that they share.

A collective of such ranks goes through sockets or a device. Here each rank writes its bytes into a slot of its own,
adds up one part of everyone's, and reads the sum: three copies in memory for each rank, however many there are. The
ranks wait for one another by a collective of one number, so that a dead one is noticed as ever.

The memory is a file of a file system in memory, which has no name any more once all ranks have opened it: it is given
back with the last of them. Whether ranks share a machine is not asked but tried: each has to find the file, and in it
what the first one has written.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ucp import limits

FOLDER = "/dev/shm"
_TOKEN_BYTES = 32


class LocalSums:
    """The sums of a group's ranks, which share a machine. staging: (size,) bytes of this rank, to be filled before each
    sum. place: of this rank in the group. wait: returns once every rank of the group has called it."""

    def __init__(self, memory: NDArray[np.uint8], place: int, count: int, wait: Callable[[], None]) -> None:
        rows = memory.reshape(count + 1, -1)
        self._slots, self._result, self._place, self._wait = rows[:count], rows[count], place, wait
        self.staging = torch.from_numpy(rows[place])

    def sum(self, nbytes: int) -> torch.Tensor:
        """The sum of everyone's first bytes, to be read before this rank fills its staging again. Collective."""
        self._wait()
        count = len(self._slots)
        low, high = (nbytes * k // count for k in (self._place, self._place + 1))
        part = self._result[low:high]
        part[:] = self._slots[0, low:high]
        for slot in self._slots[1:]:
            np.add(part, slot[low:high], out=part)
        self._wait()
        return torch.from_numpy(self._result[:nbytes])


def shared(group: Sequence[int], handle: dist.ProcessGroup | None, size: int, device: torch.device) -> LocalSums | None:
    """The sums of these ranks, of ``size`` bytes at most; None if they do not share a machine with room for it.
    Collective for the ranks of the group.

    group: the global ranks, ascending. handle: their process group. device: where it exchanges tensors.
    """
    count, place = len(group), list(group).index(dist.get_rank())
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    made: tuple[str, bytes] | None = None
    memory: NDArray[np.uint8] | None = None
    try:
        if place == 0:
            made, memory = _made(size * (count + 1))
        box: list[Any] = [made]
        dist.broadcast_object_list(box, src=group[0], group=handle, device=device)
        if place and box[0] is not None:
            path, token = box[0]
            memory = _opened(path, token, size * (count + 1))
        found: list[Any] = [None] * count
        dist.all_gather_object(found, memory is not None, group=handle)
    finally:
        if made is not None:
            os.unlink(made[0])
    if memory is None or not all(found):
        return None
    one = torch.zeros(1, device=device)

    def wait() -> None:
        dist.all_reduce(one, group=handle)
        one.item()  # until it is done on a device, too

    return LocalSums(memory, place, count, wait)


def _made(nbytes: int) -> tuple[tuple[str, bytes] | None, NDArray[np.uint8] | None]:
    """A new file's name with what it begins with, and its memory. None where there is no room, or no such folder."""
    try:
        fd, path = tempfile.mkstemp(prefix="ucp-", dir=FOLDER)
    except OSError:
        return None, None
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        memory = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
    except OSError:
        os.unlink(path)
        return None, None
    finally:
        os.close(fd)
    memory[:_TOKEN_BYTES] = np.frombuffer(token, np.uint8)
    return (path, token), memory


def _opened(path: str, token: bytes, nbytes: int) -> NDArray[np.uint8] | None:
    """The memory of the first rank's file; None if this is no such file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_size != nbytes:
            return None
        memory = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
    except OSError:
        return None
    finally:
        os.close(fd)
    return memory if memory[:_TOKEN_BYTES].tobytes() == token else None


def buffer_bytes(count: int) -> int:
    """How much each of so many ranks puts into shared memory at once."""
    return max(limits.EXCHANGE_LOCAL_BYTES // (count + 1), mmap.PAGESIZE)
