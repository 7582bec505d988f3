"""Files and folders by path or by URL: what is needed of them, wherever they lie.

A local location is a `Path`. A URL of any file system that fsspec knows (``s3://``, ``gs://``, ``hf://``) is a `UPath`
of the universal-pathlib package, which joins and splits names in the same way. Its files are only touched here. So
whatever goes wrong is an OSError everywhere, raised after a few attempts if another attempt may help.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from stat import S_ISBLK, S_ISCHR, S_ISDIR, S_ISFIFO, S_ISREG, S_ISSOCK
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from ucp import limits
from ucp.errors import BadArgument
from ucp.storage.kept import SCHEME

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Stat:
    """size: bytes. mtime_ns: when it was last written, in nanoseconds; 0 if the file system does not tell."""

    size: int
    mtime_ns: int


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether this is a URL."""
    return _URL.match(str(path)) is not None


def is_far(path: str | os.PathLike[str]) -> bool:
    """Whether its bytes have to be fetched: it is a URL, and does not lie in the memory of a keeper on this machine.

    Raises OSError if that cannot be told.
    """
    if not str(path).startswith(SCHEME):
        return is_remote(path)
    fs, name = _filesystem(path)
    found = fs.descriptor(name) if hasattr(fs, "descriptor") else None
    if found is None:
        return True
    os.close(found)
    return False


def can_be_path(text: str) -> bool:
    """Whether the system can take this text as a path at all: no NUL, and nothing that it cannot encode."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def locate(path: str | os.PathLike[str]) -> Path:
    """The location of this path or URL. Local paths are made absolute.

    Raises BadArgument if the packages that read URLs are missing or do not know this kind of URL.
    """
    text = str(path) if is_remote(path) else os.path.abspath(path)
    if not is_remote(text):
        from pathlib import Path  # late: the commands' --help needs none of it

        return Path(text)
    if (found := _kept(text)) is not None:
        return found
    try:
        from upath import UPath
    except ImportError as error:
        raise BadArgument(f"{text}: URLs need further packages: pip install 'universal-checkpoint[remote]'") from error
    try:
        # No cache of listings: a checkpoint may appear while this process runs.
        return cast("Path", UPath(text, use_listings_cache=False))
    except (ImportError, ValueError) as error:
        raise BadArgument(f"{text}: {error}") from error


def _kept(text: str) -> Path | None:
    """The location of a name in the memory of keepers."""
    if not text.startswith(SCHEME):
        return None
    from ucp.storage.kept.files import find  # late: few need sockets

    return cast("Path | None", find(text))


def stat(path: str | os.PathLike[str]) -> Stat:
    """Size and time of a file. Raises OSError."""
    if not is_remote(path):
        found = os.stat(path)
        return Stat(found.st_size, found.st_mtime_ns)
    fs, name = _filesystem(path)
    info = attempted(path, lambda: fs.info(name))
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    when = info.get("LastModified") or info.get("mtime") or info.get("created") or info.get("updated") or 0
    seconds = when.timestamp() if hasattr(when, "timestamp") else when
    return Stat(int(info["size"]), int(seconds * 1e9) if isinstance(seconds, (int, float)) else 0)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder, or a dangling link. Raises OSError if that cannot be told."""
    if not is_remote(path):
        return os.path.lexists(path)
    fs, name = _filesystem(path)
    return bool(attempted(path, lambda: fs.exists(name)))


def tagged(text: str) -> tuple[str, str | None]:
    """A path and a tag. ``path@tag`` is taken apart, unless there is such a path. Raises OSError if that cannot be
    told."""
    path, at, tag = text.rpartition("@")
    return (path, tag) if at and not exists(locate(text)) else (text, None)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a file. Raises OSError if that cannot be told for a URL."""
    if not is_remote(path):
        return os.path.isfile(path)
    fs, name = _filesystem(path)
    return bool(attempted(path, lambda: fs.isfile(name)))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether there is such a folder. Raises OSError if that cannot be told for a URL."""
    if not is_remote(path):
        return os.path.isdir(path)
    fs, name = _filesystem(path)
    return bool(attempted(path, lambda: fs.isdir(name)))


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The names in a folder, sorted. Raises OSError."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    fs, name = _filesystem(folder)
    found = attempted(folder, lambda: fs.ls(name, detail=False))
    own = name.rstrip("/").rsplit("/", 1)[-1]
    return sorted({text for path in found if (text := path.rstrip("/").rsplit("/", 1)[-1]) and text != own})


def newest_ns(folder: str | os.PathLike[str]) -> int:
    """When the newest file in a folder was written, in nanoseconds; 0 if there are no files. Raises OSError."""
    place = locate(folder)
    return max((stat(place / name).mtime_ns for name in names(folder) if is_file(place / name)), default=0)


def is_link(path: str | os.PathLike[str]) -> bool:
    """Whether this is a symbolic link, to something or to nothing. Behind a URL there are none."""
    return not is_remote(path) and os.path.islink(path)


def kind(path: str | os.PathLike[str]) -> str:
    """What lies at a local path, in words: "a file", "a folder", "a pipe", …; nothing is opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return "a link that leads in a circle" if error.errno == errno.ELOOP else "a link to nothing"
        return "nothing" if isinstance(error, FileNotFoundError) else f"unknown ({error.strerror or error})"
    return next((text for is_so, text in _KINDS if is_so(mode)), "no regular file")


_KINDS = (
    (S_ISREG, "a file"),
    (S_ISDIR, "a folder"),
    (S_ISFIFO, "a pipe"),
    (S_ISSOCK, "a socket"),
    (S_ISCHR, "a device"),
    (S_ISBLK, "a device"),
)


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor of a local regular file, or of one that is not `is_far`, to read from. Raises OSError.

    A pipe or a device under a checkpoint's name could make a reader wait for ever, or do what a device does. So the
    file is opened without waiting and checked by its descriptor, and nobody can put another in its place meanwhile.
    """
    if is_remote(path):
        fs, name = _filesystem(path)
        held: int | None = fs.descriptor(name)
        if held is None:
            raise FileNotFoundError(errno.ENOENT, "no keeper on this machine holds it any more", str(path))
        return held
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise _irregular(path) from error
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
            raise type(error)(error.errno, f"it is {kind(path)}", os.fspath(path)) from error
        raise
    try:
        mode = os.fstat(fd).st_mode
        if S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not S_ISREG(mode):
            raise _irregular(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _irregular(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, f"it is {kind(path)}, and no regular file", os.fspath(path))


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file, open for reading and seeking. Raises OSError."""
    if not is_remote(path):
        with open(open_file(path), "rb") as stream:
            yield stream
        return
    fs, name = _filesystem(path)
    remote = attempted(path, lambda: fs.open(name, "rb", block_size=limits.REMOTE_BLOCK_BYTES, cache_type="background"))
    with remote as stream, translated(path):
        yield stream


def read(path: str | os.PathLike[str], at_most: int = limits.WHOLE_FILE_BYTES) -> bytes:
    """A whole, small file. Raises OSError, also for one of more bytes than ``at_most``."""
    if not is_remote(path):
        with open(open_file(path), "rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            if nbytes > at_most:
                text = f"it has {nbytes} bytes, and at most {at_most} are expected of it"
                raise OSError(errno.EFBIG, text, os.fspath(path))
            return stream.read(nbytes)
    fs, name = _filesystem(path)
    return bytes(attempted(path, lambda: fs.cat_file(name)))


def read_range(path: str | os.PathLike[str], start: int, stop: int) -> bytes | memoryview:
    """The bytes ``[start, stop)`` of a remote file; fewer if it ends before ``stop``. Raises OSError."""
    fs, name = _filesystem(path)
    found: bytes | memoryview = attempted(path, lambda: fs.cat_file(name, start=start, end=stop))
    return found


def write(url: str | os.PathLike[str], raw: bytes) -> None:
    """Write a small file to a URL in one request. A reader finds the old content or the new. Raises OSError."""
    fs, name = _filesystem(url)
    attempted(url, lambda: fs.pipe_file(name, raw))


def remove(url: str | os.PathLike[str]) -> None:
    """Remove a file at a URL. Raises OSError."""
    fs, name = _filesystem(url)
    attempted(url, lambda: fs.rm_file(name))


def remove_tree(url: str | os.PathLike[str]) -> None:
    """Remove everything below a URL. Raises OSError."""
    fs, name = _filesystem(url)
    attempted(url, lambda: fs.rm(name, recursive=True))


@contextmanager
def created(url: str | os.PathLike[str], part: int) -> Iterator[Any]:
    """A stream into a new file at a URL, sent in parts of ``part`` bytes. If the block raises, no file is made.

    Raises OSError.
    """
    fs, name = _filesystem(url)
    stream = attempted(url, lambda: fs.open(name, "wb", block_size=part))
    with translated(url):
        try:
            yield stream
            stream.close()  # sends the last part, which may fail like any other
        except BaseException:
            with suppress(Exception):
                stream.discard()
            # A file object that was given up must not complete the upload when it is collected.
            stream.closed = True
            raise


def _filesystem(path: str | os.PathLike[str]) -> tuple[Any, str]:
    place: Any = locate(path)
    return place.fs, place.path


@contextmanager
def translated(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a file system's own library raises into an OSError that names the class."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the libraries below fsspec have exceptions of their own
        if type(error).__module__.startswith(("ucp", "builtins")):
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def attempted(path: str | os.PathLike[str], work: Callable[[], T]) -> T:
    """Do ``work``, and try again after a pause if the failure may be temporary. Raises OSError."""

    def once() -> T:
        with translated(path):
            return work()

    if _kept(str(path)) is not None:  # no network is involved, so no failure is temporary
        return once()
    # Imported late: only URLs need it.
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

    attempts = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(limits.REQUEST_ATTEMPTS_COUNT),
        wait=wait_exponential(limits.REQUEST_FIRST_PAUSE_SECONDS),
        reraise=True,
    )
    return attempts(once)


def _may_pass(error: BaseException) -> bool:
    """Whether trying again may help: a missing file stays missing, a broken connection does not stay broken."""
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting)
