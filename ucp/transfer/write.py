"""Write planned files: gather their elements window by window, digest each window while it is in memory, write it.

A window is a few chunks of one file. Every window is planned, filled, hashed and written by one thread, so memory is
bounded by threads × window whatever the size of the tensors, and no byte is read a second time for its digest. Reads,
hashing and writes release the interpreter's lock, and the kernel is asked to write back what is complete, so that the
disk works while the processors hash.
"""

from __future__ import annotations

import errno
import os
import threading
import zlib
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

import numpy as np

from ucp.errors import BadArgument, DestinationError
from ucp.storage.crc32 import Crc32Entry, combine_all
from ucp.storage.digests import CHUNK, WIDTH, ChunkDigests, chunk_count, digest_chunks
from ucp.storage.dtypes import itemsize
from ucp.storage.writeback import LARGE, start_writeback, write_at
from ucp.transfer.gather import SCRATCH, Bytes, Copy, Reader, execute, plan
from ucp.transfer.targets import TargetFile

# Bytes of a window where memory allows: long enough that planning and system calls don't show.
WINDOW = 8 << 20
# An element that straddles two windows is gathered whole in both: its other part falls into a margin of this size.
_MARGIN = 16
# What one thread may hold beside its window: gather's scratch and a few verified chunks.
_OVERHEAD = SCRATCH + 3 * CHUNK
_MAX_THREADS = 8

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) now and then, from the calling thread."""


def write_files(
    reader: Reader,
    folder: str | os.PathLike[str],
    files: Sequence[TargetFile],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    digests: bool = True,
    progress: Progress | None = None,
) -> dict[str, ChunkDigests]:
    """Write the files into an existing folder; return their chunks' digests by file name (none without ``digests``).

    threads: default is the number of processors, at most 8. max_memory: bytes for windows and scratch; both the
    threads and the window shrink to respect it. Large files are on the device when the function returns; flushing the
    small ones and the folders is left to the caller, who commits them all at once.

    Raises DestinationError where a file can't be created or written (no space, a device error), BadArgument where
    ``max_memory`` is too little for one thread, and what reading the source raises. Files may be left half written
    then; the caller owns the folder.
    """
    workers, window = budget(threads, max_memory)
    total = sum(file.size for file in files)
    results: dict[str, ChunkDigests] = {}
    done = 0
    pool = ThreadPoolExecutor(workers, "ucp-write")
    closer = _Closer()
    running: set[Future[int]] = set()
    open_files: deque[_Output] = deque()

    def finish(everything: bool) -> None:
        """Collect completed windows; block while as many are under way as may be."""
        nonlocal done, running
        while running and (everything or len(running) >= 2 * workers):
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            done += sum(future.result() for future in ready)
            if progress is not None:
                progress(done, total)
        while open_files and open_files[0].is_complete:
            output = open_files[0]
            output.seal()
            open_files.popleft()
            if digests:
                results[output.file.name] = output.digests()
            closer.close(output)

    try:
        for file in files:
            output = _Output.create(os.fspath(folder), file, digests)
            open_files.append(output)
            for index, work in _windows(file, window):
                running.add(pool.submit(_write_window, reader, output, index, window, work))
                finish(everything=False)
            finish(everything=False)
        finish(everything=True)
        closer.finish()
    finally:
        for future in running:
            future.cancel()
        pool.shutdown(wait=True)
        closer.stop()
        for output in open_files:
            os.close(output.fd)
    return results


def check_files(files: Sequence[TargetFile]) -> None:
    """Plan everything without writing anything.

    Raises Mismatch where elements would lose bits and DamagedCheckpoint where the source lacks some that are wanted;
    ValueError where a file is described so that its parts lie outside it.
    """
    for file in files:
        end = max((offset + len(raw) for offset, raw in file.literals), default=0)
        for copy in plan(file.wants):
            end = max(end, copy.to + _extent(copy))
        if end > file.size:
            raise ValueError(f"the plan of '{file.name}' needs {end} bytes, but gives the file {file.size}")


def budget(threads: int | None, max_memory: int | None) -> tuple[int, int]:
    """(threads, bytes of a window) for the memory that may be used. Raises BadArgument if it is too little for one."""
    if threads is not None and threads < 1:
        raise BadArgument(f"{threads} workers were asked for; at least 1 is needed")
    workers = threads or min(os.cpu_count() or 1, _MAX_THREADS)
    if max_memory is None:
        return workers, WINDOW
    least = _OVERHEAD + CHUNK
    if max_memory < least:
        raise BadArgument(f"a memory limit of {max_memory} bytes is too little to work in; at least {least} are needed")
    workers = min(workers, max(max_memory // (_OVERHEAD + WINDOW), 1))
    window = min((max_memory // workers - _OVERHEAD) // CHUNK * CHUNK, WINDOW)
    return workers, window


@dataclass
class _Output:
    """A file being written. ``table`` has a digest per chunk; windows fill disjoint parts of it, without a lock."""

    file: TargetFile
    path: str
    fd: int
    table: bytearray | None
    remaining: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)
    crcs: defaultdict[Crc32Entry, list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def create(cls, folder: str, file: TargetFile, digests: bool) -> _Output:
        path = os.path.join(folder, *file.name.split("/"))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _failed(path, error) from error
        try:
            _reserve(fd, file.size)
        except OSError as error:
            os.close(fd)
            raise _failed(path, error) from error
        table = bytearray(chunk_count(file.size) * WIDTH) if digests else None
        return cls(file, path, fd, table, file.size)

    @property
    def is_complete(self) -> bool:
        with self.lock:
            return self.remaining == 0

    def complete(self, count: int) -> None:
        """Note that ``count`` bytes are done with: the last act on a window, since a complete file may be closed."""
        with self.lock:
            self.remaining -= count

    def note_crcs(self, start: int, window: memoryview) -> None:
        """Keep the CRC-32 of each part of an entry that lies in this window, which begins at byte ``start``."""
        entries = self.file.crc32_entries
        stop = start + len(window)
        for index in range(bisect_right(entries, start, key=_end_of), len(entries)):
            entry = entries[index]
            if entry.offset >= stop:
                break
            first, last = max(entry.offset, start), min(_end_of(entry), stop)
            crc = zlib.crc32(window[first - start : last - start])
            with self.lock:
                self.crcs[entry].append((first, last - first, crc))

    def seal(self) -> None:
        """Store the CRCs where the file wants them, and digest the chunks around them anew. The file is complete."""
        touched: set[int] = set()
        try:
            for entry, parts in self.crcs.items():
                crc = combine_all((crc, size) for _, size, crc in sorted(parts))
                for position in entry.positions:
                    os.pwrite(self.fd, crc.to_bytes(4, "little"), position)
                    touched.update((position // CHUNK, (position + 3) // CHUNK))
            if self.table is None:
                return
            for chunk in touched:
                raw = os.pread(self.fd, min(CHUNK, self.file.size - chunk * CHUNK), chunk * CHUNK)
                self.table[chunk * WIDTH : (chunk + 1) * WIDTH] = digest_chunks(raw)
        except OSError as error:
            raise _failed(self.path, error) from error

    def digests(self) -> ChunkDigests:
        return ChunkDigests(self.file.size, bytes(self.table or b""))


def _end_of(entry: Crc32Entry) -> int:
    return entry.offset + entry.size


def _reserve(fd: int, size: int) -> None:
    """Give the file its size; where the file system can, its space too, so that a full disk shows before the work."""
    os.ftruncate(fd, size)


@dataclass
class _Work:
    """What fills one window: copies into its buffer (margin, window, margin), and literals by offset in the file."""

    copies: list[Copy] = field(default_factory=list)
    literals: list[tuple[int, memoryview]] = field(default_factory=list)


def _windows(file: TargetFile, window: int) -> Iterator[tuple[int, _Work]]:
    """All windows of a file in order. The file is planned once; its copies are cut where windows meet."""
    work: defaultdict[int, _Work] = defaultdict(_Work)
    for copy in plan(file.wants):
        for index, piece in _cut_at_windows(copy, window):
            work[index].copies.append(replace(piece, to=piece.to - index * window + _MARGIN))
    for offset, raw in file.literals:
        view = memoryview(raw)
        for index in range(offset // window, -(-(offset + len(raw)) // window)):
            first = max(index * window, offset)
            last = min((index + 1) * window, offset + len(raw))
            work[index].literals.append((first, view[first - offset : last - offset]))
    for index in range(-(-file.size // window)):
        yield index, work.pop(index, _Work())


def _extent(copy: Copy) -> int:
    """Bytes in the target from the copy's first element to the end of its last."""
    last = sum((n - 1) * step for n, step in zip(copy.sizes, copy.target_steps, strict=True))
    return (last + 1) * itemsize(copy.target_dtype)


def _cut_at_windows(copy: Copy, window: int) -> Iterator[tuple[int, Copy]]:
    """The copy in pieces that lie in one window each; an element on a boundary is in both windows' pieces."""
    size, extent = itemsize(copy.target_dtype), _extent(copy)
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
            yield from _cut_at_windows(copy.narrow(axis, at, 1), window)
            at += 1


_buffers = threading.local()


def _write_window(reader: Reader, output: _Output, index: int, window: int, work: _Work) -> int:
    """Fill, digest and write one window; returns its bytes."""
    start = index * window
    size = min(window, output.file.size - start)
    buffer: Bytes | None = getattr(_buffers, "held", None)
    if buffer is None or len(buffer) != window + 2 * _MARGIN:
        buffer = _buffers.held = np.empty(window + 2 * _MARGIN, np.uint8)
    if not _is_filled_by(work, size):
        buffer[:] = 0
    for offset, raw in work.literals:
        at = offset - start + _MARGIN
        buffer[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
    execute(reader, work.copies, [buffer])
    filled = memoryview(buffer.data)[_MARGIN : _MARGIN + size]
    if output.table is not None:
        found = digest_chunks(filled)
        first = start // CHUNK * WIDTH
        output.table[first : first + len(found)] = found
    if output.file.crc32_entries:
        output.note_crcs(start, filled)
    try:
        # The kernel lets one writer at a time into a file, and the others spin: better to wait for one's turn asleep.
        with output.turn:
            write_at(output.fd, filled, start)
    except OSError as error:
        raise _failed(output.path, error) from error
    if output.file.size >= LARGE:
        start_writeback(output.fd, start, size)
    output.complete(size)
    return size


def _is_filled_by(work: _Work, size: int) -> bool:
    """Whether the window's bytes are all overwritten, so that old bytes of the buffer need no clearing."""
    covered = sum(len(raw) for _, raw in work.literals)
    for copy in work.copies:
        nbytes = copy.nbytes // itemsize(copy.source_dtype) * itemsize(copy.target_dtype)
        if copy.to < _MARGIN or copy.to + nbytes > _MARGIN + size:
            return False
        covered += nbytes
    return covered == size


class _Closer:
    """One thread that flushes complete large files to the device and closes them, while the next is written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "ucp-close")
        self._pending: list[Future[None]] = []

    def close(self, output: _Output) -> None:
        if output.file.size < LARGE:
            os.close(output.fd)
        else:
            self._pending.append(self._pool.submit(self._flush, output))

    def finish(self) -> None:
        """Wait for all files, and raise what went wrong."""
        for future in self._pending:
            future.result()

    def stop(self) -> None:
        self._pool.shutdown(wait=True)

    @staticmethod
    def _flush(output: _Output) -> None:
        try:
            os.fdatasync(output.fd)
        except OSError as error:
            raise _failed(output.path, error) from error
        finally:
            os.close(output.fd)


def _failed(path: str, error: OSError) -> DestinationError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DestinationError(
            f"{path}: no space left to write it ({reason}); free some, or choose another destination"
        )
    return DestinationError(f"{path}: cannot be written ({reason}); check the destination's permissions and device")
