"""Write planned files: gather their elements window by window, digest each window while it is in memory, write it.

No byte is read a second time for its digest. Reads, hashing and writes release the interpreter's lock. The kernel is
asked to write back what is complete, so that the disk works while the processors hash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from mmap import mmap

import numpy as np

from ucp import limits
from ucp.storage import disk
from ucp.storage.crc32 import Crc32Entry, crc32, within
from ucp.storage.digests import CHUNK, chunk_count, digest_chunks
from ucp.storage.writeback import start_writeback, write_at, write_past_cache
from ucp.transfer.batches import Window, batches, copies
from ucp.transfer.collecting import Collecting
from ucp.transfer.gather import execute
from ucp.transfer.pieces import Piece, failed, path_of
from ucp.transfer.reader import Bytes, Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import MARGIN, budget, room_together

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) now and then, from the calling thread."""


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
    collecting: Collecting | None = None,
) -> list[Piece]:
    """Fill each file's bytes [first, last) of ``share``. Returns what was written. The files exist (`create_files`).

    threads: default is the number of processors, at most 8, and one that waits for the device. max_memory: bytes for
    windows and scratch; both the threads and the window shrink to respect it. known: digests of chunks that an earlier
    attempt wrote; a window that already has them is left as it is. note: called with every piece as soon as it is
    written, from several threads. collecting: digests windows on their way; pieces then say what they add.
    Large files are on the device when the function returns.

    Raises DestinationError if a file can't be written (no space, a device error), BadArgument if ``max_memory`` is too
    little for one thread, and what reading the source, ``note`` and ``progress`` raise.
    """
    workers, window = budget(threads, max_memory)
    if threads is None and max_memory is None:
        workers += limits.WAITING_WRITERS_COUNT
    batch_bytes = room_together(workers, window, max_memory)
    total = sum(last - first for first, last in share)
    pieces: list[Piece] = []
    done = 0
    pool = ThreadPoolExecutor(workers, "ucp-write")
    closer = _Closer()
    running: set[Future[list[Piece]]] = set()
    outputs: dict[int, _FileInProgress] = {}

    def finish(everything: bool) -> None:
        """Collect completed batches. Block while as many batches are running as are allowed."""
        nonlocal done, running
        while running and (everything or len(running) >= 2 * workers):
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            found = [piece for future in ready for piece in future.result()]
            pieces.extend(found)
            done += sum(piece.size for piece in found)
            if progress is not None:
                progress(done, total)
        for index in [index for index, output in outputs.items() if output.is_complete]:
            closer.close(outputs.pop(index))

    try:
        for batch in batches(files, share, window, batch_bytes, reader.verifies):
            for index in {part.file for part in batch} - outputs.keys():
                outputs[index] = _FileInProgress.open(folder, index, files[index], share[index][1] - share[index][0])
            running.add(pool.submit(_write_batch, reader, outputs.copy(), batch, known or {}, note, collecting))
            finish(everything=False)
        finish(everything=True)
        closer.finish()
    finally:
        _end(running, pool, closer, outputs.values())
    return pieces


def _end(
    running: Iterable[Future[list[Piece]]],
    pool: ThreadPoolExecutor,
    closer: _Closer,
    outputs: Iterable[_FileInProgress],
) -> None:
    """Begin nothing more. Leave no thread running and no file open."""
    for future in running:
        future.cancel()
    pool.shutdown(wait=True)
    closer.stop()
    for output in outputs:
        os.close(output.fd)


@dataclass
class _FileInProgress:
    """A file that is being written, maybe only in part by this process. remaining: bytes of that part to write."""

    index: int
    file: TargetFile
    path: str
    fd: int
    remaining: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], index: int, file: TargetFile, nbytes: int) -> _FileInProgress:
        path = path_of(folder, file)
        try:
            return cls(index, file, path, disk.open_to_write(path, os.O_RDWR), nbytes)
        except OSError as error:
            raise failed(path, error) from error

    @property
    def is_complete(self) -> bool:
        with self.lock:
            return self.remaining == 0

    def complete(self, count: int) -> None:
        """Note that ``count`` bytes are done. This comes last for a window, since a complete file may be closed."""
        with self.lock:
            self.remaining -= count

    def piece(self, start: int, filled: memoryview, digests: bytes, collecting: Collecting | None) -> Piece:
        logical = b"" if collecting is None else collecting.of(self.index, start, filled)
        return Piece(self.index, start, len(filled), digests, _crcs(self.file.crc32_entries, start, filled), logical)


def _crcs(entries: Sequence[Crc32Entry], start: int, filled: memoryview) -> tuple[tuple[int, int, int, int], ...]:
    """The CRC-32 of each part of an entry that lies in these bytes, which begin at byte ``start``."""
    return tuple(
        (index, first, last - first, crc32(filled[first - start : last - start]))
        for index, first, last in within(entries, start, start + len(filled))
    )


_buffers = threading.local()


def _buffer(index: int, size: int) -> Bytes:
    """This thread's own buffer number ``index``, for a window of at most ``size`` bytes and its margins."""
    held: list[Bytes] = _buffers.__dict__.setdefault("held", [])
    if index == len(held):
        held.append(np.empty(0, np.uint8))
    if len(held[index]) < size + 2 * MARGIN:
        whole = -(-size // CHUNK) * CHUNK
        held[index] = np.frombuffer(mmap(-1, whole + 2 * MARGIN), np.uint8)
    return held[index]


def _write_batch(
    reader: Reader,
    outputs: Mapping[int, _FileInProgress],
    batch: Sequence[Window],
    known: Mapping[tuple[int, int], bytes],
    note: Callable[[Piece], None],
    collecting: Collecting | None,
) -> list[Piece]:
    """Fill, digest and write windows, except for those whose bytes are there already."""
    pieces = []
    missing: list[Window] = []
    buffers: list[Bytes] = []
    filled: list[memoryview] = []

    def finished(part: Window, view: memoryview, digests: bytes) -> None:
        output = outputs[part.file]
        pieces.append(output.piece(part.start, view, digests, collecting))
        note(pieces[-1])
        output.complete(part.size)

    for part in batch:
        buffer = _buffer(len(buffers), part.size)
        view = memoryview(buffer.data)[MARGIN : MARGIN + part.size]
        digests = _digests_there(outputs[part.file], part.start, view, known)
        if digests is not None:
            finished(part, view, digests)
            continue
        missing.append(part)
        buffers.append(buffer)
        filled.append(part.work.prepare(part.start, part.size, buffer))
    execute(reader, copies(missing), buffers)
    for part, view in zip(missing, filled, strict=True):
        digests = digest_chunks(view)
        _write(outputs[part.file], part.start, view)
        finished(part, view, digests)
    return pieces


def _write(output: _FileInProgress, start: int, filled: memoryview) -> None:
    large = output.file.size >= limits.WRITEBACK_FILE_BYTES
    try:
        # The kernel lets only one writer at a time into a file. The others would spin, so they sleep until their turn.
        with output.turn:
            (write_past_cache if large else write_at)(output.fd, filled, start)
    except OSError as error:
        raise failed(output.path, error) from error
    if large:
        start_writeback(output.fd, start, len(filled))


def _digests_there(
    output: _FileInProgress, start: int, filled: memoryview, known: Mapping[tuple[int, int], bytes]
) -> bytes | None:
    """The digests of a window if its bytes on disk are known and right, else None. ``filled`` then has these bytes."""
    first = start // CHUNK
    wanted = [known.get((output.index, first + k)) for k in range(chunk_count(len(filled)))]
    if any(digest is None for digest in wanted):
        return None
    try:
        with output.turn:  # a write past the cache also changes how the file is read
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

    def close(self, output: _FileInProgress) -> None:
        if output.file.size < limits.WRITEBACK_FILE_BYTES:
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
    def _flush(output: _FileInProgress) -> None:
        try:
            disk.flush(output.fd, data_only=True)
        except OSError as error:
            raise failed(output.path, error) from error
        finally:
            os.close(output.fd)
