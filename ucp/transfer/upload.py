"""Write planned files to a URL: each is one stream, gathered window by window and digested on its way.

Object stores cannot rename, and cannot write in the middle of a file. So a checkpoint exists once the file that says so
exists; the caller writes that last. The CRCs of zip archives are stored as the bytes pass, which is possible since they
lie behind the bytes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from ucp import limits
from ucp.errors import DestinationError
from ucp.storage import locations, names
from ucp.storage.crc32 import PassingEntries
from ucp.storage.digests import ChunkDigests, digest_chunks
from ucp.transfer.collecting import Collecting
from ucp.transfer.reader import Reader
from ucp.transfer.targets import TargetFile
from ucp.transfer.windows import MARGIN, budget, windows
from ucp.transfer.write import Progress


def check_upload(url: str) -> None:
    """Raise DestinationError if there is something at the URL already, or if it cannot be reached."""
    try:
        taken = locations.exists(url)
    except OSError as error:
        raise DestinationError(f"{url}: cannot be reached: {error.strerror or error}") from error
    if taken:
        raise DestinationError(
            f"{url}: the destination exists already; choose another or remove it (behind a URL nothing is replaced)"
        )


def upload_files(
    reader: Reader,
    url: str,
    files: Sequence[TargetFile],
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
    collecting: Collecting | None = None,
) -> dict[str, ChunkDigests]:
    """Write the files below the URL, several at a time. Returns their chunks' digests by name. The last file is
    written when all others are there, since readers find a checkpoint by it.

    threads, max_memory, progress, collecting: as for `ucp.transfer.write.write_share`. In addition to its window, a
    file in progress holds two parts of `limits.UPLOAD_PART_BYTES`. Raises DestinationError, and what reading the source
    raises. `discard` then removes what was written.
    """
    workers, window = budget(threads, max_memory)
    if max_memory is not None:
        workers = max(1, min(workers, max_memory // (window + 2 * limits.UPLOAD_PART_BYTES)))
    total, done = sum(file.size for file in files), 0
    stop = threading.Event()
    lock = threading.Lock()

    def one(index: int) -> tuple[str, ChunkDigests]:
        nonlocal done
        file = files[index]
        buffer = np.empty(window + 2 * MARGIN, np.uint8)
        table = bytearray()
        crcs = PassingEntries(file.crc32_entries)
        with _stream(names.below(url, file.name)) as write:
            for start, work in windows(file, window, 0, file.size):
                if stop.is_set():
                    raise DestinationError(f"{url}: given up, since another of its files failed")
                size = min(window, file.size - start)
                filled = work.fill(reader, start, size, buffer)
                crcs.store(start, filled)
                table += digest_chunks(filled)
                logical = b"" if collecting is None else collecting.of(index, start, filled)
                write(filled)
                with lock:
                    if collecting is not None:
                        collecting.add(index, logical)
                    done += size
                    if progress is not None:
                        progress(done, total)
        return file.name, ChunkDigests(file.size, bytes(table))

    with ThreadPoolExecutor(workers, "ucp-upload") as pool:
        futures = [pool.submit(one, index) for index in range(len(files) - 1)]
        try:
            found = dict(future.result() for future in as_completed(futures))
            return found | dict(map(one, range(len(files))[-1:]))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            first = next((e for f in futures if not f.cancelled() and (e := f.exception()) is not None), None)
            if first is not None:
                raise first from None
            raise


def upload(url: str, raw: bytes) -> None:
    """Write a small file in one request. Raises DestinationError."""
    try:
        locations.write(url, raw)
    except OSError as error:
        raise DestinationError(f"{url}: cannot be written: {error.strerror or error}") from error


def discard(url: str, files: Iterable[str]) -> None:
    """Remove these files below the URL, as far as that is possible."""
    for name in files:
        with contextlib.suppress(OSError):
            locations.remove(names.below(url, name))


@contextlib.contextmanager
def _stream(url: str) -> Iterator[Callable[[memoryview], object]]:
    """A function that appends bytes to a new file, which exists once the block ends without an exception."""
    try:
        with locations.created(url, limits.UPLOAD_PART_BYTES) as stream:
            yield stream.write
    except OSError as error:
        raise DestinationError(f"{url}: cannot be written: {error.strerror or error}") from error
