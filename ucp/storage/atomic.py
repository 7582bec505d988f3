"""Writing a folder, or a file, so that a reader finds all of it or nothing.

A folder is written under a temporary name beside its destination, flushed to disk, and renamed. On one file system a
rename is atomic. An old folder at the destination is exchanged with the new one in the same way. A process that dies
leaves its temporary folder behind. The next commit to the same destination from this machine removes it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ucp import limits
from ucp.errors import DestinationError
from ucp.printable import logger
from ucp.storage import disk, locations

log = logger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_LEFTOVER = re.compile(r"\.ucp-(tmp|old)-(.+)-(\d+)-([0-9a-f]{8})[0-9a-f]{8}")


@contextmanager
def staged(dest: str | os.PathLike[str], *, needed_bytes: int, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `dest` when the block ends without an exception, and vanishes otherwise.

    Before the block: raises `DestinationError` if `dest` exists (unless `replace`), if its place cannot be written, or
    if less than `needed_bytes` are free there. With `replace`, `dest` is the old folder until it is the new one.
    """
    target = Path(os.path.abspath(dest))
    check_destination(target, needed_bytes=needed_bytes, replace=replace)
    made = _make_parents(target.parent)
    try:
        _sweep(target)
        temporary = _make_temporary(target)
        filled = False
        try:
            yield temporary
            filled = True
            sync_tree(temporary)
            _publish(temporary, target, replace)
        except OSError as error:
            if error.errno in _FULL:
                raise DestinationError(f"{target}: the file system became full while it was written") from error
            if filled:
                raise DestinationError(f"{target}: cannot be put in place: {error.strerror or error}") from error
            raise
        finally:
            # After an exchange this is the old folder; after an error, the unfinished new one.
            _remove(temporary)
    except BaseException:
        for folder in reversed(made):
            _remove_if_empty(folder)
        raise
    try:
        for folder in (target, *reversed(made)):
            _sync(folder.parent)
    except OSError as error:
        raise DestinationError(
            f"{target}: is in its place, but may not outlive a power cut: {error.strerror or error}"
        ) from error


# --- the same in steps, for several processes that fill one folder ---------------------------------------------------


def reserve(dest: str | os.PathLike[str], keep: Collection[str] = (), process: int | None = None) -> Path:
    """Make a temporary folder beside `dest` for this and other processes to fill, then `publish` or `discard`.

    Also removes what dead processes have left of any commit in `dest`'s folder. What another machine has left is
    removed once it has not been written to for `limits.STALE_FOLDER_SECONDS`.

    keep: names of temporary folders of this process and of ``process`` that are in use.
    process: the process that the folder is for, on the same machine; default is this one.

    Raises `DestinationError`.
    """
    owner = os.getpid() if process is None else process
    target = Path(os.path.abspath(dest))
    made = _make_parents(target.parent)
    try:
        temporary = _make_temporary(target, owner)
    except DestinationError:
        for folder in reversed(made):
            _remove_if_empty(folder)
        raise
    try:
        _sweep_all(target.parent, {*keep, temporary.name}, {os.getpid(), owner}, temporary.stat().st_mtime)
        for folder in reversed(made):
            _sync(folder.parent)
    except OSError as error:
        _remove(temporary)
        raise DestinationError(f"{target.parent}: cannot be used: {error.strerror or error}") from error
    return temporary


def publish(temporary: Path, dest: str | os.PathLike[str]) -> None:
    """Put a reserved folder, whose files are already on disk, in the place of `dest`. It replaces any folder there.

    `dest` is the old folder until it is the new one. Raises `DestinationError`.
    """
    target = Path(os.path.abspath(dest))
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise DestinationError(f"{target}: the destination to be replaced is not a folder")
    try:
        _sync(temporary)
        _publish(temporary, target, replace=True)
        _sync(target.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise DestinationError(f"{target}: the file system became full while it was put in place") from error
        raise DestinationError(f"{target}: cannot be flushed to the device: {error.strerror or error}") from error
    _remove(temporary)  # after an exchange this is the old folder


def remove_whole(folder: Path) -> None:
    """Remove a folder so that at every instant it is whole or gone: it is renamed first. Raises OSError."""
    temporary = _temporary_name(folder)
    disk.rename(folder, temporary)
    _sync(folder.parent)
    _remove(temporary)


def discard(temporary: Path) -> None:
    """Remove a reserved folder that will not be published."""
    _remove(temporary)


def _sweep_all(folder: Path, keep: Collection[str], own: Collection[int], now: float) -> None:
    here = machine_of_process()
    for entry in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.is_symlink() or entry.name in keep:
            continue
        kind, name, process, place = match.groups()
        if kind == "old" and not os.path.lexists(folder / name):
            if place == here and not is_alive(int(process)):
                disk.rename(entry, folder / name)  # see _sweep
            continue
        if place == here:
            # What these processes use is in `keep`. They have given up the rest, or others had the same numbers.
            unused = int(process) in own or not is_alive(int(process))
        else:
            unused = now - _newest(entry) > limits.STALE_FOLDER_SECONDS
        if unused:
            _remove(entry)


def _newest(entry: Path) -> float:
    """When the entry, or a file in it, was last written, in seconds."""
    times = [entry.stat().st_mtime]
    if entry.is_dir():
        with os.scandir(entry) as inside:
            times += [item.stat(follow_symlinks=False).st_mtime for item in inside]
    return max(times)


def check_destination(dest: str | os.PathLike[str], *, needed_bytes: int, replace: bool = False) -> None:
    """Raise `DestinationError` unless a folder of that many bytes can be made at `dest`; nothing is changed."""
    target = Path(os.path.abspath(dest))
    if not target.name:
        raise DestinationError(f"{target}: cannot be a destination; name a folder that does not exist yet")
    if os.path.lexists(target):
        if not replace:
            raise DestinationError(f"{target}: the destination exists already; choose another or remove it")
        if target.is_symlink() or not target.is_dir():
            raise DestinationError(f"{target}: the destination to be replaced is not a folder")
    place = target.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise DestinationError(f"{target}: cannot be made, since {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DestinationError(f"{target}: cannot be made, since the folder {place} is not writable")
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise DestinationError(f"{target}: cannot tell how much space is left: {error.strerror or error}") from error
    if free < needed_bytes:
        raise DestinationError(f"{target}: {needed_bytes} bytes are needed, and {free} are free in {place}")


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file such as `latest`: a reader finds the old content or the new. Raises `DestinationError`."""
    target = Path(os.path.abspath(path))
    temporary = _temporary_name(target)
    try:
        disk.write_new(temporary, data)
        disk.rename(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise DestinationError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        try:
            disk.remove_file(temporary, missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", temporary, error.strerror or error)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and itself, to disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


# --- names -----------------------------------------------------------------------------------------------------------


def machine_of_process() -> str:
    """Where this process's number means something, in the names of temporary folders: its machine, and there its
    container. 8 hexadecimal digits."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return xxhash.xxh32_hexdigest(f"{os.uname().nodename} {namespace}".encode())


def _temporary_name(target: Path, process: int | None = None) -> Path:
    process = process or os.getpid()
    return target.with_name(f".ucp-tmp-{target.name}-{process}-{machine_of_process()}{os.urandom(4).hex()}")


def _make_temporary(target: Path, process: int | None = None) -> Path:
    temporary = _temporary_name(target, process)
    try:
        disk.make_folder(temporary)
    except OSError as error:
        raise DestinationError(f"{target}: cannot be made: {error.strerror or error}") from error
    return temporary


def _make_parents(parent: Path) -> list[Path]:
    missing: list[Path] = []
    folder = parent
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    for folder in reversed(missing):
        try:
            disk.make_folder(folder)
        except FileExistsError:
            continue  # another process was faster
        except OSError as error:
            for other in reversed(made):
                _remove_if_empty(other)
            raise DestinationError(f"{folder}: cannot be made: {error.strerror or error}") from error
        made.append(folder)
    return made


def _sweep(target: Path) -> None:
    """Remove what dead processes have left of commits to this destination."""
    pattern = re.compile(rf"\.ucp-(tmp|old)-{re.escape(target.name)}-(\d+)-([0-9a-f]{{8}})[0-9a-f]{{8}}")
    here = machine_of_process()
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or entry.is_symlink():
            continue
        kind, process, place = match.groups()
        if place != here:
            log.warning("%s was left by a commit on another machine; remove it if none is under way", entry)
        elif not is_alive(int(process)):
            if kind == "old" and not os.path.lexists(target):
                # Died between the two renames of a replacement: the old folder is the one to keep.
                disk.rename(entry, target)
            else:
                _remove(entry)


def is_alive(process: int) -> bool:
    """Whether there is a process of this number on this machine that has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    try:
        # A dead process that nobody waits for keeps its number, as in a container whose first process does not wait.
        return Path(f"/proc/{process}/stat").read_text("latin-1").rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


# --- renaming --------------------------------------------------------------------------------------------------------


def _publish(temporary: Path, target: Path, replace: bool) -> None:
    try:
        if not os.path.lexists(target):
            if not disk.rename_with(temporary, target, disk.NOREPLACE):
                disk.rename(temporary, target)
        elif not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        elif not disk.rename_with(temporary, target, disk.EXCHANGE):
            old = target.with_name(temporary.name.replace(".ucp-tmp-", ".ucp-old-", 1))
            disk.rename(target, old)
            try:
                disk.rename(temporary, target)
            except OSError:
                disk.rename(old, target)
                raise
            _sync(target.parent)
            _remove(old)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise DestinationError(f"{target}: cannot be put in place: {error.strerror or error}") from error


def set_aside(target: Path) -> Path | None:
    """Where the old folder is, if a replacement of ``target`` ended between its two renames; else None.

    That can happen on file systems that cannot exchange folders. The next commit puts the old folder back. None also if
    ``target`` is there.
    """
    if locations.is_remote(target) or os.path.lexists(target):
        return None
    try:
        names = os.listdir(target.parent)
    except OSError:
        return None
    found = [(match, name) for name in sorted(names) if (match := _LEFTOVER.fullmatch(name)) is not None]
    old = [target.parent / name for match, name in found if match[1] == "old" and match[2] == target.name]
    return old[0] if len(old) == 1 else None


# --- small steps -----------------------------------------------------------------------------------------------------


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        disk.flush(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush folders
            raise
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        disk.remove_tree(folder)
        if folder.exists():
            left = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
            log.warning(
                "%s could not be removed: %d bytes of it are left; the next save or commit removes it", folder, left
            )
    elif os.path.lexists(folder):
        try:
            disk.remove_file(folder)
        except OSError as error:
            log.warning("%s could not be removed: %s", folder, error.strerror or error)


def _remove_if_empty(folder: Path) -> None:
    try:
        disk.remove_folder(folder)
    except OSError:
        log.debug("%s was kept: it is in use by now", folder)
