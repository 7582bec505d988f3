"""A process beside each training process that writes: it digests, writes, flushes, leaves the receipt and commits.

The training process copies its tensors into memory that both share (`staging.Pool`), and says over a pipe how far it
has come. All else happens here, so that saving takes neither Python's lock nor processor time from the thread that
trains. Nothing here imports torch. These messages go over the pipe:

    to the writer    Job; ("numbers", save, numbers): what the Job said would come later;
                     ("filled", save, end): so many bytes of the file are in the memory;
                     ("broken", save, kind, text): no more will come
    from the writer  ("written", end): so much of the memory may be used again; ("logged", name, level, text);
                     ("done", nbytes, seconds by stage) or ("failed", kind, text), once for each Job

The writer ends as soon as its training process has ended, even in the middle of a save. What is not published then
never will be. It ignores SIGTERM and SIGINT, which schedulers and terminals send to all processes of a job, since the
training process decides what becomes of a save that is under way.
"""

from __future__ import annotations

import functools
import logging
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from typing import Any, NoReturn

from ucp import limits
from ucp.catalog import Catalog
from ucp.errors import SaveFailed, noted, rebuilt
from ucp.formats.universal import fragmented
from ucp.formats.universal.fragmented import Identity
from ucp.job.stopwatch import Stopwatch
from ucp.logical.record import drawn
from ucp.printable import logger
from ucp.saving import commit
from ucp.saving.adding import Adding
from ucp.saving.commit import Session
from ucp.saving.crew import Crew, CrewLost
from ucp.saving.share import AUTO, place, write_file, write_windows
from ucp.storage.digests import ChunkDigests
from ucp.storage.kept.files import Lease, of_run

log = logger(__name__)

Inbox = queue.SimpleQueue[Any]


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank writes, decided and checked. It has everything except the bytes of its tensors, and no tensor.

    name, size: those of the tensors' file. extra: the name of the file with the training state's tensors, and its
    bytes. catalog, state, own: as for `fragmented.receipt`.
    """

    name: str
    size: int
    extra: tuple[str, list[bytes]] | None
    catalog: Catalog
    state: dict[str, Any]
    own: dict[str, Any]


@dataclass(frozen=True, eq=False)
class WriteJob:
    """One rank's part in one save. capacity: bytes of the shared memory, which the file passes through as through a
    ring. window: bytes handled at once. timeout: how many seconds the first rank waits for the others. environment: the
    variables that are set by now, which may configure remote file systems. lease: a keeper's memory, if the file is
    filled in there, and stays there. cache: as for `write_windows`. late: numbers of parameters come later, before the
    first bytes."""

    session: Session
    rank: int
    share: Share
    capacity: int
    window: int
    timeout: float
    environment: Mapping[str, str] = field(default_factory=dict)
    lease: Lease | None = None
    cache: str = AUTO
    late: bool = False


class WriterLost(SaveFailed):
    """The process that writes has ended, and with it the save that was under way."""


def write(
    session: Session,
    rank: int,
    share: Share,
    windows: Iterator[tuple[int, memoryview]],
    watch: Stopwatch,
    lease: Lease | None = None,
    cache: str = AUTO,
    crew: Crew | None = None,
) -> None:
    """Write this rank's files and leave its receipt. Does not communicate. Raises DestinationError.

    windows, cache: of the tensors' file, as for `write_windows`. lease: the memory in which they lie, if that becomes
    the file. crew: who digests them then, if not this process alone.
    """
    adding = Adding(share.catalog, drawn(int(session.save, 16)))
    path = session.path(share.name)
    if lease is not None:  # the windows stay, so several are digested at once
        with watch.of("digest"):
            table = adding.all_of(windows) if crew is None else adding.by(crew, lease, windows)
        place(path, lease, watch)
        digests = {share.name: ChunkDigests(lease.size, table)}
    else:
        # Closed here, whatever happens: its thread would be joined wherever else the collector comes upon it.
        with closing(adding.along(windows, watch)) as passing:
            digests = {share.name: write_windows(path, passing, share.size, watch, cache)}
    if share.extra is not None:
        name, raw = share.extra
        digests[name] = write_file(session.path(name), raw, sum(map(len, raw)), watch)
    with watch.of("commit"):
        identity = Identity(session.save, rank, session.world)
        receipt = fragmented.receipt(identity, adding.catalog(), digests, share.state, share.own, share.catalog.writer)
        commit.leave_receipt(session, rank, receipt)


# --- in the training process -----------------------------------------------------------------------------------------

# The search path is the training process's own, with whatever changes it has made.
_PROGRAM = """
import sys
connection, memory, parent, digesters = map(int, sys.argv[1:5])
sys.path[:] = sys.argv[5:]
import universal_checkpoint
from ucp.saving.writer import main
main(connection, memory, parent, digesters)
"""


class WriterProcess:
    """The training process's end of the pipe. Starts the process. memory: the shared memory's file descriptor.
    digesters: as for `main`.

    Raises SaveFailed if no process can be started.
    """

    def __init__(self, memory: int, digesters: int = 1) -> None:
        self._pipe, theirs = Pipe()
        try:
            self._process = start_process(theirs, memory, digesters)
        except OSError as error:
            self._pipe.close()
            raise SaveFailed(
                f"nothing was saved: the process that writes ({get_executable()}) cannot be started: "
                f"{error.strerror or error}; a save that is not in the background needs none"
            ) from error
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Any) -> None:
        """Send a message. Raises WriterLost if the process has ended."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._lost() from error

    def send_packed(self, message: bytes) -> None:
        """As `send`, of what is pickled already."""
        try:
            self._pipe.send_bytes(message)
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        """Wait for the next message. Raises WriterLost if the process has ended."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Let the process end. It gives up what it is doing."""
        self._pipe.close()
        self._process.wait()

    def _lost(self) -> WriterLost:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return WriterLost(f"the process that writes (number {self.pid}) {how}, and the save that was under way with it")


def start_process(theirs: Connection, memory: int, digesters: int) -> subprocess.Popen[bytes]:
    """Start a fresh interpreter. A fork would not be safe in a process that uses a device or has threads."""
    numbers = (theirs.fileno(), memory)
    command = [get_executable(), "-c", _PROGRAM, *map(str, (*numbers, os.getpid(), digesters)), *sys.path]
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    return subprocess.Popen(
        command, pass_fds=numbers, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
    )


# --- in the writer ---------------------------------------------------------------------------------------------------


def main(connection: int, memory: int, parent: int, digesters: int = 1) -> NoReturn:
    """The process's program. connection, memory: file descriptors. parent: the training process's number. digesters:
    how many processes digest what stays in a keeper's memory; 1: this one does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(limits.WRITER_NICENESS)
    crew = Crew(digesters, (connection, memory)) if digesters > 1 else None  # before there are threads
    pipe = Connection(connection)
    inbox: Inbox = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, parent, inbox), name="ucp-listen", daemon=True).start()
    logging.basicConfig(level=logging.INFO, handlers=[_Telling(pipe)], force=True)
    while True:
        job = inbox.get()
        if not isinstance(job, WriteJob):
            continue  # a message about a save that has failed here
        watch = Stopwatch()
        try:
            nbytes = _perform(job, memory, pipe, inbox, watch, crew)
        except Exception as error:  # noqa: BLE001 - it is told to the training process
            if isinstance(error, CrewLost) and crew is not None:
                crew.end()  # what its others have answered may be of another snapshot
                crew = None
            pipe.send(("failed", noted(error)))
        else:
            pipe.send(("done", nbytes, watch.seconds))


def _listen(pipe: Connection, parent: int, inbox: Inbox) -> None:
    """Receive what is sent, and end this process when the training process has ended.

    The pipe alone does not show that: forked children of the training process, such as a data loader's, hold it open.
    """
    while True:
        try:
            if pipe.poll(0.5):
                inbox.put(pipe.recv())
            elif os.getppid() != parent:
                os._exit(0)
        except (EOFError, OSError):
            os._exit(0)
        except BaseException:  # noqa: BLE001 - there is no other way to report it
            traceback.print_exc()
            os._exit(1)


class _Telling(logging.Handler):
    """Sends what is logged here to the training process, which logs it."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send(("logged", record.name, record.levelno, record.getMessage()))


def _perform(job: WriteJob, memory: int, pipe: Connection, inbox: Inbox, watch: Stopwatch, crew: Crew | None) -> int:
    """Write. The first rank then publishes, and returns how many bytes all files have. The others wait for that."""
    os.environ.update(job.environment)
    try:
        if job.late:
            job = replace(job, share=_completed(job.share, _message(inbox, job.session.save, "numbers")))
        windows = _windows(job, memory, pipe, inbox)
        write(job.session, job.rank, job.share, windows, watch, job.lease, job.cache, crew)
    except Exception as error:
        if job.rank == 0:
            commit.condemn(job.session, error)
        else:
            commit.leave_failure(job.session, job.rank, error)
        raise
    with watch.of("commit"):
        if job.rank == 0:
            return commit.commit(job.session, timeout=job.timeout, watched=True)
        # Twice the timeout: the first rank may wait that long for the others, and then has to publish.
        commit.await_verdict(job.session, 2 * job.timeout)
        return 0


def _message(inbox: Inbox, save: str, wanted: str) -> Any:
    """What the next message of this save says. Raises what made the copying fail."""
    while True:
        what, of, said = inbox.get()
        if of != save:
            continue  # of a save that has failed here
        if what == "broken":
            raise rebuilt(said)
        if what != wanted:
            raise SaveFailed(f"nothing was saved: the process that writes was told '{what}' and not '{wanted}'")
        return said


def _completed(share: Share, numbers: Mapping[tuple[str, str], Any]) -> Share:
    """The share with the numbers that came later."""
    parameters = dict(share.catalog.parameters)
    for (name, scalar), value in numbers.items():
        if name in parameters:
            parameters[name] = replace(parameters[name], scalars={**parameters[name].scalars, scalar: value})
    return replace(share, catalog=replace(share.catalog, parameters=parameters))


@functools.lru_cache(1)
def _ring(memory: int, capacity: int) -> memoryview:
    """The pool's memory, mapped here. It is cached while the pool stays the same."""
    return memoryview(mmap.mmap(memory, capacity))


def _windows(job: WriteJob, memory: int, pipe: Connection, inbox: Inbox) -> Iterator[tuple[int, memoryview]]:
    """The file's bytes, as (offset, bytes), as they arrive in the memory. Raises what made the copying fail."""
    ring = _ring(memory, job.capacity) if job.lease is None else memoryview(of_run(job.lease.run).leased(job.lease))
    filled = 0
    size = job.share.size
    for at in range(0, size, job.window):
        count = min(job.window, size - at)
        while filled < at + count:
            filled = _message(inbox, job.session.save, "filled")
        place = at % job.capacity
        yield at, ring[place : place + count]
        if size > job.capacity:
            pipe.send(("written", at + count))
