"""A command whose work is arithmetic, shared with other processes that it starts on this machine.

Threads of one interpreter wait for one another between any two operations on arrays. Two processes with a thread or two
each took 4.8 s for a merge that took one process with three threads 6.5 s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from ucp import limits
from ucp.errors import BadArgument
from ucp.transfer.team import Team, from_environment

# As the command's entry point does, so that another package called ucp is no hindrance.
_PROGRAM = "import sys; from universal_checkpoint.cli.main import main; sys.exit(main())"


def count(asked: int | None, sources: Sequence[str], environment: Mapping[str, str]) -> int:
    """How many processes share the work. asked: by the user; otherwise one for each processor, if the sources are local
    and large. Raises BadArgument if a launcher has made a team of another size."""
    launched = from_environment(environment).processes
    if launched > 1:
        if asked not in (None, launched):
            raise BadArgument(f"--processes: a launcher has started {launched} processes already; leave the option out")
        return 1
    if asked is not None:
        return asked
    size = sum(map(_nbytes, sources))
    return max(min(limits.processors(), limits.THREADS_MAX_COUNT, size // limits.BYTES_PER_PROCESS), 1)


def _nbytes(source: str) -> int:
    """Bytes of the files of a local folder, or of ``folder@tag``; 0 for anything else."""
    folder, _, tag = source.rpartition("@")
    for path in (source, os.path.join(folder, tag)):
        try:
            return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
        except (OSError, ValueError):
            continue
    return 0


def threads(processes: int) -> int:
    """How many threads each of them has: its part of the processors, and one that waits for the device."""
    return max(limits.processors() // processes, 1) + limits.WAITING_WRITERS_COUNT


@contextmanager
def shared(arguments: Sequence[str], processes: int) -> Iterator[Team]:
    """Start the other processes, with the same arguments, and give this one's place among them. What goes wrong in one
    of them is told to this one as in any team. They end when the block does."""
    if processes <= 1:
        yield from_environment(os.environ)
        return
    others = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            env={**os.environ, "RANK": str(k), "WORLD_SIZE": str(processes)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for k in range(1, processes)
    ]
    try:
        yield Team(0, processes)
        for other in others:
            with suppress(subprocess.TimeoutExpired):  # its share is in the checkpoint
                other.wait(limits.PROCESS_END_SECONDS)
    finally:
        for other in others:
            if other.poll() is None:
                other.kill()
            other.wait()
