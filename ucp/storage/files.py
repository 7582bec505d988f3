"""Byte ranges of files, local or at URLs, read by many threads at once."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ucp.errors import DamagedCheckpoint, RemovedMeanwhile
from ucp.storage import locations


@dataclass
class _OpenFile:
    fd: int
    users: int = 0
    dropped: bool = False


class Files:
    """Reads byte ranges of files; a context manager.

    At most `keep_open` files that nobody reads at the moment stay open. All methods may be called from several threads.
    `bytes_read` counts what has been read so far.
    """

    def __init__(self, keep_open: int = 64) -> None:
        self.bytes_read = 0
        self._keep_open = keep_open
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._far: dict[str, bool] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Reads still under way in other threads finish; the object may be used again afterwards."""
        with self._lock:
            self._shrink(0)

    def size(self, path: str | os.PathLike[str]) -> int:
        """Length of the file in bytes. Raises `DamagedCheckpoint` if it is missing or cannot be read."""
        return self._stat(path).size

    def mtime_ns(self, path: str | os.PathLike[str]) -> int:
        """When the file was last changed, in nanoseconds. Raises `DamagedCheckpoint` if it is missing."""
        return self._stat(path).mtime_ns

    def is_far(self, path: str | os.PathLike[str]) -> bool:
        """As `locations.is_far`, asked once for each file. Raises `DamagedCheckpoint` if it cannot be told."""
        name = str(path)
        far = self._far.get(name)
        if far is None:
            try:
                far = self._far[name] = locations.is_far(name)
            except OSError as error:
                raise _unreadable(name, error) from error
        return far

    def will_read(self, path: str | os.PathLike[str], first: int, last: int) -> None:
        """Tell the system that bytes [first, last) will be read soon, if the file is not far away. Raises nothing."""
        name = str(path)
        with suppress(OSError, DamagedCheckpoint):
            if self.is_far(name):
                return
            file = self._taken(name)
            try:
                os.posix_fadvise(file.fd, first, last - first, os.POSIX_FADV_WILLNEED)
            finally:
                self._give_back(name, file, 0)

    def read_into(self, path: str | os.PathLike[str], offset: int, buffer: Any) -> None:
        """Fill a writable contiguous buffer with the file's bytes from `offset` (bytes) on.

        Raises `DamagedCheckpoint` if the file is missing, cannot be read, or ends before the buffer is full.
        """
        self.read_parts(path, offset, [buffer])

    def read_parts(self, path: str | os.PathLike[str], offset: int, parts: Sequence[Any]) -> None:
        """Like `read_into`, but into several buffers, one after the other: at most 1,000 (the system's limit)."""
        name = str(path)
        views = [view.cast("B") for part in parts if (view := memoryview(part)).nbytes]
        if not views:
            return
        if self.is_far(name):
            self._fetch(name, offset, views, sum(map(len, views)))
        else:
            self._read(name, offset, views)

    # Many threads read a few MiB at a time. Everything here that needs the interpreter keeps all the others waiting.
    def _read(self, name: str, offset: int, views: list[memoryview]) -> None:
        total = sum(map(len, views))
        file, at = self._taken(name), offset
        try:
            while True:
                try:
                    count = os.preadv(file.fd, views, at)
                except OSError as error:
                    raise _unreadable(name, error) from error
                at += count
                if at == offset + total:
                    return
                if count == 0:
                    raise DamagedCheckpoint(
                        f"{name}: the file is truncated: bytes {offset} to {offset + total} are wanted, and it has "
                        f"{os.fstat(file.fd).st_size}"
                    )
                while count >= len(views[0]):
                    count -= len(views.pop(0))
                views[0] = views[0][count:]  # a short read
        finally:
            self._give_back(name, file, at - offset)

    def _fetch(self, name: str, offset: int, views: list[memoryview], total: int) -> None:
        try:
            raw = memoryview(locations.read_range(name, offset, offset + total))
        except OSError as error:
            raise _unreadable(name, error) from error
        if len(raw) != total:
            raise DamagedCheckpoint(
                f"{name}: the file is truncated: bytes {offset} to {offset + total} are wanted, and there are "
                f"{len(raw)} of them"
            )
        for view in views:
            view[:], raw = raw[: len(view)], raw[len(view) :]
        with self._lock:
            self.bytes_read += total

    @staticmethod
    def _stat(name: str | os.PathLike[str]) -> locations.Stat:
        try:
            return locations.stat(name)
        except OSError as error:
            raise _unreadable(name, error) from error

    def _taken(self, name: str) -> _OpenFile:
        """The file, open until it is given back."""
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                file.users += 1
                return file
        # Opened without the lock: on a network file system this can take long.
        try:
            fd = locations.open_file(name)
        except OSError as error:
            raise _unreadable(name, error) from error
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _OpenFile(fd)
            else:
                os.close(fd)  # another thread was faster
            file.users += 1
            return file

    def _give_back(self, name: str, file: _OpenFile, count: int) -> None:
        """The opposite of `_taken`, after so many bytes were read."""
        with self._lock:
            self.bytes_read += count
            file.users -= 1
            if file.dropped:
                if file.users == 0:
                    os.close(file.fd)
            elif len(self._files) > 1:
                self._files.move_to_end(name)
                if len(self._files) > self._keep_open:
                    self._shrink(self._keep_open)

    def _shrink(self, keep: int) -> None:
        for name in list(self._files):
            if len(self._files) <= keep:
                break
            file = self._files[name]
            if file.users == 0:
                os.close(file.fd)
            elif keep:
                continue
            else:
                file.dropped = True  # its last reader closes it
            del self._files[name]


def _unreadable(name: str | os.PathLike[str], error: OSError) -> DamagedCheckpoint:
    """What to raise for a file that cannot be read. If its folder is gone, too, that is no damage."""
    if isinstance(error, FileNotFoundError):
        folder = os.path.dirname(str(name))
        with suppress(OSError):
            if not locations.exists(folder):
                return RemovedMeanwhile(
                    f"{name}: its folder is no longer there: the checkpoint was moved, or removed meanwhile, as a run "
                    "with keep_last does"
                )
    return DamagedCheckpoint(f"{name}: cannot be read: {error.strerror or error}")
