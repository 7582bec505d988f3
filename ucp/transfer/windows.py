"""Cut the writing of planned files into windows: what fills each, how large they are, which process writes which.

A window is a few chunks of one file. It is planned, filled, hashed and written by one thread, so memory is bounded by
threads × window, whatever the size of the tensors. Work is shared out over processes in pieces of `UNIT`, which windows
divide evenly. So each window belongs to one process, however much memory each process has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ucp import limits
from ucp.errors import BadArgument
from ucp.storage import names
from ucp.storage.digests import CHUNK
from ucp.storage.dtypes import itemsize
from ucp.storage.writeback import ALIGNMENT
from ucp.transfer.copies import Copy
from ucp.transfer.gather import execute, plan
from ucp.transfer.reader import Bytes, Reader
from ucp.transfer.targets import TargetFile

UNIT = limits.CONVERT_WINDOW_BYTES
# An element that straddles two windows is gathered whole in both: its other part falls into a margin. 16 bytes would be
# enough; with this many, the window itself is aligned if its buffer is.
MARGIN = ALIGNMENT
# What one thread may hold in addition to its window: gather's scratch and a few verified chunks.
_OVERHEAD = limits.SCRATCH_BYTES + 3 * CHUNK
LEAST_BYTES = _OVERHEAD + CHUNK
"""What one thread needs at least."""


@dataclass
class Work:
    """What fills one window: copies into its buffer (margin, window, margin), and literals by offset in the file."""

    copies: list[Copy] = field(default_factory=list)
    literals: list[tuple[int, memoryview]] = field(default_factory=list)

    def fills(self, size: int) -> bool:
        """Whether the window's bytes are all overwritten, so that old bytes of its buffer need no clearing."""
        covered = sum(len(raw) for _, raw in self.literals)
        for copy in self.copies:
            nbytes = copy.nbytes // itemsize(copy.source_dtype) * itemsize(copy.target_dtype)
            if copy.to < MARGIN or copy.to + nbytes > MARGIN + size:
                return False
            covered += nbytes
        return covered == size

    def fill(self, reader: Reader, start: int, size: int, buffer: Bytes) -> memoryview:
        """Fill a buffer (margin, window, margin) for the window from byte ``start`` of the file. Returns its bytes.

        Raises what reading the source raises.
        """
        filled = self.prepare(start, size, buffer)
        execute(reader, self.copies, [buffer])
        return filled

    def prepare(self, start: int, size: int, buffer: Bytes) -> memoryview:
        """Like `fill`, but without the copies: only the literals, and zeros if bytes would stay unfilled."""
        if not self.fills(size):
            buffer[:] = 0
        for offset, raw in self.literals:
            at = offset - start + MARGIN
            buffer[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        return memoryview(buffer.data)[MARGIN : MARGIN + size]


def budget(threads: int | None, max_memory: int | None) -> tuple[int, int]:
    """(threads, bytes of a window) for the memory that may be used. Raises BadArgument if it is too little for one."""
    if threads is not None and threads < 1:
        raise BadArgument(f"{threads} workers were asked for; at least 1 is needed")
    workers = threads or min(limits.processors(), limits.THREADS_MAX_COUNT)
    if max_memory is None:
        return workers, limits.CONVERT_WINDOW_BYTES
    if max_memory < LEAST_BYTES:
        raise BadArgument(
            f"a memory limit of {max_memory} bytes is too little to work in; at least {LEAST_BYTES} are needed"
        )
    workers = min(workers, max(max_memory // (_OVERHEAD + limits.CONVERT_WINDOW_BYTES), 1))
    chunks = min((max_memory // workers - _OVERHEAD) // CHUNK, limits.CONVERT_WINDOW_BYTES // CHUNK)
    return workers, CHUNK << (chunks.bit_length() - 1)


def room_together(workers: int, window: int, max_memory: int | None) -> int:
    """Bytes of windows that one thread may fill together."""
    if max_memory is None:
        return limits.WINDOWS_TOGETHER_BYTES
    # A thread may still hold the buffer of a larger window that it had before.
    room = max_memory // workers - _OVERHEAD - (window - CHUNK)
    return max(window, min(room // (CHUNK + 2 * MARGIN) * CHUNK, limits.WINDOWS_TOGETHER_BYTES))


def check_files(files: Sequence[TargetFile]) -> None:
    """Plan everything without writing anything.

    Raises Unsupported for names that files cannot have, Mismatch if elements would lose bits, DamagedCheckpoint if the
    source lacks elements that are wanted, and ValueError if a file's description puts parts outside the file.
    """
    names.check_planned(file.name for file in files)
    for file in files:
        end = max((offset + len(raw) for offset, raw in file.literals), default=0)
        for copy in plan(file.wants):
            end = max(end, copy.to + copy.extent)
        if end > file.size:
            raise ValueError(f"the plan of '{file.name}' needs {end} bytes, but gives the file {file.size}")


def shares(files: Sequence[TargetFile], process: int, processes: int) -> list[tuple[int, int]]:
    """For each file, the bytes [first, last) that this process writes. All files' units are divided evenly by bytes."""
    total = sum(file.size for file in files)
    low, high = (-(-total * k // processes) for k in (process, process + 1))
    out = []
    at = 0
    for file in files:
        first, last = (min(max(-(-(bound - at) // UNIT), 0) * UNIT, file.size) for bound in (low, high))
        out.append((first, last))
        at += file.size
    return out


def windows(file: TargetFile, window: int, first: int, last: int) -> Iterator[tuple[int, Work]]:
    """The windows of a file's bytes [first, last) in order, as (first byte, work). The file is planned once, and its
    copies are cut where windows meet."""
    if first >= last:
        return
    work: defaultdict[int, Work] = defaultdict(Work)
    wanted = range(first // window, -(-last // window))
    for copy in plan(file.wants):
        if copy.to >= last or copy.to + copy.extent <= first:
            continue
        for index, piece in cut_at_windows(copy, window):
            if index in wanted:
                work[index].copies.append(replace(piece, to=piece.to - index * window + MARGIN))
    for offset, raw in file.literals:
        view = memoryview(raw)
        for index in range(offset // window, -(-(offset + len(raw)) // window)):
            begin = max(index * window, offset)
            end = min((index + 1) * window, offset + len(raw))
            work[index].literals.append((begin, view[begin - offset : end - offset]))
    for index in wanted:
        yield index * window, work.pop(index, Work())


def cut_at_windows(copy: Copy, window: int) -> Iterator[tuple[int, Copy]]:
    """The copy in pieces that lie in one window each. An element on a boundary is in the pieces of both windows."""
    size, extent = itemsize(copy.target_dtype), copy.extent
    if copy.to // window == (copy.to + extent - 1) // window:
        yield copy.to // window, copy
        return
    # Along the dimension of the longest steps in the file, so that indices come window by window.
    axis = max(range(len(copy.sizes)), key=lambda k: copy.target_steps[k] if copy.sizes[k] > 1 else -1)
    count = copy.sizes[axis]
    if count == 1:
        for index in range(copy.to // window, (copy.to + extent - 1) // window + 1):
            yield index, copy
        return
    step = copy.target_steps[axis] * size
    inner = extent - (count - 1) * step  # bytes from the first to the last element of one index
    at = 0
    while at < count:
        start = copy.to + at * step
        end = (start // window + 1) * window
        inside = min((end - inner - start) // step + 1, count - at)
        if inside > 0:
            yield start // window, copy.narrow(axis, at, inside)
            at += inside
        else:
            yield from cut_at_windows(copy.narrow(axis, at, 1), window)
            at += 1
