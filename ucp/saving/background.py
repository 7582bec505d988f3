"""Saves during training: state is copied to host memory during forward and backward, and written by another process.

    saver = Saver(memory=8 << 30)             # bytes of host memory; saver.reserve(...) allocates it beforehand
    saver.save(source, folder, "step100")     # collective; source: ucp.saving.source.Source, of any framework
    ...                                       # forward, backward
    saver.hold()                              # before anything changes the weights or the optimizer's states
    optimizer.step()
    saver.wait()                              # it is on disk, or this raises why not

The process (`writer`) is started with the first save and kept. It uses no process group: ranks tell each other by files
(`commit`), so a save is finished even if the program has destroyed its process group and is about to exit. In this
process a thread follows the writer, and waits on a pipe most of the time. A failure, such as the writer's death, is
raised at the next save, at `Saver.wait`, and at exit, whose code is not 0 then. When the process ends, by itself or by
SIGTERM, it first waits for the save that is under way.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from ucp import limits
from ucp.errors import SaveFailed, noted, rebuilt
from ucp.job import ranks
from ucp.job.stopwatch import Stopwatch
from ucp.printable import logger
from ucp.saving import commit
from ucp.saving.late import LateNumbers
from ucp.saving.retention import Keep
from ucp.saving.save import SaveReport, prepare
from ucp.saving.share import AUTO
from ucp.saving.source import Source
from ucp.saving.staging import Copying, Pool
from ucp.saving.writer import Share, WriteJob, WriterLost, WriterProcess

log = logger(__name__)

POLICIES = ("wait", "skip")

_savers: weakref.WeakSet[Saver] = weakref.WeakSet()


class Saver:
    """One training state's saves in the background. At most one is under way at a time.

    done: called, in the background, with the report of every finished save. memory: at most how many bytes of host
    memory the copies take. pool: a pool to use instead of one of this process's own with that bound. policy: what to do
    with a save while another is under way: 'wait' for the other, or 'skip' this one with a warning. cache: whether what
    is written stays in the page cache (`ucp.saving.share.CACHES`).
    """

    def __init__(
        self,
        done: Callable[[SaveReport], None] | None = None,
        *,
        memory: int = limits.STAGING_BYTES,
        policy: str = "wait",
        cache: str = AUTO,
        pool: Pool | None = None,
    ) -> None:
        self._done = done
        self._pool = pool or Pool(memory)
        self._policy = policy
        self._cache = cache
        self._writer: WriterProcess | None = None
        self._thread: threading.Thread | None = None
        self._copying: Copying | None = None
        self._error: BaseException | None = None
        self._path = ""
        self._first = True
        _savers.add(self)
        _watch_exit()

    @property
    def loudness(self) -> int:
        """At which level this rank logs what all ranks have to say: one of them is enough to warn."""
        return logging.WARNING if self._first else logging.DEBUG

    @property
    def pending(self) -> str | None:
        """The path of the save that is under way, or None."""
        return self._path if self._thread is not None and self._thread.is_alive() else None

    @property
    def memory(self) -> int:
        """How many bytes of host memory the pool has now."""
        return self._pool.nbytes

    @property
    def writer(self) -> int | None:
        """The number of the process that writes, or None."""
        return None if self._writer is None else self._writer.pid

    def limit(self, nbytes: int) -> None:
        """Set how many bytes the copies may take at most, from the next save on. Not while one is under way."""
        self._pool.limit(nbytes)

    def reserve(self, nbytes: int, *, pinned: bool) -> None:
        """Allocate memory for a share of this many bytes beforehand, within the bound. pinned: for copies from a
        device."""
        self._pool.reserve(nbytes, pinned=pinned)

    def save(
        self,
        source: Source,
        folder: str | os.PathLike[str],
        tag: str,
        *,
        latest: bool = True,
        timeout: float = limits.SAVE_TIMEOUT_SECONDS,
        keep: Keep | None = None,
    ) -> bool:
        """As `ucp.saving.save.save`, but the tensors are copied later: call `hold` before they change. Collective.

        Volatile tensors, and everything that is not a tensor of a parameter, are copied before it returns. If something
        went wrong with the save before this one, all ranks raise it, and nothing is begun. Returns whether a save was
        begun: False if one is still under way and the policy is to skip.
        """
        watch = Stopwatch()
        if self._policy == "skip" and (under_way := ranks.from_first(lambda: self.pending)) is not None:
            if ranks.rank() == 0:
                log.warning("%s was not saved: the save of %s is still under way", tag, under_way)
            return False

        def begin() -> tuple[Share, Copying]:
            self.wait()
            self._hire()
            share, plan, pieces = prepare(source, ranks.rank(), ranks.world_size())
            return share, Copying(self._pool, plan, pieces)

        with watch.of("prepare"):
            share, copying = ranks.all_or_none(begin)
            session = ranks.from_first(
                lambda: commit.begin(folder, tag, ranks.world_size(), latest=latest, keep=keep, process=self.writer)
            )
        pool = self._pool
        here = dict(os.environ)
        rank, lease = ranks.rank(), copying.lease
        late = source.late
        job = WriteJob(
            session, rank, share, pool.nbytes, pool.window, timeout, here, lease, self._cache, late is not None
        )
        # By this thread, while a device is still at work: another one would take Python's lock when training goes on.
        packed = pickle.dumps(job)
        # Not before the ranks have agreed, since what they send each other by a device would wait behind gigabytes.
        copying.ask()
        self._path, self._copying = str(session.destination), copying
        self._first = job.rank == 0
        self._thread = threading.Thread(
            target=self._finish, args=(job, packed, copying, late, watch), name="ucp-save", daemon=True
        )
        _watch_termination()
        self._thread.start()
        return True

    def hold(self) -> None:
        """Return once the calling thread may change what is being saved, on its device's current stream."""
        if self._copying is not None:
            self._copying.hold()
            self._copying = None

    def is_copying(self) -> bool:
        """Whether `hold` would wait, or have the device wait."""
        return self._copying is not None and self._copying.is_under_way()

    def wait(self) -> None:
        """Return once this rank has no save under way. Raises what went wrong with the last one, but only once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._copying = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _hire(self) -> None:
        """Make sure that there is a process that writes. Raises SaveFailed if none can be started."""
        if self._writer is not None and not self._writer.is_alive():
            self.dismiss()  # what became of its save has been raised already
        if self._writer is None:
            self._writer = WriterProcess(self._pool.file, self._pool.digesters)
            # The writer ends when the saver is deleted. When the program ends, so does the pipe.
            self._end = weakref.finalize(self, self._writer.end)
            self._end.atexit = False

    def dismiss(self) -> None:
        """End the process that writes. The next save starts another."""
        if self._writer is not None:
            self._end()
            self._writer = None

    def _finish(
        self, job: WriteJob, packed: bytes, copying: Copying, late: LateNumbers | None, watch: Stopwatch
    ) -> None:
        try:
            nbytes = self._follow(job, packed, copying, late, watch)
        except BaseException as error:  # noqa: BLE001 - kept for the program's own thread
            self._error = error
            log.error("the save of %s failed; it is raised at the next save, wait() or exit: %s", self._path, error)
            return
        finally:
            copying.close()
            commit.release(job.session)
        report = SaveReport(
            self._path, job.session.tag, nbytes, copying.size, dict(watch.seconds), watch.passed, job.capacity
        )
        if self._done is not None:
            self._done(report)
        if job.rank == 0:
            log.info("%s", report)

    def _follow(
        self, job: WriteJob, packed: bytes, copying: Copying, late: LateNumbers | None, watch: Stopwatch
    ) -> int:
        """Copy, and tell the writer, until it is done. On the first rank, returns how many bytes all files have."""
        writer = self._writer
        if writer is None:
            raise SaveFailed(f"{self._path}: was not saved: there is no process that writes")
        broken: Exception | None = None
        try:
            writer.send_packed(packed)
            written: int | None = 0
            while True:
                try:
                    if written is not None and broken is None:
                        with watch.of("copy"):
                            if late is not None:
                                writer.send(("numbers", job.session.save, late.read()))
                                late = None
                            for end in copying.arriving(written):
                                writer.send(("filled", job.session.save, end))
                except WriterLost:
                    raise
                except Exception as error:  # noqa: BLE001 - raised once the writer knows
                    broken = error
                    writer.send(("broken", job.session.save, noted(error)))
                what, *rest = writer.receive()
                written = None
                if what == "written":
                    written = rest[0]
                elif what == "logged":
                    logging.getLogger(rest[0]).log(rest[1], "%s", rest[2])
                elif what == "failed":
                    raise broken or rebuilt(rest[0])
                else:
                    for stage, seconds in rest[1].items():
                        watch.add(stage, seconds)
                    return int(rest[0])
        except WriterLost as error:
            # So that the other ranks need not wait for it.
            if job.rank == 0:
                commit.leave_verdict(job.session, error)
            else:
                commit.leave_failure(job.session, job.rank, error)
            raise


# --- leaving the process ---------------------------------------------------------------------------------------------


def finish_all() -> None:
    """Wait for every save of this process. Raises the first failure, and logs all."""
    failed: BaseException | None = None
    for saver in list(_savers):
        if saver.pending is not None:
            log.log(saver.loudness, "waiting for the save of %s before leaving", saver.pending)
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
        atexit.register(_at_exit)


def _at_exit() -> None:
    """Finish all saves at exit. An exception here would leave the exit code at 0, so after a failure the process is
    ended directly."""
    try:
        finish_all()
        for saver in list(_savers):
            saver.dismiss()
    except Exception:  # noqa: BLE001 - it has been logged
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def _watch_termination() -> None:
    """Let the save under way finish first on SIGTERM, which schedulers send before they take a machine away."""
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
