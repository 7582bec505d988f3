"""Where keepers are found: a folder that belongs to this user alone, with a note and a socket for each keeper.

``memory://RUN`` names the memory of a run. RUN is any text; by default it is the path of the folder that the run saves
to. Below it there are files as in that folder: ``memory://RUN/latest``, ``memory://RUN/global_step8/ucp.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ucp.errors import BadArgument
from ucp.storage.kept import SCHEME

FOLDER = "UCP_KEEPER_DIR"
NODE = "UCP_NODE"
DOMAIN = "UCP_DOMAIN"


@dataclass(frozen=True)
class Note:
    """What a keeper writes down so that others find it.

    domain: what fails together with this node.
    host, port: where other keepers reach it.
    token: the run's.
    """

    run: str
    node: str
    domain: str
    pid: int
    host: str
    port: int
    token: str
    socket: str


def node() -> str:
    """The name of this process's node: the host's name, unless UCP_NODE gives another."""
    return os.environ.get(NODE) or socket.gethostname()


def domain() -> str:
    """What fails together with this node: the node alone, unless UCP_DOMAIN names something larger (a rack)."""
    return os.environ.get(DOMAIN) or node()


def folder() -> Path:
    """The folder of notes and sockets. It is made if it does not exist.

    Raises BadArgument if it belongs to somebody else or if others may write to it.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    given = os.environ.get(FOLDER)
    default = Path(runtime, "ucp-keepers") if runtime else Path(tempfile.gettempdir(), f"ucp-keepers-{os.getuid()}")
    place = Path(given) if given else default
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = os.lstat(place)
    except OSError as error:
        raise BadArgument(
            f"{place}: cannot hold the sockets of keepers: {error.strerror or error}; set {FOLDER} to a folder of yours"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BadArgument(
            f"{place}: belongs to user {found.st_uid}, or others may write to it (mode {found.st_mode & 0o777:o}), so "
            f"no keeper there is trusted; set {FOLDER} to a folder of yours alone"
        )
    return place


def stem(run: str, node: str) -> str:
    """The name of a keeper's note and socket, without their endings. A socket's path has to be short."""
    return f"{_short(run)}-{_short(node)}"


def note_of(run: str, node: str) -> Note | None:
    """The note of this node's keeper; None if there is none."""
    return _read(folder() / f"{stem(run, node)}.json")


def notes(run: str | None = None) -> list[Note]:
    """All keepers' notes on this machine, or those of one run; this node's come first."""
    pattern = "*.json" if run is None else f"{_short(run)}-*.json"
    found = [made for path in sorted(folder().glob(pattern)) if (made := _read(path)) is not None]
    return sorted((one for one in found if run in (None, one.run)), key=lambda one: (one.node != node(), one.node))


def leave(note: Note) -> Path:
    """Write a keeper's note. Only its own user can read it."""
    path = folder() / f"{stem(note.run, note.node)}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w", encoding="utf-8") as stream:
        json.dump(asdict(note), stream)
    os.replace(temporary, path)
    return path


def forget(note: Note) -> None:
    """Remove what a keeper that is gone has left."""
    for path in (folder() / f"{stem(note.run, note.node)}.json", Path(note.socket)):
        if path.parent == folder():
            path.unlink(missing_ok=True)


def split(url: str) -> tuple[str, str] | None:
    """The run and the path below it that a ``memory://`` name means; None if no keeper here has such a run."""
    text = url.removeprefix(SCHEME).rstrip("/")
    return _split(text, [one.run for one in notes()])


def _split(text: str, runs: Sequence[str]) -> tuple[str, str] | None:
    fitting = [run for run in runs if text == run or text.startswith(f"{run}/")]
    if not fitting:
        return None
    run = max(fitting, key=len)
    return run, text[len(run) + 1 :]


def _read(path: Path) -> Note | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(fd, encoding="utf-8") as stream:
            found = os.fstat(fd)
            if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
                return None
            return Note(**json.load(stream))
    except (OSError, ValueError, TypeError):
        return None


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
