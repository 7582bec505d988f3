"""All operations by which a save, a commit, a conversion or retention changes a local file system.

They are nothing but the system's own calls. So a test can put a simulated disk in their place. That disk loses at a
power cut what was not flushed, gets full, fails, and writes less than it was asked to. All of them raise OSError,
except `remove_tree`.
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
    """Make one folder, which must not exist yet."""
    os.mkdir(path)


def make_folders(path: str | os.PathLike[str]) -> None:
    """Make a folder and those above it, if they do not exist yet."""
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
    """Remove a folder and everything in it, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file or folder another name. A file that already has the name is replaced."""
    os.replace(source, target)


def rename_with(source: str | os.PathLike[str], target: str | os.PathLike[str], flags: int) -> bool:
    """Linux's renameat2, with `NOREPLACE` or `EXCHANGE`. False if the system or the file system does not have it."""
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
    """A descriptor, by default of a new file. If there is a pipe of that name, this does not wait for its reader; a
    link of that name is not followed, for it may lead to somebody's file."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)


def resize(fd: int, size: int) -> None:
    """Give a file this many bytes."""
    os.ftruncate(fd, size)


def write(fd: int, data: Any) -> int:
    """Write at the descriptor's position. Returns how many bytes were written."""
    return os.write(fd, data)


def write_at(fd: int, data: Any, offset: int) -> int:
    """Write at a byte offset. Returns how many bytes were written."""
    return os.pwrite(fd, data, offset)


def write_all(fd: int, data: bytes) -> None:
    """Write all of the data, however few bytes each call writes."""
    view = memoryview(data)
    while view:
        view = view[write(fd, view) :]


def flush(fd: int, data_only: bool = False) -> None:
    """Put a file's bytes, or a folder's names, on the device. data_only: only a file's bytes and size."""
    (os.fdatasync if data_only else os.fsync)(fd)


def write_new(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a new small file and put its bytes on the device."""
    fd = open_to_write(path)
    try:
        write_all(fd, data)
        flush(fd)
    finally:
        os.close(fd)
