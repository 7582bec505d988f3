"""What writing does to a local file system: all by which a save, a commit, a conversion or retention changes it.

Nothing but the system's own calls; so a test can put a simulated disk in their place, which forgets at a power cut what
was not flushed, gets full, fails, and writes less than it was asked to. All raise OSError, but for `remove_tree`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
NOREPLACE = 1
EXCHANGE = 2


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make one folder, which is not there."""
    os.mkdir(path)


def make_folders(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it, as far as they are not there."""
    if not os.path.isdir(path):
        make_folders(os.path.dirname(path))
        with suppress(FileExistsError):  # another process was faster
            make_folder(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove an empty folder."""
    os.rmdir(path)


def remove_file(path: str | os.PathLike[str], missing_ok: bool = False) -> None:
    """Remove a file or a link."""
    Path(path).unlink(missing_ok=missing_ok)


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a folder and all in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file or folder another name; a file of that name is replaced."""
    os.replace(source, target)


def rename_with(source: str | os.PathLike[str], target: str | os.PathLike[str], flags: int) -> bool:
    """Linux's renameat2, with `NOREPLACE` or `EXCHANGE`; False where the system or the file system does not have it."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))


def open_to_write(path: str | os.PathLike[str], flags: int = os.O_WRONLY | os.O_CREAT | os.O_EXCL) -> int:
    """A descriptor; by default of a new file. A pipe of that name does not wait for its reader."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def resize(fd: int, size: int) -> None:
    """Let a file have this many bytes."""
    os.ftruncate(fd, size)


def write(fd: int, data: Any) -> int:
    """Write at the descriptor's place; returns how many bytes that were."""
    return os.write(fd, data)


def write_at(fd: int, data: Any, offset: int) -> int:
    """Write at a byte offset; returns how many bytes that were."""
    return os.pwrite(fd, data, offset)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however little is taken at a time."""
    view = memoryview(data)
    while view:
        view = view[write(fd, view) :]


def flush(fd: int, data_only: bool = False) -> None:
    """Let a file's bytes, or a folder's names, be on the device. data_only: of a file its bytes and its size alone."""
    (os.fdatasync if data_only else os.fsync)(fd)


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """A new small file, its bytes on the device."""
    fd = open_to_write(path)
    try:
        write_all(fd, data)
        flush(fd)
    finally:
        os.close(fd)
