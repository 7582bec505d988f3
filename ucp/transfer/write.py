"""Write planned files: gather their elements window by window, digest each window while it is in memory, write it.

No byte is read a second time for its digest. Reads, hashing and writes release the interpreter's lock, and the kernel
is asked to write back what is complete, so that the disk works while the processors hash.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from mmap import mmap

import numpy as np

from ucp.storage.crc32 import Crc32Entry, within
from ucp.storage.digests import CHUNK, ChunkDigests, chunk_count, digest_chunks
from ucp.storage.writeback import LARGE, start_writeback, write_at, write_past_cache
from ucp.transfer.gather import Bytes, Reader
from ucp.transfer.pieces import Piece, create_files, failed, path_of, seal_files
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import MARGIN, Work, budget, shares, windows

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) now and then, from the calling thread."""


def write_files(
    reader: Reader,
    folder: str | os.PathLike[str],
    files: Sequence[TargetFile],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> dict[str, ChunkDigests]:
    """Write the files into an existing folder, in one go; return their chunks' digests by file name.

    Arguments and errors as of `write_share`. Flushing the small files and the folders is left to the caller, who
    commits them all at once. Files may be left half written by an error; the caller owns the folder.
    """
    create_files(folder, files)
    pieces = write_share(
        reader, folder, files, shares(files, 0, 1), threads=threads, max_memory=max_memory, progress=progress
    )
    return seal_files(folder, files, pieces)


def write_share(
    reader: Reader,
    folder: str | os.PathLike[str],
    files: Sequence[TargetFile],
    share: Sequence[tuple[int, int]],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    known: Mapping[tuple[int, int], bytes] | None = None,
    note: Callable[[Piece], None] = lambda piece: None,
) -> list[Piece]:
    """Fill each file's bytes [first, last) of ``share``; returns what was written. The files exist (`create_files`).

    threads: default is the number of processors, at most 8. max_memory: bytes for windows and scratch; both the
    threads and the window shrink to respect it. known: digests of chunks that an earlier attempt wrote; a window whose
    bytes have them is left as it is. note: called with every piece as soon as it is written, from several threads.
    Large files are on the device when the function returns.

    Raises DestinationError where a file can't be written (no space, a device error), BadArgument where ``max_memory``
    is too little for one thread, and what reading the source, ``note`` and ``progress`` raise.
    """
    workers, window = budget(threads, max_memory)
    total = sum(last - first for first, last in share)
    pieces: list[Piece] = []
    done = 0
    pool = ThreadPoolExecutor(workers, "ucp-write")
    closer = _Closer()
    running: set[Future[Piece]] = set()
    open_files: deque[_Output] = deque()

    def finish(everything: bool) -> None:
        """Collect completed windows; block while as many are under way as may be."""
        nonlocal done, running
        while running and (everything or len(running) >= 2 * workers):
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            found = [future.result() for future in ready]
            pieces.extend(found)
            done += sum(piece.size for piece in found)
            if progress is not None:
                progress(done, total)
        while open_files and open_files[0].is_complete:
            closer.close(open_files.popleft())

    try:
        for index, (file, (first, last)) in enumerate(zip(files, share, strict=True)):
            if first >= last:
                continue
            output = _Output.open(folder, index, file, last - first)
            open_files.append(output)
            for start, work in windows(file, window, first, last):
                size = min(window, last - start)
                running.add(pool.submit(_write_window, reader, output, start, size, window, work, known or {}, note))
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
    return pieces


@dataclass
class _Output:
    """A file being written, by this process in part; remaining: bytes."""

    index: int
    file: TargetFile
    path: str
    fd: int
    remaining: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], index: int, file: TargetFile, nbytes: int) -> _Output:
        path = path_of(folder, file)
        try:
            return cls(index, file, path, os.open(path, os.O_RDWR | os.O_CLOEXEC), nbytes)
        except OSError as error:
            raise failed(path, error) from error

    @property
    def is_complete(self) -> bool:
        with self.lock:
            return self.remaining == 0

    def complete(self, count: int) -> None:
        """Note that ``count`` bytes are done with: the last act on a window, since a complete file may be closed."""
        with self.lock:
            self.remaining -= count

    def piece(self, start: int, filled: memoryview, digests: bytes) -> Piece:
        return Piece(self.index, start, len(filled), digests, _crcs(self.file.crc32_entries, start, filled))


def _crcs(entries: Sequence[Crc32Entry], start: int, filled: memoryview) -> tuple[tuple[int, int, int, int], ...]:
    """The CRC-32 of each part of an entry that lies in these bytes, which begin at byte ``start``."""
    return tuple(
        (index, first, last - first, zlib.crc32(filled[first - start : last - start]))
        for index, first, last in within(entries, start, start + len(filled))
    )


_buffers = threading.local()


def _write_window(
    reader: Reader,
    output: _Output,
    start: int,
    size: int,
    window: int,
    work: Work,
    known: Mapping[tuple[int, int], bytes],
    note: Callable[[Piece], None],
) -> Piece:
    """Fill, digest and write one window, unless its bytes are there already."""
    buffer: Bytes | None = getattr(_buffers, "held", None)
    if buffer is None or len(buffer) != window + 2 * MARGIN:
        buffer = _buffers.held = np.frombuffer(mmap(-1, window + 2 * MARGIN), np.uint8)
    filled = memoryview(buffer.data)[MARGIN : MARGIN + size]
    digests = _digests_there(output, start, filled, known)
    if digests is None:
        work.fill(reader, start, size, buffer)
        digests = digest_chunks(filled)
        try:
            # The kernel lets one writer at a time into a file; the others would spin: better to wait for a turn asleep.
            with output.turn:
                (write_past_cache if output.file.size >= LARGE else write_at)(output.fd, filled, start)
        except OSError as error:
            raise failed(output.path, error) from error
        if output.file.size >= LARGE:
            start_writeback(output.fd, start, size)
    piece = output.piece(start, filled, digests)
    note(piece)
    output.complete(size)
    return piece


def _digests_there(
    output: _Output, start: int, filled: memoryview, known: Mapping[tuple[int, int], bytes]
) -> bytes | None:
    """The digests of a window whose bytes on disk are known and right (they are in ``filled`` then); else None."""
    first = start // CHUNK
    wanted = [known.get((output.index, first + k)) for k in range(chunk_count(len(filled)))]
    if any(digest is None for digest in wanted):
        return None
    try:
        with output.turn:  # a write past the cache sets how the file is read, too
            if os.preadv(output.fd, [filled], start) != len(filled):
                return None
    except OSError as error:
        raise failed(output.path, error) from error
    found = digest_chunks(filled)
    return found if found == b"".join(digest or b"" for digest in wanted) else None


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
            raise failed(output.path, error) from error
        finally:
            os.close(output.fd)
