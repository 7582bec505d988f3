"""Write planned files: gather their elements window by window, digest each window while it is in memory, write it.

No byte is read a second time for its digest. Reads, hashing and writes release the interpreter's lock. The kernel is
asked to write back what is complete, so that the disk works while the processors hash.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from weakref import WeakKeyDictionary

import numpy as np

from ucp import limits
from ucp.storage import disk
from ucp.storage.crc32 import Crc32Entry, crc32, within
from ucp.storage.digests import CHUNK, chunk_count, digest_chunks
from ucp.storage.writeback import memory_to_write, start_writeback, write_at, write_past_cache
from ucp.transfer.batches import Window, batches, copies
from ucp.transfer.collecting import Collecting
from ucp.transfer.gather import execute
from ucp.transfer.pieces import Piece, failed, path_of
from ucp.transfer.reader import Bytes, Cache, Reader
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

    threads: that fill windows; default is the number of processors, at most 8. Others write what is filled, and wait
    for the device. max_memory: bytes for windows and scratch; both the threads and the window shrink to respect it.
    known: digests of chunks that an earlier attempt wrote; a window that already has them is left as it is. note:
    called with every piece as soon as it is written, from several threads. collecting: digests windows on their way;
    pieces then say what they add.
    Large files are on the device when the function returns.

    Raises DestinationError if a file can't be written (no space, a device error), BadArgument if ``max_memory`` is too
    little for one thread, and what reading the source, ``note`` and ``progress`` raise.
    """
    workers, window = budget(threads, max_memory)
    crew = _Crew(workers, workers + (limits.WAITING_WINDOWS_COUNT if max_memory is None else 0))
    batch_bytes = room_together(workers, window, max_memory)
    total = sum(last - first for first, last in share)
    pieces: list[Piece] = []
    done = 0
    closer = _Closer()
    running: set[_Batch] = set()
    outputs: dict[int, _FileInProgress] = {}

    def finish(everything: bool) -> None:
        """Collect completed batches. Block while as many batches are running as are allowed."""
        nonlocal done, running
        while running and (everything or len(running) >= 2 * workers):
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            found = [piece for future in ready for piece in future.result().result()]
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
            job = _Job(reader, outputs.copy(), batch, known or {}, note, collecting)
            running.add(crew.begin(job))
            finish(everything=False)
        finish(everything=True)
        closer.finish()
    finally:
        _end(running, crew, closer, outputs.values())
    return pieces


def _end(
    running: Iterable[_Batch],
    crew: _Crew,
    closer: _Closer,
    outputs: Iterable[_FileInProgress],
) -> None:
    """Begin nothing more. Leave no thread running and no file open."""
    for future in running:
        future.cancel()
    crew.stop()
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


_Room = list[Bytes]
"""Buffers for the windows of a batch, which has them from when it is filled until it is written."""
_Batch = Future[Future[list[Piece]]]
"""Done once its windows are filled, and what that gives, once they are written."""


class _Crew:
    """So many threads that fill windows, rooms for so many batches, and threads that write. Fewer threads that work are
    less often in each other's way, so those that wait for the device are others."""

    def __init__(self, workers: int, rooms: int) -> None:
        self._filling, self._writing = ThreadPoolExecutor(workers, "ucp-fill"), ThreadPoolExecutor(rooms, "ucp-write")
        self._free: SimpleQueue[_Room] = SimpleQueue()
        for _ in range(rooms):
            self._free.put([])

    def begin(self, job: _Job) -> _Batch:
        return self._filling.submit(self._fill, job)

    def _fill(self, job: _Job) -> Future[list[Piece]]:
        room = self._free.get()
        try:
            return self._writing.submit(self._write, job, room, *job.fill(room))
        except BaseException:
            self._free.put(room)
            raise

    def _write(
        self, job: _Job, room: _Room, there: list[Piece], missing: list[tuple[Piece, memoryview]]
    ) -> list[Piece]:
        try:
            return job.write(there, missing)
        finally:
            self._free.put(room)

    def stop(self) -> None:
        """End the threads, once they have done what has begun."""
        self._filling.shutdown(wait=True)
        self._writing.shutdown(wait=True)


def _buffer(room: _Room, index: int, size: int) -> Bytes:
    """A room's buffer number ``index``, for a window of at most ``size`` bytes and its margins."""
    if index == len(room):
        room.append(np.empty(0, np.uint8))
    if len(room[index]) < size + 2 * MARGIN:
        whole = -(-size // CHUNK) * CHUNK
        room[index] = memory_to_write(whole + 2 * MARGIN)
    return room[index]


class _Chunks(threading.local):
    """A filling thread's verified chunks: its next window often begins within the last one's last chunk."""

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Reader, Cache] = WeakKeyDictionary()


_chunks = _Chunks()


@dataclass
class _Job:
    """Windows that are filled and digested together, except for those whose bytes are there already, and written."""

    reader: Reader
    outputs: Mapping[int, _FileInProgress]
    batch: Sequence[Window]
    known: Mapping[tuple[int, int], bytes]
    note: Callable[[Piece], None]
    collecting: Collecting | None

    def fill(self, room: _Room) -> tuple[list[Piece], list[tuple[Piece, memoryview]]]:
        """The pieces that are there already, and those that are to be written, with their bytes."""
        there: list[Piece] = []
        missing: list[Window] = []
        buffers: list[Bytes] = []
        filled: list[memoryview] = []
        for part in self.batch:
            buffer = _buffer(room, len(buffers), part.size)
            view = memoryview(buffer.data)[MARGIN : MARGIN + part.size]
            digests = _digests_there(self.outputs[part.file], part.start, view, self.known)
            if digests is not None:
                there.append(self._piece(part, view, digests))
                continue
            missing.append(part)
            buffers.append(buffer)
            filled.append(part.work.prepare(part.start, part.size, buffer))
        execute(self.reader, copies(missing), buffers, _chunks.kept.setdefault(self.reader, OrderedDict()))
        return there, [
            (self._piece(part, view, digest_chunks(view)), view) for part, view in zip(missing, filled, strict=True)
        ]

    def _piece(self, part: Window, filled: memoryview, digests: bytes) -> Piece:
        return self.outputs[part.file].piece(part.start, filled, digests, self.collecting)

    def write(self, there: list[Piece], missing: list[tuple[Piece, memoryview]]) -> list[Piece]:
        """Write what is missing, and note all pieces."""
        for piece, view in missing:
            _write(self.outputs[piece.file], piece.start, view)
        pieces = [*there, *(piece for piece, _ in missing)]
        for piece in pieces:
            self.note(piece)
            self.outputs[piece.file].complete(piece.size)
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
