"""``memory://`` names as locations, and their files, with the fsspec methods that `ucp.storage.locations` calls."""

from __future__ import annotations

import errno
import io
import mmap
import os
import threading
from dataclasses import dataclass
from typing import Any

from ucp import limits
from ucp.storage.kept import SCHEME, places
from ucp.storage.kept.client import Client, KeeperGone, of_note


class KeptPath(os.PathLike[str]):
    """A file or a folder in a run's memory, with as much of `Path` as is used here."""

    def __init__(self, run: str, path: str = "") -> None:
        self.run = run
        self.path = path.strip("/")

    def __str__(self) -> str:
        return f"{SCHEME}{self.run}" + (f"/{self.path}" if self.path else "")

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"KeptPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeptPath) and str(self) == str(other)

    def __lt__(self, other: KeptPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | os.PathLike[str]) -> KeptPath:
        return KeptPath(self.run, f"{self.path}/{os.fspath(name)}")

    @property
    def fs(self) -> KeptFiles:
        return of_run(self.run)

    @property
    def name(self) -> str:
        return (self.path or self.run).rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> KeptPath:
        return KeptPath(self.run, self.path.rpartition("/")[0])

    @property
    def parents(self) -> tuple[KeptPath, ...]:
        return (self.parent, *self.parent.parents) if self.path else ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (f"{SCHEME}{self.run}", *filter(None, self.path.split("/")))


@dataclass(frozen=True)
class Lease:
    """Memory of a keeper that one rank fills. memory, number: the keeper's numbers of the memory and of this lease."""

    run: str
    rank: int
    memory: int
    number: int
    size: int


class KeptFiles:
    """The files of one run, through a keeper on this machine: this node's keeper, or else any other."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._maps: dict[tuple[str, int], mmap.mmap] = {}

    @property
    def keeper(self) -> Client:
        """The keeper that is asked. Raises KeeperGone if no keeper of the run is on this machine."""
        with self._lock:
            if self._client is None:
                found = places.notes(self.run)
                if not found:
                    raise KeeperGone(errno.ENOENT, f"no keeper on this machine holds '{self.run}'")
                self._client = of_note(found[0])
            return self._client

    def forget(self) -> None:
        """Look for the keeper again, and map its memory anew."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None
            self._maps.clear()

    def _ask(self, op: str, body: Any = b"", **fields: Any) -> Any:
        try:
            return self.keeper.ask(op, body, **fields)
        except KeeperGone:
            self.forget()
            return self.keeper.ask(op, body, **fields)

    def info(self, path: str) -> dict[str, Any]:
        found = self._ask("stat", path=path).header["found"]
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return dict(found)

    def exists(self, path: str) -> bool:
        return self._ask("stat", path=path).header["found"] is not None

    def isfile(self, path: str) -> bool:
        return (self._ask("stat", path=path).header["found"] or {}).get("type") == "file"

    def isdir(self, path: str) -> bool:
        return (self._ask("stat", path=path).header["found"] or {}).get("type") == "directory"

    def ls(self, path: str, detail: bool = False) -> list[str]:
        return [str(name) for name in self._ask("names", path=path).header["names"]]

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes | memoryview:
        """The bytes ``[start, end)``, without a copy if the memory is on this node."""
        if end is None:
            end = int(self.info(path)["size"])
        mapped = self._mapped(path)
        if mapped is not None:
            return memoryview(mapped)[start : min(end, len(mapped))]
        parts = []
        for at in range(start, end, limits.KEEPER_PART_BYTES):
            part = self._ask("read", path=path, start=at, stop=min(at + limits.KEEPER_PART_BYTES, end)).body
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def descriptor(self, path: str) -> int | None:
        """A descriptor of the file's memory, to read from, if a keeper here holds it; None if it is small or elsewhere.
        It stays good if the keeper ends."""
        file: int | None = self._ask("file", path=path).file
        return file

    def _mapped(self, path: str) -> memoryview | None:
        """The file's memory if a keeper here holds it; None if it is small or elsewhere."""
        answer = self._ask("file", path=path)
        if answer.file is None:
            return None
        size = int(answer.header["size"])
        key = (str(answer.header["memory"]), size)
        try:
            with self._lock:
                if key not in self._maps:
                    self._maps[key] = mmap.mmap(answer.file, size, prot=mmap.PROT_READ)
                return memoryview(self._maps[key])
        finally:
            os.close(answer.file)

    def lease(self, rank: int, size: int) -> tuple[Lease, mmap.mmap]:
        """Memory for a rank's next file, and where it is in this process. Raises OSError."""
        answer = self._ask("lease", rank=rank, size=size)
        made = Lease(self.run, rank, int(answer.header["memory"]), int(answer.header["lease"]), size)
        return made, self._shared(answer, f"lease {answer.header['name']}", size)

    def leased(self, lease: Lease) -> mmap.mmap:
        """The same memory, in another process of this node."""
        answer = self._ask("leased", memory=lease.memory, lease=lease.number)
        return self._shared(answer, f"lease {answer.header['name']}", lease.size)

    def place(self, lease: Lease, path: str) -> None:
        """Make what was leased the file of this ``memory://`` name. Raises OSError."""
        inside = str(path).removeprefix(f"{SCHEME}{self.run}/")
        self._ask("place", path=inside, rank=lease.rank, memory=lease.memory, lease=lease.number, size=lease.size)

    def _shared(self, answer: Any, name: str, size: int) -> mmap.mmap:
        """The memory that came with an answer; the same object if it has come before."""
        try:
            with self._lock:
                key = (name, size)
                if key not in self._maps:
                    self._maps[key] = mmap.mmap(answer.file, size)
                return self._maps[key]
        finally:
            os.close(answer.file)

    def pipe_file(self, path: str, raw: Any) -> None:
        self._ask("put", bytes(raw), path=path)

    def rm_file(self, path: str) -> None:
        self._ask("remove", path=path)

    def rm(self, path: str, recursive: bool = True) -> None:
        self._ask("remove", path=path)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """The file, to be read or written as a whole."""
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        return _Created(self, path)


class _Created:
    """A new file of a node's own. It exists once it is closed."""

    def __init__(self, files: KeptFiles, path: str) -> None:
        self._files, self._path, self._body = files, path, bytearray()
        self.closed = False

    def __enter__(self) -> _Created:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, body: Any) -> int:
        self._body += body
        return len(body)

    def discard(self) -> None:
        self.closed = True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._files.keeper.ask("store", self._body, path=self._path)


_known: dict[str, KeptFiles] = {}


def of_run(run: str) -> KeptFiles:
    """The run's files. Within a process it is the same object each time."""
    return _known.setdefault(run, KeptFiles(run))


def find(url: str) -> KeptPath | None:
    """The location that a ``memory://`` name means; None if no keeper here has such a run."""
    text = url.removeprefix(SCHEME).rstrip("/")
    fitting = [run for run in _known if text == run or text.startswith(f"{run}/")]
    if fitting:
        run = max(fitting, key=len)
        return KeptPath(run, text[len(run) + 1 :])
    found = places.split(url)
    return None if found is None else KeptPath(*found)
