"""Saves that go on while training does: what is saved is copied to host memory at once, and flushed by a thread.

The thread talks to no process group: ranks tell each other by files (`commit`), so a save is finished even when the
program has destroyed its process group and is leaving. A failure is raised at the next save, at `Saver.wait`, and at
exit; leaving the process, by itself or by SIGTERM, waits for the save that is under way.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from ucp.training import commit, ranks
from ucp.training.commit import Session
from ucp.training.retention import Keep
from ucp.training.save import SaveReport, Share, prepare, write
from ucp.training.share import Staging
from ucp.training.source import Source

log = logging.getLogger(__name__)

_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


class Saver:
    """One training state's saves in the background, at most one under way at a time.

    done: called, in the background, with the report of every save that was finished.
    """

    def __init__(self, done: Callable[[SaveReport], None] | None = None) -> None:
        self._done = done
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._path = ""
        _savers.add(self)
        _watch_exit()

    @property
    def pending(self) -> str | None:
        """The path of the save that is under way; None if there is none."""
        return self._path if self._thread is not None and self._thread.is_alive() else None

    def save(
        self,
        source: Source,
        folder: str | os.PathLike[str],
        tag: str,
        *,
        latest: bool = True,
        timeout: float = commit.TIMEOUT,
        keep: Keep | None = None,
    ) -> None:
        """As `ucp.training.save.save`, but it returns once everything is copied.

        Waits for the save before this one first, and raises, on all ranks, what went wrong with that: nothing is begun
        then. Collective.
        """
        started = time.perf_counter()
        ranks.together(self.wait)
        share = ranks.together(lambda: prepare(source, ranks.rank(), ranks.world_size()))
        image = ranks.together(lambda: self._staging.fill(share.plan, share.pieces))
        session = ranks.from_first(lambda: commit.begin(folder, tag, ranks.world_size(), latest=latest, keep=keep))
        copied = time.perf_counter() - started
        self._path = os.fspath(session.destination)
        self._thread = threading.Thread(
            target=self._finish,
            args=(session, ranks.rank(), share, image, timeout, copied),
            name="ucp-save",
            daemon=True,
        )
        _watch_termination()
        self._thread.start()

    def wait(self) -> None:
        """Return once no save of this rank is under way; raises what went wrong with the last one, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish(
        self, session: Session, rank: int, share: Share, image: memoryview, timeout: float, copied: float
    ) -> None:
        started = time.perf_counter()
        try:
            nbytes = _flush(session, rank, share, image, timeout)
        except BaseException as error:  # noqa: BLE001 - kept for the program's own thread
            self._error = error
            log.error("the save of %s failed; it is raised at the next save, wait() or exit: %s", self._path, error)
            return
        seconds = {"copy": copied, "flush": time.perf_counter() - started}
        report = SaveReport(self._path, session.tag, nbytes, share.plan.size, seconds)
        if self._done is not None:
            self._done(report)
        if rank == 0:
            log.info("%s", report)


def _flush(session: Session, rank: int, share: Share, image: memoryview, timeout: float) -> int:
    try:
        write(session, rank, share, image)
    except Exception as error:
        if rank == 0:
            commit.condemn(session, error)
        else:
            commit.leave_failure(session, rank, error)
        raise
    if rank == 0:
        return commit.commit(session, timeout=timeout, watched=True)
    # The first rank may wait so long for the others, and then has to publish.
    commit.await_verdict(session, 2 * timeout)
    return 0


# --- leaving the process ---------------------------------------------------------------------------------------------


def finish_all() -> None:
    """Wait for every save of this process; raises the first failure, and logs all."""
    failed: BaseException | None = None
    for saver in list(_savers):
        if saver.pending is not None:
            log.warning("waiting for the save of %s before leaving", saver.pending)
        try:
            saver.wait()
        except Exception as error:
            log.exception("a save failed in the background")
            failed = failed or error
    if failed is not None:
        raise failed


_exit_watched = False


def _watch_exit() -> None:
    global _exit_watched
    if not _exit_watched:
        _exit_watched = True
        atexit.register(finish_all)


def _watch_termination() -> None:
    """SIGTERM, as schedulers send it before they take a machine away, lets the save under way finish first."""
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is _terminate or before is None or before == signal.SIG_IGN:
        return
    global _termination_before
    _termination_before = before
    signal.signal(signal.SIGTERM, _terminate)


_termination_before: Any = signal.SIG_DFL


def _terminate(number: int, frame: FrameType | None) -> None:
    try:
        finish_all()
    finally:
        if callable(_termination_before):
            _termination_before(number, frame)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
