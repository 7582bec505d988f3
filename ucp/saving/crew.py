"""Processes that digest a snapshot together: threads of one interpreter would wait for one another at every block.

The bytes lie in a keeper's memory, which every process maps. So only the windows' places and the digests pass between
them. The processes are forks of the one that writes, made before it has threads, and end with it.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from ucp.errors import SaveFailed, noted, rebuilt
from ucp.logical.record import PassingTensors, Recorded
from ucp.logical.runs import Sample
from ucp.storage.digests import digest_chunks
from ucp.storage.kept.files import Lease, of_run

Parts = list[tuple[int, Recorded]]


class CrewLost(SaveFailed):
    """A process that digests has ended."""


class Crew:
    """``count`` processes. inherited: descriptors that they close, so that it is seen when this process ends.

    Raises OSError if a process cannot be started; then none is left.
    """

    def __init__(self, count: int, inherited: Iterable[int] = ()) -> None:
        self._pipes: list[Connection] = []
        self._pids: list[int] = []
        try:
            for _ in range(count):
                ours, theirs = Pipe()
                pid = os.fork()
                if pid == 0:
                    _end_after(theirs, (ours, *self._pipes), inherited)
                theirs.close()
                self._pipes.append(ours)
                self._pids.append(pid)
        except OSError:
            self.end()
            raise

    def digest(
        self,
        passing: PassingTensors,
        lease: Lease,
        windows: Iterable[tuple[int, memoryview]],
    ) -> tuple[bytes, Parts]:
        """The digests of the windows' chunks, in the order of the windows, and what they add to the tensors.

        windows: all in the leased memory; each is digested as soon as it comes. Raises what the windows raise,
        CrewLost, and what went wrong in a process.
        """
        # Mostly the same as the time before, so that the processes keep what they have made of it.
        what = pickle.dumps(replace(passing, sample=Sample(0, 1)))
        count = 0
        try:
            self._tell(("begin", what, passing.sample, lease, dict(os.environ)))
            for count, (at, window) in enumerate(windows, 1):
                self._pipes[(count - 1) % len(self._pipes)].send(("window", at, len(window)))
            self._tell(("end",))
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError, ConnectionError) as error:
            raise CrewLost("a process that digests a snapshot has ended") from error
        failed = next((answer for answer in answers if isinstance(answer, dict)), None)
        if failed is not None:
            raise rebuilt(failed, otherwise=RuntimeError)
        tables = [iter(answer[0]) for answer in answers]
        table = b"".join(next(tables[k % len(tables)]) for k in range(count))
        return table, [part for answer in answers for part in answer[1].items()]

    def end(self) -> None:
        """Let the processes end, and wait until they have."""
        for pipe in self._pipes:
            pipe.close()
        for pid in self._pids:
            os.waitpid(pid, 0)
        self._pipes, self._pids = [], []

    def _tell(self, message: Any) -> None:
        for pipe in self._pipes:
            pipe.send(message)


def _end_after(pipe: Connection, others: Iterable[Connection], inherited: Iterable[int]) -> None:
    """A process's program. It never returns."""
    code = 1
    try:
        for other in others:
            other.close()
        for number in inherited:
            os.close(number)
        _serve(pipe)
        code = 0
    except BaseException:  # noqa: BLE001 - there is no other way to report it
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(pipe: Connection) -> None:
    """Digest what is asked for, until the other end of the pipe is closed."""
    work = _Work()
    while True:
        try:
            what, *rest = pipe.recv()
        except EOFError:
            return
        if what == "begin":
            work.begin(*rest)
        elif what == "window":
            work.window(*rest)
        else:
            pipe.send(work.answer())


class _Work:
    """One process's part in a snapshot. An error is kept until the end, since nobody listens before that."""

    def __init__(self) -> None:
        self._known: tuple[bytes, PassingTensors] | None = None
        self._passing: PassingTensors | None = None
        self._memory = memoryview(b"")
        self._error: dict[str, Any] | None = None
        self._tables: list[bytes] = []
        self._found: dict[int, Recorded] = {}

    def begin(self, raw: bytes, sample: Sample, lease: Lease, environment: Mapping[str, str]) -> None:
        self._error, self._tables, self._found = None, [], {}
        try:
            os.environ.update(environment)
            if self._known is None or self._known[0] != raw:
                self._known = (raw, pickle.loads(raw))
            self._passing = replace(self._known[1], sample=sample)
            self._memory = memoryview(of_run(lease.run).leased(lease))
        except Exception as error:  # noqa: BLE001 - it is told at the end
            self._error = noted(error)

    def window(self, at: int, count: int) -> None:
        if self._error is not None or self._passing is None:
            return
        try:
            window = self._memory[at : at + count]
            self._tables.append(digest_chunks(window))
            for k, part in self._passing.of(at, window):
                self._found[k] = self._found[k] + part if k in self._found else part
        except Exception as error:  # noqa: BLE001 - it is told at the end
            self._error = noted(error)

    def answer(self) -> dict[str, Any] | tuple[list[bytes], dict[int, Recorded]]:
        return self._error or (self._tables, self._found)
