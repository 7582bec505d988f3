"""The folder in which a conversion grows until it is whole, and in which an interrupted one is found again.

It is called ``.ucp-part-out`` beside a destination ``out``, one for each destination, and has:

- ``checkpoint/``: what becomes the destination;
- ``journal/``: which parts of it were written;
- ``team/``: files of the processes that share the work;
- ``identity``: the digest of everything that decides the bytes; with another one, the work begins anew;
- ``lock``: only the process that holds it may change the rest.

It may lie beside a checkpoint that somebody else wrote, and be somebody else's, too. So no link in it is followed: it
would lead out of the destination, and what is there would be overwritten or removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ucp.errors import DestinationError, ProcessLost
from ucp.printable import logger
from ucp.storage import disk, locations
from ucp.storage.atomic import staged, sync_tree, write_atomic

log = logger(__name__)

CHECKPOINT, JOURNAL, TEAM = "checkpoint", "journal", "team"
_IDENTITY, _LOCK = "identity", "lock"


def part_folder(dest: str | os.PathLike[str]) -> Path:
    """Where a conversion to this destination grows."""
    target = Path(os.path.abspath(dest))
    return target.with_name(f".ucp-part-{target.name}")


def held_bytes(dest: str | os.PathLike[str], identity: str) -> int:
    """Bytes on disk that a conversion of this identity can continue from."""
    part = part_folder(dest)
    if _read(part / _IDENTITY) != identity:
        return 0
    return sum(path.lstat().st_blocks * 512 for path in (part / CHECKPOINT).rglob("*") if path.is_file())


@contextmanager
def growing(dest: str | os.PathLike[str], identity: str, *, replace: bool, resume: bool) -> Iterator[Path]:
    """The folder of a conversion to `dest`, locked by this process. What grew in it becomes `dest` when the block ends.

    With ``resume`` it holds what an earlier conversion of the same identity has left. It stays for the next conversion
    after an error that leaves the bytes written valid (an interruption, a full disk, a lost process).

    Raises `DestinationError` if it cannot be made, another process has it, or `dest` cannot be put in place.
    """
    part = part_folder(dest)
    made = _make(part)
    keep = False
    try:
        with _locked(part):
            try:
                _prepare(part, identity, resume)
                yield part
                _publish(part, dest, replace)
            except BaseException as error:
                keep = resume and _is_passing(error) and _has_begun(part)
                raise
            finally:
                if keep:
                    log.warning("what was written stays in '%s'; the same conversion continues from there", part)
                else:
                    disk.remove_tree(part)
    except BaseException:
        for folder in reversed(made):
            _remove_if_empty(folder)
        raise


def _make(part: Path) -> list[Path]:
    """Make the folder and its parents. Returns the parents made."""
    made: list[Path] = []
    folder = part.parent
    while not os.path.lexists(folder):
        made.insert(0, folder)
        folder = folder.parent
    try:
        disk.make_folders(part)
    except OSError as error:
        for parent in reversed(made):
            _remove_if_empty(parent)
        raise DestinationError(
            f"{_destination(part)}: cannot be made, since '{part}' cannot: {error.strerror or error}"
        ) from error
    if part.is_symlink():
        raise DestinationError(
            f"{_destination(part)}: is made in '{part}', which is a link to '{os.readlink(part)}'; look at it, and "
            "remove it"
        )
    return made


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Hold the folder's lock. The system releases it when this process ends, however it ends."""
    path = part / _LOCK
    while True:
        try:
            if not os.path.isdir(part):
                disk.make_folder(part)
            fd = disk.open_to_write(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise DestinationError(f"{path}: cannot be made: {error.strerror or error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(fd)
                raise DestinationError(
                    f"{_destination(part)}: another process converts to it and has locked '{path}'; let that end first"
                ) from error
            log.debug("%s: this file system has no locks (%s)", path, error)
        try:
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        except FileNotFoundError:
            log.debug("%s: its last holder removed it", path)
        os.close(fd)
    try:
        yield
    finally:
        os.close(fd)


def _prepare(part: Path, identity: str, resume: bool) -> None:
    """Clear what cannot be continued, and make the folders."""
    try:
        if not resume or _read(part / _IDENTITY) != identity or _has_links(part):
            for entry in part.iterdir():
                if entry.name == _LOCK:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    disk.remove_tree(entry)
                else:
                    disk.remove_file(entry)
        for name in (CHECKPOINT, JOURNAL, TEAM):
            if not os.path.isdir(part / name):
                disk.make_folder(part / name)
        write_atomic(part / _IDENTITY, identity.encode())
    except OSError as error:
        raise DestinationError(f"{part}: cannot be used: {error.strerror or error}") from error


def _has_links(part: Path) -> bool:
    """Whether there are links in the folder. No conversion makes any."""
    return any(
        os.path.islink(os.path.join(folder, name))
        for folder, folders, files in os.walk(part)
        for name in (*folders, *files)
    )


def _publish(part: Path, dest: str | os.PathLike[str], replace: bool) -> None:
    try:
        sync_tree(part / CHECKPOINT)
    except OSError as error:
        raise DestinationError(f"{dest}: cannot be flushed to the device: {error.strerror or error}") from error
    with staged(dest, needed_bytes=0, replace=replace) as temporary:
        try:
            disk.rename(part / CHECKPOINT, temporary)
        except OSError as error:
            raise DestinationError(f"{dest}: cannot be put in place: {error.strerror or error}") from error


def _is_passing(error: BaseException) -> bool:
    """Whether the error is of a kind that may not happen again, and that leaves the bytes written valid."""
    if isinstance(error, Exception):
        return isinstance(error, (DestinationError, ProcessLost)) or isinstance(error.__cause__, OSError)
    return True


def _has_begun(part: Path) -> bool:
    return (part / CHECKPOINT).is_dir() and any(path.stat().st_size for path in (part / JOURNAL).glob("*"))


def _destination(part: Path) -> Path:
    return part.with_name(part.name.removeprefix(".ucp-part-"))


def _read(path: Path) -> str | None:
    try:
        return locations.read(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _remove_if_empty(folder: Path) -> None:
    try:
        disk.remove_folder(folder)
    except OSError:
        log.debug("%s was kept: it is in use by now", folder)
