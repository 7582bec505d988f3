"""A command whose work is arithmetic, shared with other processes that it starts on this machine.

Threads of one interpreter wait for one another between any two operations on arrays. Two processes with a thread or two
each took 4.8 s for a merge that took one process with three threads 6.5 s.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol

from ucp import limits
from ucp.cli import run
from ucp.errors import BadArgument, ProcessLost, described
from ucp.storage.locations import is_remote
from ucp.transfer.team import Team, from_environment

# As the command's entry point does, so that another package called ucp is no hindrance. The search path is the
# command's own: Python would begin it with the working folder, which may be a checkpoint that somebody else wrote.
_PROGRAM = """
import sys
count = int(sys.argv[1])
sys.path[:], sys.argv[1:] = sys.argv[2 : 2 + count], sys.argv[2 + count :]
from universal_checkpoint.cli.main import main
sys.exit(main())
"""


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option ``--processes``."""
    parser.add_argument(
        "--processes",
        type=run.count,
        metavar="N",
        help="that share the work here (default: processors, at most 8, if it is large and nothing limits it)",
    )


def share_out(
    args: argparse.Namespace, given: Sequence[str], sources: Sequence[str], nothing: bool
) -> tuple[int, list[str]]:
    """How many processes share a command's work, and the arguments that the others are started with. Each is given
    its number of threads, unless the user has.

    args, given: what was parsed, and from what. sources: what is read. nothing: whether nothing is to be shared.
    Raises BadArgument as `count` does.
    """
    limited = nothing or args.workers is not None or args.max_memory is not None
    number = count(None if nothing else args.processes, () if limited else sources, args.dest, os.environ)
    if number == 1 or args.workers is not None:
        return number, list(given)
    args.workers = threads(number)
    return number, [*given, "--workers", str(args.workers)]


def count(asked: int | None, sources: Sequence[str], dest: str, environment: Mapping[str, str]) -> int:
    """How many processes share the work. asked: by the user; otherwise one for each processor, if the sources are large
    and all is local. Raises BadArgument if a launcher has made a team of another size."""
    launched = from_environment(environment).processes
    if launched > 1:
        if asked not in (None, launched):
            raise BadArgument(f"--processes: a launcher has started {launched} processes already; leave the option out")
        return 1
    if asked is not None:
        return asked
    size = 0 if is_remote(dest) else sum(map(_nbytes, sources))
    return max(min(limits.processors(), limits.THREADS_MAX_COUNT, size // limits.BYTES_PER_PROCESS), 1)


def _nbytes(source: str) -> int:
    """About how many bytes are read of a local folder, or of ``folder@tag``: its files, or those of the largest of the
    folders in it, such as a run's checkpoints. 0 for anything else."""
    folder, _, tag = source.rpartition("@")
    for path in (source, os.path.join(folder, tag)):
        try:
            inner = [entry.path for entry in os.scandir(path) if entry.is_dir()]
            return max(map(_files_nbytes, (path, *inner)))
        except (OSError, ValueError):
            continue
    return 0


def _files_nbytes(path: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def threads(processes: int) -> int:
    """How many threads of each fill windows: its part of the processors."""
    return max(limits.processors() // processes, 1)


@contextmanager
def shared(arguments: Sequence[str], processes: int, job: Callable[[Team], int] | None = None) -> Iterator[Team]:
    """Start the other processes, and give this one's place among them. They end when the block does. What goes wrong in
    one of them is told to this one as in any team, and at once if it dies.

    arguments: the command's own, which the others are started with.
    job: what the others do with their places, if they can be copies of this process: these have imported everything,
    and what it has found out so far need not be found again.
    """
    if processes <= 1:
        yield from_environment(os.environ)
        return
    others: list[_Other] = []
    try:
        for k in range(1, processes):
            others.append(
                _started(arguments, k, processes) if job is None or not may_fork() else _Copy(job, k, processes)
            )
        yield Team(0, processes, beat=limits.OWN_TEAM_BEAT_SECONDS, gathers=True, watch=lambda: _check(others))
        for other in others:
            with suppress(subprocess.TimeoutExpired):  # its share is in the checkpoint
                other.wait(limits.PROCESS_END_SECONDS)
    finally:
        for other in others:
            if other.poll() is None:
                other.kill()
            other.wait()


class _Other(Protocol):
    """One of the others: a `subprocess.Popen`, or a copy of this process."""

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


def may_fork() -> bool:
    """Whether a copy of this process would work: locks that other threads hold stay locked in it for ever. OpenBLAS
    ends its own threads before a fork; torch does not."""
    return sys.platform == "linux" and threading.active_count() == 1 and "torch" not in sys.modules


def _started(arguments: Sequence[str], process: int, processes: int) -> _Other:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(len(sys.path)), *sys.path, *arguments],
        env={**os.environ, "RANK": str(process), "WORLD_SIZE": str(processes)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _check(others: Sequence[_Other]) -> None:
    """Raise ProcessLost if one of them has died."""
    for number, other in enumerate(others, 1):
        if code := other.poll():
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = other.last_words() if isinstance(other, _Copy) else ""
            raise ProcessLost(
                f"process {number} of this command {how} before its share was done{said and f': {said}'}; run the same "
                "command again to continue it"
            )


class _Copy:
    """A copy of this process that does a job as a member of its team, and ends."""

    def __init__(self, job: Callable[[Team], int], process: int, processes: int) -> None:
        self._code: int | None = None
        self._said, says = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid:
            os.close(says)
            return

        def watch() -> None:
            if os.getppid() != parent:
                raise ProcessLost("the process that started this one is gone")

        _end_after(lambda: job(Team(process, processes, beat=limits.OWN_TEAM_BEAT_SECONDS, watch=watch)), says)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a copy of this process", timeout or 0.0)
            time.sleep(0.005)
        if self._said >= 0:
            os.close(self._said)
            self._said = -1
        return code

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def last_words(self) -> str:
        """The error that it ended with, if it could still say it."""
        return os.read(self._said, limits.PROCESS_LAST_WORDS_BYTES).decode("utf-8", "replace")


def _end_after(job: Callable[[], int], says: int) -> NoReturn:
    """Do a job and end this process without anything that its parent would do at its end. An error goes to the pipe."""
    code = 3
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        code = job()
    except BaseException as error:  # noqa: BLE001  # its parent raises it
        os.write(says, described(error).encode("utf-8", "replace")[: limits.PROCESS_LAST_WORDS_BYTES])
    finally:
        os._exit(code)
