"""What one keeper holds: small files, which every keeper of the run has, and memory, which is this node's own.

A generation is a checkpoint's folder: ``TAG/ucp.json`` and the files of one save, ``TAG/SAVE/...``. It is committed
once its manifest is there, which the first rank writes when every rank's files are in place. A rank copies its next
snapshot into memory that has no generation worth keeping. So if anything breaks off, the generation before is still
there.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ucp.formats.universal import manifest
from ucp.memory.blocks import SharedMemory
from ucp.printable import logger

log = logger(__name__)

_SAVE = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class KeptFile:
    """A file that lies on one node. origin: the node that saved it. holder: the node that has it now. memory: the
    number of its memory in the holder's shelf."""

    path: str
    size: int
    origin: str
    holder: str
    memory: int
    when: int

    @property
    def tag(self) -> str:
        return self.path.split("/")[0]

    @property
    def save(self) -> str:
        parts = self.path.split("/")
        return parts[1] if len(parts) > 2 and _SAVE.fullmatch(parts[1]) else ""


@dataclass(frozen=True)
class Generation:
    """A committed snapshot. when: the time of its commit, in nanoseconds since the epoch. groups: the groups of nodes
    that protected each other then. redundancy: how many nodes of a group may be lost. protected: the nodes whose parity
    is complete."""

    tag: str
    save: str
    when: int
    groups: tuple[tuple[str, ...], ...] = ()
    redundancy: int = 0
    protected: frozenset[str] = frozenset()

    @property
    def can_be_protected(self) -> bool:
        """Whether any of its nodes is protected by others."""
        return bool(self._members)

    @property
    def is_protected(self) -> bool:
        """Whether the parity of all nodes that protect others is complete."""
        return bool(self._members) and self._members <= self.protected

    @property
    def _members(self) -> set[str]:
        return {name for group in self.groups if 0 < self.redundancy < len(group) for name in group}


@dataclass(frozen=True)
class Parity:
    """A node's parity. memory: its number. table: the digests of its chunks."""

    memory: int
    table: bytes


@dataclass
class Small:
    body: bytes
    when: int


@dataclass
class Shelf:
    """One keeper's state. Several threads may call its methods.

    keep: how many generations there are, with the one that is being filled. limit: in bytes; None for no bound.
    """

    node: str
    keep: int = 2
    limit: int | None = None
    small: dict[str, Small] = field(default_factory=dict)
    files: dict[str, KeptFile] = field(default_factory=dict)
    generations: dict[str, Generation] = field(default_factory=dict)
    parities: dict[str, Parity] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _memories: dict[int, SharedMemory] = field(default_factory=dict)
    _slots: dict[int, list[int]] = field(default_factory=dict)
    _leases: dict[int, int] = field(default_factory=dict)
    _void: set[str] = field(default_factory=set)
    _early: dict[str, set[str]] = field(default_factory=dict)
    _next: int = 0

    # --- memory ------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """How many bytes of memory are held in all."""
        with self.lock:
            return sum(memory.size for memory in self._memories.values())

    def take(self, size: int) -> int:
        """Take new memory. Returns its number. Raises OSError if the limit or the machine has no room for it."""
        with self.lock:
            if self.limit is not None and self.nbytes + size > self.limit:
                raise OSError(
                    errno.ENOMEM,
                    f"node '{self.node}' needs {self.nbytes + size} bytes, and 'limit' allows {self.limit}",
                )
            made = SharedMemory.of(size)
            self._next += 1
            self._memories[self._next] = made
            return self._next

    def memory(self, number: int) -> SharedMemory:
        with self.lock:
            return self._memories[number]

    def free(self, number: int) -> None:
        with self.lock:
            gone = self._memories.pop(number, None)
            for slots in self._slots.values():
                if number in slots:
                    slots.remove(number)
            if gone is not None:
                gone.close()

    def lease(self, rank: int, size: int) -> tuple[int, int]:
        """Memory for the rank's next snapshot, and the lease's number. Generations in this memory are dropped."""
        with self.lock:
            kept = {one.tag for one in self.committed()[: max(self.keep - 1, 1)]}
            busy = {e.memory for e in self.files.values() if e.tag in kept and self.is_current(e)}
            slots = self._slots.setdefault(rank, [])
            free = [number for number in slots if number not in busy]
            for number in free:
                self._evict(number)
            fitting = [number for number in free if self._memories[number].size == size]
            for number in free:
                if number not in fitting[:1] and (fitting or len(slots) >= self.keep):
                    self.free(number)
            number = fitting[0] if fitting else self.take(size)
            if number not in slots:
                slots.append(number)
            self._next += 1
            self._leases[number] = self._next
            return number, self._next

    def leased(self, number: int, lease: int) -> SharedMemory:
        """The memory of a lease. Raises OSError if it was given to another snapshot meanwhile."""
        with self.lock:
            if self._leases.get(number) != lease or number not in self._memories:
                raise OSError(errno.ESTALE, "the memory was given to another snapshot meanwhile")
            return self._memories[number]

    def place(self, path: str, rank: int, number: int, lease: int, size: int) -> KeptFile:
        """Make a lease a file. Raises OSError if its memory was given to another snapshot meanwhile."""
        with self.lock:
            self._refuse_void(path)
            self.leased(number, lease)
            made = KeptFile(path, size, self.node, self.node, number, time.time_ns())
            self.files[path] = made
            return made

    def store(self, path: str, body: bytes | memoryview, origin: str | None = None) -> KeptFile:
        """Make a new file of this node's own from its bytes."""
        with self.lock:
            self._refuse_void(path)
            number = self.take(len(body))
            self._memories[number].write(0, body)
            made = KeptFile(path, len(body), origin or self.node, self.node, number, time.time_ns())
            self.files[path] = made
            return made

    # --- files -------------------------------------------------------------------------------------------------------

    def put(self, path: str, body: bytes, when: int) -> None:
        """Store a small file. A manifest commits its generation. Raises OSError for a save that was given up."""
        with self.lock:
            self._refuse_void(path)
            if path.endswith(f"/{manifest.NAME}") and path.count("/") == 1:
                saves = {e.save for e in self.files.values() if path == f"{e.tag}/{manifest.NAME}" and e.save}
                named = {save for save in saves | self._void if f'"{save}/'.encode() in body}
                if named & self._void or not named:
                    raise OSError(errno.ESTALE, f"{path}: its save was given up, or has no files here")
                tag = path.split("/")[0]
                save = named.pop()
                self.generations[tag] = Generation(tag, save, when, protected=frozenset(self._early.pop(save, ())))
            self.small[path] = Small(body, when)

    def now(self) -> int:
        """The time, in nanoseconds since the epoch, and later than all commits, whatever the clock was set to."""
        return max([time.time_ns(), *(one.when + 1 for one in self.committed())])

    def is_current(self, entry: KeptFile) -> bool:
        """Whether the file belongs to a committed generation."""
        found = self.generations.get(entry.tag)
        return found is not None and found.save == entry.save

    def committed(self) -> list[Generation]:
        """The generations, newest first."""
        with self.lock:
            return sorted(self.generations.values(), key=lambda one: one.when, reverse=True)

    def stat(self, path: str) -> dict[str, object] | None:
        with self.lock:
            if (small := self.small.get(path)) is not None:
                return {"type": "file", "size": len(small.body), "mtime": small.when / 1e9}
            if (entry := self.files.get(path)) is not None:
                return {"type": "file", "size": entry.size, "mtime": entry.when / 1e9}
            if not path or any(True for _ in self._below(path)):
                return {"type": "directory", "size": 0}
            return None

    def names(self, path: str) -> list[str]:
        """Raises FileNotFoundError."""
        with self.lock:
            start = len(path) + 1 if path else 0
            found = sorted({name[start:].split("/")[0] for name in self._below(path)})
            if not found and path:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return found

    def is_newest(self, one: Generation) -> bool:
        """Whether this generation is still there, and none has come after it."""
        with self.lock:
            newest = self.committed()[:1]
            return bool(newest) and (newest[0].tag, newest[0].save) == (one.tag, one.save)

    def keep_parity(self, of: Generation, number: int, table: bytes) -> None:
        """Store this node's parity for a generation. table: the digests of its chunks."""
        with self.lock:
            old = self.parities.get(of.save)
            self.parities[of.save] = Parity(number, table)
            if old is not None:
                self.free(old.memory)

    def drop_parities(self, but: str | None = None) -> None:
        """Drop the parity of all generations but this one, since it is no longer needed."""
        with self.lock:
            for save in [save for save in self.parities if save != but]:
                self.free(self.parities.pop(save).memory)

    def remove(self, path: str) -> None:
        """Remove a file, or all that is below a folder. Memory that a rank's next snapshot may use stays allocated."""
        with self.lock:
            slots = {number for numbers in self._slots.values() for number in numbers}
            for name in [path, *self._below(path)]:
                self.small.pop(name, None)
                entry = self.files.pop(name, None)
                if entry is not None and entry.holder == self.node and entry.memory not in slots:
                    self.free(entry.memory)
            for tag in [tag for tag in self.generations if f"{tag}/{manifest.NAME}" not in self.small]:
                self._early.clear()
                gone = self.parities.pop(self.generations.pop(tag).save, None)
                if gone is not None:
                    self.free(gone.memory)

    def give_up(self) -> list[str]:
        """Take nothing more from any save that is not committed here. Returns the numbers of these saves.

        What is there stays for now, since another keeper may know that it was committed (`know`).
        """
        with self.lock:
            gone = {save for path in (*self.files, *self.small) if (save := _save_of(path))} - self._current()
            self._void |= gone
            return sorted(gone)

    def know(self, one: Generation, files: Sequence[KeptFile], body: bytes) -> None:
        """Take over a generation that another keeper knows."""
        with self.lock:
            self._void.discard(one.save)
            self.files.update({file.path: file for file in files})
            self.put(f"{one.tag}/{manifest.NAME}", body, one.when)
            self.generations[one.tag] = one

    def update(self, tag: str, save: str, *, protected: str | None = None, of: Generation | None = None) -> None:
        """Update a generation: a node's parity is complete, or its groups are known."""
        with self.lock:
            known = self.generations.get(tag)
            if known is None or known.save != save:
                if protected is not None:  # a faster keeper's message came before the manifest
                    self._early.setdefault(save, set()).add(protected)
                return
            if of is not None:
                known = replace(known, groups=of.groups, redundancy=of.redundancy)
            if protected is not None:
                known = replace(known, protected=known.protected | {protected})
            self.generations[tag] = known
            if known.is_protected:
                self.drop_parities(but=save)

    def _current(self) -> set[str]:
        return {one.save for one in self.generations.values()}

    def _refuse_void(self, path: str) -> None:
        if _save_of(path) in self._void:
            raise OSError(errno.ESTALE, f"{path}: its save was given up when the program started again")

    def _evict(self, number: int) -> None:
        """Drop what lies in this memory, since a generation with an overwritten part is useless."""
        for entry in [e for e in self.files.values() if e.holder == self.node and e.memory == number]:
            if self.is_current(entry):
                self.remove(entry.tag)
            else:
                self._void.add(entry.save)
                self.remove(entry.path)

    def _below(self, path: str) -> Iterator[str]:
        start = f"{path}/" if path else ""
        return iter([name for name in (*self.small, *self.files) if name.startswith(start)])


def _save_of(path: str) -> str:
    parts = path.split("/")
    return parts[1] if len(parts) > 2 and _SAVE.fullmatch(parts[1]) else ""
