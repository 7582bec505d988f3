"""What a keeper answers: one method for each request."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ucp import limits
from ucp.errors import UcpError
from ucp.formats.universal import manifest
from ucp.memory.peers import Peers
from ucp.memory.protecting import Outdated, protect
from ucp.memory.recovering import generation_of, recover, scrub
from ucp.memory.shelf import Generation, KeptFile, Shelf
from ucp.printable import logger
from ucp.run_folder import LATEST
from ucp.storage.kept.places import Note
from ucp.storage.kept.wire import Frame

log = logger(__name__)


class Answers:
    """A keeper's answers. heard: when somebody last asked, by the monotonic clock."""

    def __init__(
        self, shelf: Shelf, peers: Peers, note: Note, end: Callable[[], None], said: Sequence[str] = ()
    ) -> None:
        self.shelf, self.peers, self._note, self._end = shelf, peers, note, end
        self._said = said
        self.heard = time.monotonic()
        self._trainers: set[int] = set()
        self._lock = threading.Lock()
        self._job: Mapping[str, Any] = {}

    def to(self, frame: Frame, far: bool) -> Frame:
        """The answer to a request. far: it comes from another keeper. An error becomes an answer, too."""
        op = str(frame.header.get("op", ""))
        self.heard = time.monotonic()
        answer = getattr(self, f"on_{op}", None)
        if answer is None:
            return Frame({"fault": f"a keeper has no answer to '{op[:40]}'", "errno": errno.EINVAL})
        try:
            fields = {key: value for key, value in frame.header.items() if key != "op"}
            got = answer(body=frame.body, far=far, **fields)
        except OSError as error:
            return Frame({"fault": error.strerror or str(error), "errno": error.errno or errno.EIO})
        except Exception as error:
            log.exception("'%s' failed", op)
            return Frame({"fault": f"{type(error).__name__}: {error}", "errno": errno.EIO})
        return got if isinstance(got, Frame) else Frame(got or {})

    def ask(self, node: str, op: str, body: Any = b"", **fields: Any) -> Frame:
        """The answer of any node's keeper, this one included. Raises OSError."""
        if node != self.shelf.node:
            answer: Frame = self.peers.ask(node, op, body, **fields)
            return answer
        answer = self.to(Frame({"op": op, **fields}, body), True)
        if "fault" in answer.header:
            raise OSError(int(answer.header["errno"]), str(answer.header["fault"]))
        return answer

    def is_attended(self) -> bool:
        """Whether any trainer that has registered is alive."""
        return bool(self._living())

    def _living(self) -> list[int]:
        with self._lock:
            self._trainers = {pid for pid in self._trainers if _is_alive(pid)}
            return sorted(self._trainers)

    # --- files -------------------------------------------------------------------------------------------------------

    def on_ping(self, **_: Any) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def on_reach(self, **_: Any) -> dict[str, Any]:
        """Which of the other keepers cannot be reached."""
        return {"lost": self.peers.reach()}

    def on_stat(self, path: str, **_: Any) -> dict[str, Any]:
        return {"found": self.shelf.stat(path)}

    def on_names(self, path: str, **_: Any) -> dict[str, Any]:
        return {"names": self.shelf.names(path)}

    def on_file(self, path: str, **_: Any) -> Frame:
        """The descriptor of a file's memory, if the file is here."""
        entry = self.shelf.files.get(path)
        if entry is None or entry.holder != self.shelf.node or not entry.size:
            return Frame({})
        memory = self.shelf.memory(entry.memory)
        return Frame({"size": entry.size, "memory": f"{os.getpid()}.{entry.memory}"}, file=memory.fd)

    def on_read(self, path: str, start: int, stop: int, **_: Any) -> Frame:
        """Bytes of a file on any node."""
        if stop - start > limits.KEEPER_BODY_BYTES or start < 0:
            raise OSError(errno.EINVAL, f"{path}: {stop - start} bytes are too many to ask for at once")
        small = self.shelf.small.get(path)
        if small is not None:
            return Frame({}, memoryview(small.body)[start:stop])
        entry = self.shelf.files.get(path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if entry.holder != self.shelf.node:
            return Frame({}, self.peers.ask(entry.holder, "read", path=path, start=start, stop=stop).body)
        return Frame({}, self.shelf.memory(entry.memory).view[start : min(stop, entry.size)])

    def on_put(self, path: str, body: Any, far: bool, when: int | None = None, **_: Any) -> None:
        """Store a small file, which goes to all keepers."""
        when = when or self.shelf.now()
        self.shelf.put(path, bytes(body), when)
        if not far:
            self.peers.tell("put", body, path=path, when=when)
        if path.endswith(f"/{manifest.NAME}") and path.count("/") == 1:
            self.committed(path.split("/")[0])

    def committed(self, tag: str) -> None:
        """Protect a generation that has become whole. This keeper goes on answering meanwhile."""
        found = self.shelf.generations[tag]
        groups = tuple(map(tuple, self._job.get("groups", ())))
        of = Generation(tag, found.save, found.when, groups, int(self._job.get("redundancy", 0)))
        self.shelf.update(tag, found.save, of=of)
        self.peers.part()
        if of.redundancy:
            threading.Thread(target=self._protect, args=(of,), daemon=True).start()

    def _protect(self, of: Generation) -> None:
        try:
            protect(self, of, self._job.get("network"))
        except Outdated:
            log.debug("%s: another generation came before it was protected", of.tag)
        except (OSError, UcpError) as error:
            log.warning("%s: is not protected: %s", of.tag, error)
        except Exception:
            log.exception("%s: is not protected", of.tag)

    def _await_protection(self) -> None:
        """Wait until the newest generation is protected, since the next one will replace the one before it. If a node
        is lost, do not wait."""
        deadline = time.monotonic() + limits.SNAPSHOT_TIMEOUT_SECONDS
        while time.monotonic() < deadline and not self.peers.lost:
            newest = self.shelf.committed()[:1]
            if not newest or newest[0].is_protected or not newest[0].can_be_protected:
                return
            time.sleep(limits.RECEIPT_POLL_SECONDS[0])

    def on_store(self, path: str, body: Any, **_: Any) -> None:
        """Store a new file of this node's own, and tell the other keepers about it."""
        self._tell_of(self.shelf.store(path, body))

    def on_place(self, path: str, rank: int, memory: int, lease: int, size: int, **_: Any) -> None:
        self._tell_of(self.shelf.place(path, rank, memory, lease, size))

    def on_entry(self, entry: Mapping[str, Any], **_: Any) -> None:
        made = KeptFile(**entry)
        with self.shelf.lock:
            self.shelf.files[made.path] = made

    def _tell_of(self, entry: KeptFile) -> None:
        self.peers.tell("entry", entry=vars(entry))

    def on_remove(self, path: str, far: bool, **_: Any) -> None:
        self.shelf.remove(path)
        if not far:
            self.peers.tell("remove", path=path)

    # --- the job -----------------------------------------------------------------------------------------------------

    def on_lease(self, rank: int, size: int, **_: Any) -> Frame:
        """Lend memory for a rank's next snapshot, with its descriptor."""
        self._await_protection()
        number, lease = self.shelf.lease(rank, size)
        name = f"{os.getpid()}.{number}"
        return Frame({"memory": number, "lease": lease, "name": name}, file=self.shelf.memory(number).fd)

    def on_leased(self, memory: int, lease: int, **_: Any) -> Frame:
        """The same memory for another process of the rank."""
        return Frame({"name": f"{os.getpid()}.{memory}"}, file=self.shelf.leased(memory, lease).fd)

    def on_come(self, pid: int, **_: Any) -> dict[str, Any]:
        """Register a trainer's process. The answer also has those that are alive."""
        with self._lock:
            self._trainers.add(pid)
        found = {"host": self._note.host, "port": self._note.port, "node": self._note.node, "domain": self._note.domain}
        return {**found, "trainers": self._living()}

    def on_go(self, pid: int, **_: Any) -> None:
        """A trainer's process has ended normally. This keeper ends with the last of them."""
        with self._lock:
            self._trainers.discard(pid)
        if not self.is_attended():
            self._end()

    def on_leave(self, **_: Any) -> None:
        """The run continues without this node. End, unless a trainer is here."""
        if not self.is_attended():
            self._end()

    def on_job(self, job: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """A program has started on these nodes. Give up the saves that an earlier one had under way."""
        self._job = job
        self.shelf.keep = int(job["keep"])
        self.shelf.limit = job["limit"]
        self.peers.join(job["members"])
        return {"void": self.shelf.give_up()}

    # --- recovery ----------------------------------------------------------------------------------------------------

    def on_inventory(self, **_: Any) -> dict[str, Any]:
        """The generations that this keeper knows, and the files that it knows of."""
        with self.shelf.lock:
            return {
                "generations": [{**vars(one), "protected": sorted(one.protected)} for one in self.shelf.committed()],
                "files": [vars(file) for file in self.shelf.files.values()],
                "known": self.peers.known,
            }

    def on_recover(self, **_: Any) -> dict[str, Any]:
        """Make the newest generation whole for which that is possible, on all keepers, and forget newer ones."""
        return recover(self)

    def on_scrub(self, save: str, files: Mapping[str, Any], **_: Any) -> dict[str, Any]:
        """Which of this keeper's files and parity of a save do not match their digests."""
        return scrub(self.shelf, save, files)

    def on_parity(self, save: str, start: int, stop: int, **_: Any) -> Frame:
        """Bytes of this node's parity for a save."""
        with self.shelf.lock:
            return Frame({}, self.shelf.memory(self.shelf.parities[save].memory).view[start:stop])

    def on_protect(self, tag: str, save: str, **_: Any) -> None:
        """Make this node's parity for a generation anew."""
        known = self.shelf.generations.get(tag)
        if known is not None and known.save == save and known.redundancy:
            threading.Thread(target=self._protect, args=(known,), daemon=True).start()

    def on_protected(self, tag: str, save: str, whose: str, **_: Any) -> None:
        """Note that a node's parity for a generation is complete."""
        self.shelf.update(tag, save, protected=whose)

    def on_adopt(self, path: str, origin: str, body: Any, **_: Any) -> dict[str, Any]:
        """Store a file of a lost node here."""
        return {"memory": self.shelf.store(path, body, origin).memory}

    def on_repair(self, path: str, at: int, body: Any, **_: Any) -> None:
        """Correct bytes of a file."""
        with self.shelf.lock:
            self.shelf.memory(self.shelf.files[path].memory).write(at, body)

    def on_know(
        self,
        generation: Mapping[str, Any],
        files: list[Mapping[str, Any]],
        known: list[Mapping[str, Any]],
        body: Any,
        **_: Any,
    ) -> None:
        """Learn about a generation and its files."""
        self.peers.learn(known)
        self.shelf.know(generation_of(generation), [KeptFile(**file) for file in files], bytes(body))

    def on_settle(self, generation: Mapping[str, Any], **fields: Any) -> None:
        """Make this generation the newest one, and remove all newer ones."""
        made = generation_of(generation)
        with self.shelf.lock:
            for one in self.shelf.committed():
                if one.when > made.when:
                    self.shelf.remove(one.tag)
            self.on_know(generation=generation, **fields)
            self.shelf.put(LATEST, made.tag.encode(), made.when)

    def on_end(self, **_: Any) -> None:
        """End now, even if something is held."""
        self._end()

    def on_status(self, **_: Any) -> dict[str, Any]:
        with self.shelf.lock:
            return {
                "run": self._note.run,
                "node": self._note.node,
                "pid": os.getpid(),
                "bytes": self.shelf.nbytes,
                "trainers": sorted(self._trainers) if self.is_attended() else [],
                "lost": self.peers.lost,
                "said": list(self._said),
                "generations": [
                    {
                        "tag": one.tag,
                        "save": one.save,
                        "when": one.when,
                        "groups": one.groups,
                        "redundancy": one.redundancy,
                        "protected": one.is_protected,
                        "bytes": sum(e.size for e in self.shelf.files.values() if e.save == one.save),
                    }
                    for one in self.shelf.committed()
                ],
            }


def _is_alive(pid: int) -> bool:
    """Whether there is such a process, and it has not ended while nobody has asked for its exit code."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return False
