"""A disk that forgets: it takes the place of `ucp.storage.disk`, and a seed says what goes wrong when.

The operations are carried out for real, in memory (tmpfs), and noted. A power cut keeps what the rules of a journaling
file system keep: names as of some moment not before the last flush of a folder, in the order in which they were made;
of each file the bytes of its last flush, or any beginning of what was written since, or nothing.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from ucp.storage import disk

OPERATIONS = (
    "make_folder", "remove_folder", "remove_file", "remove_tree", "rename", "rename_with", "open_to_write", "resize",
    "write", "write_at", "flush",
)  # fmt: skip


class PowerCut(BaseException):
    """The machine is off: nothing that the program still does has any effect."""


@dataclass
class SteppingClock:
    """The time of day that all code sees, and that files get. seconds: by how much it is wrong now. Clocks that only
    run forward (``time.monotonic``, ``time.perf_counter``) are left alone, as a system leaves them."""

    seconds: float = 0.0

    @contextmanager
    def inserted(self) -> Any:
        """In the place of every function that tells the time of day. The times of files are `SimulatedDisk`'s."""
        real = {name: getattr(time, name) for name in ("time", "time_ns", "gmtime", "localtime", "strftime")}

        def told(name: str) -> Callable[..., Any]:
            return lambda given=None: real[name](self.now() if given is None else given)

        with ExitStack() as stack:
            for name, now in {
                "time": self.now,
                "time_ns": lambda: real["time_ns"]() + int(self.seconds * 1e9),
                "gmtime": told("gmtime"),
                "localtime": told("localtime"),
                "strftime": lambda text, given=None: real["strftime"](
                    text, time.localtime() if given is None else given
                ),
            }.items():
                stack.enter_context(mock.patch.object(time, name, now))
            yield self

    def now(self) -> float:
        return _now() + self.seconds


_now = time.time


@dataclass(eq=False)
class Node:
    """A file (data, and durable: its bytes as of its last flush) or a folder (entries). written: when, in seconds."""

    entries: dict[str, Node] | None = None
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    written: float = 0.0

    @classmethod
    def of(cls, path: Path) -> Node:
        written = path.stat().st_mtime
        if path.is_dir():
            return cls({child.name: cls.of(child) for child in path.iterdir()}, written=written)
        raw = path.read_bytes()
        return cls(None, bytearray(raw), raw, written)


@dataclass
class SimulatedDisk:
    """root: the folder that the disk is. cut_at, fail_at: before which operation the power goes, and which fails with
    which error number; further ones as long as ``fail_for`` says. step_at: before which the clock steps, by ``step``
    seconds."""

    root: Path
    random: random.Random
    clock: SteppingClock = field(default_factory=SteppingClock)
    step_at: int | None = None
    step: float = 0.0
    cut_at: int | None = None
    fail_at: int | None = None
    error: int = errno.ENOSPC
    fail_for: int = 1
    done: int = 0
    off: bool = False
    no_exchange: bool = False
    only_writes: bool = False

    def __post_init__(self) -> None:
        self.tree = Node.of(self.root)
        self._kept = self._copied(self.tree)
        self._log: list[Callable[[], None]] = []  # what happened to names; played on ``_kept``
        self._flushed = 0
        self._fds: dict[int, Node] = {}
        self._lock = threading.RLock()
        self._real: dict[str, Any] = {name: getattr(disk, name) for name in OPERATIONS}

    @staticmethod
    def _copied(tree: Node) -> dict[Node, dict[str, Node]]:
        out: dict[Node, dict[str, Node]] = {}
        todo = [tree]
        while todo:
            node = todo.pop()
            if node.entries is not None:
                out[node] = dict(node.entries)
                todo.extend(node.entries.values())
        return out

    @contextmanager
    def inserted(self) -> Any:
        with mock.patch.multiple(disk, **{name: getattr(self, name) for name in OPERATIONS}):
            yield self

    # --- faults ------------------------------------------------------------------------------------------------------

    def _step(self, writes: bool = False) -> bool:
        """Count an operation; True where a write is to be a short one."""
        if self.off:
            raise PowerCut
        at, self.done = self.done, self.done + 1
        if at == self.step_at:
            self.clock.seconds += self.step
        if at == self.cut_at:
            self.off = True
            raise PowerCut
        spared = self.only_writes and not writes  # a full disk lets files be removed
        if self.fail_at is not None and not spared and self.fail_at <= at < self.fail_at + self.fail_for:
            raise OSError(self.error, os.strerror(self.error))
        return writes and self.random.random() < 0.2

    def image(self, target: Path, worst: bool = False) -> None:
        """What is on the disk once the power is back. worst: nothing that was not flushed."""
        kept = len(self._log) if not self.off and not worst else self.random.randint(self._flushed, len(self._log))
        if worst:
            kept = self._flushed
        for play in self._log[:kept]:
            play()
        self._write(self.tree, target, worst)

    def _write(self, node: Node, path: Path, worst: bool) -> None:
        if node in self._kept:
            path.mkdir()
            for name, child in self._kept[node].items():
                self._write(child, path / name, worst)
            os.utime(path, (node.written, node.written))
            return
        raw = bytes(node.data)
        if raw != node.durable and (self.off or worst):
            ways = [node.durable, b"", raw[: self.random.randint(0, len(raw))], raw]
            raw = node.durable if worst else self.random.choice(ways)
        path.write_bytes(raw)
        os.utime(path, (node.written, node.written))

    def _stamp(self, node: Node, real: Any) -> None:
        """Give a file or folder that has just changed the time that it is now. real: its path or descriptor."""
        node.written = self.clock.now()
        if self.clock.seconds:
            os.utime(real, (node.written, node.written))

    # --- the operations ----------------------------------------------------------------------------------------------

    def _at(self, path: Any) -> tuple[Node, str]:
        """The folder's node, and the name in it."""
        parts = Path(path).relative_to(self.root).parts
        node = self.tree
        for part in parts[:-1]:
            node = (node.entries or {})[part]
        return node, parts[-1]

    def _note(self, play: Callable[[dict[Node, dict[str, Node]]], None]) -> None:
        self._log.append(lambda: play(self._kept))

    def _link(self, path: Any, node: Node) -> None:
        folder, name = self._at(path)
        assert folder.entries is not None
        folder.entries[name] = node
        self._stamp(node, path)
        self._stamp(folder, Path(path).parent)

        def play(kept: dict[Node, dict[str, Node]]) -> None:
            kept[folder][name] = node
            if node.entries is not None:
                kept.setdefault(node, {})

        self._note(play)

    def _unlink(self, path: Any) -> None:
        folder, name = self._at(path)
        assert folder.entries is not None
        del folder.entries[name]
        self._stamp(folder, Path(path).parent)
        self._note(lambda kept: kept[folder].pop(name, None) and None)

    def make_folder(self, path: Any) -> None:
        with self._lock:
            self._step()
            self._real["make_folder"](path)
            self._link(path, Node({}))

    def remove_folder(self, path: Any) -> None:
        with self._lock:
            self._step()
            self._real["remove_folder"](path)
            self._unlink(path)

    def remove_file(self, path: Any, missing_ok: bool = False) -> None:
        with self._lock:
            self._step()
            if missing_ok and not os.path.lexists(path):
                return
            self._real["remove_file"](path)
            self._unlink(path)

    def remove_tree(self, path: Any) -> None:
        try:
            for child in sorted(Path(path).iterdir()):
                (self.remove_tree if child.is_dir() else self.remove_file)(child)
            self.remove_folder(path)
        except OSError:
            return

    def rename(self, source: Any, target: Any) -> None:
        with self._lock:
            self._step()
            self._real["rename"](source, target)
            self._move(source, target, exchange=False)

    def rename_with(self, source: Any, target: Any, flags: int) -> bool:
        with self._lock:
            self._step()
            if self.no_exchange:
                return False
            if not self._real["rename_with"](source, target, flags):
                return False
            self._move(source, target, exchange=flags == disk.EXCHANGE)
            return True

    def _move(self, source: Any, target: Any, exchange: bool) -> None:
        (old, name), (new, other) = self._at(source), self._at(target)
        assert old.entries is not None
        assert new.entries is not None
        node = old.entries.pop(name)
        there = new.entries.get(other)
        new.entries[other] = node
        if exchange and there is not None:
            old.entries[name] = there
        self._stamp(old, Path(source).parent)
        self._stamp(new, Path(target).parent)

        def play(kept: dict[Node, dict[str, Node]]) -> None:  # a rename is one step, whatever else is lost
            kept[old].pop(name, None)
            kept[new][other] = node
            if exchange and there is not None:
                kept[old][name] = there

        self._note(play)

    def open_to_write(self, path: Any, flags: int = os.O_WRONLY | os.O_CREAT | os.O_EXCL) -> int:
        with self._lock:
            self._step()
            there = os.path.exists(path)
            fd = int(self._real["open_to_write"](path, flags))
            if not there:
                self._link(path, Node())
            folder, name = self._at(path)
            self._fds[fd] = (folder.entries or {})[name]
            return fd

    def resize(self, fd: int, size: int) -> None:
        with self._lock:
            self._step()
            self._real["resize"](fd, size)
            data = self._fds[fd].data
            del data[size:]
            data.extend(bytes(size - len(data)))
            self._stamp(self._fds[fd], fd)

    def write(self, fd: int, data: Any) -> int:
        with self._lock:
            short = self._step(writes=True)
            view = memoryview(data)
            count = int(self._real["write"](fd, view[: max(1, len(view) // 2)] if short else view))
            at = os.lseek(fd, 0, os.SEEK_CUR) - count
            self._put(fd, at, bytes(view[:count]))
            return count

    def write_at(self, fd: int, data: Any, offset: int) -> int:
        with self._lock:
            short = self._step(writes=True)
            view = memoryview(data)
            count = int(self._real["write_at"](fd, view[: max(1, len(view) // 2)] if short else view, offset))
            self._put(fd, offset, bytes(view[:count]))
            return count

    def _put(self, fd: int, at: int, raw: bytes) -> None:
        data = self._fds[fd].data
        data.extend(bytes(max(at + len(raw) - len(data), 0)))
        data[at : at + len(raw)] = raw
        self._stamp(self._fds[fd], fd)

    def flush(self, fd: int, data_only: bool = False) -> None:
        with self._lock:
            self._step()
            path = os.readlink(f"/proc/self/fd/{fd}")
            if os.path.isdir(path):
                self._flushed = len(self._log)
                return
            if not os.path.exists(path):
                return  # it was removed meanwhile
            folder, name = self._at(path)
            node = (folder.entries or {})[name]
            node.durable = bytes(node.data)
