"""Starting a keeper, and finding the one that there is."""

from __future__ import annotations

import fcntl
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.spawn import get_executable

from ucp import limits
from ucp.errors import BadArgument
from ucp.storage.kept import places
from ucp.storage.kept.client import Client, of_note
from ucp.storage.kept.places import Note

_PROGRAM = """
import sys
arguments, sys.path[:] = sys.argv[1:5], sys.argv[5:]
import universal_checkpoint
from ucp.memory.keeper import main
main(*arguments, sys.stdin.readline().strip())
"""


def started(run: str, node: str | None = None, host: str = "127.0.0.1", token: str | None = None) -> tuple[Note, bool]:
    """This node's keeper of the run, and whether it had to be started.

    host: the address on which other nodes' keepers reach it. token: the run's, if it is known already.
    Raises BadArgument if no keeper can be started.
    """
    node = node or places.node()
    with _alone():
        found = alive(run, node)
        if found is not None and (token is None or found.token == token):
            return found, False
        if found is not None:
            raise BadArgument(
                f"memory of '{run}': the keeper on node '{node}' (process {found.pid}) is of another run of that name; "
                f"look at it with 'ucp keeper status', and let it go with 'ucp keeper drop'"
            )
        return _start(run, node, host, token or secrets.token_hex(16)), True


def alive(run: str, node: str) -> Note | None:
    """The note of this node's keeper, if the keeper answers."""
    note = places.note_of(run, node)
    if note is None or note.run != run:
        return None
    client: Client = of_note(note)
    try:
        client.ask("ping")
    except OSError:
        return None
    finally:
        client.close()
    return note


def _start(run: str, node: str, host: str, token: str) -> Note:
    command = [get_executable(), "-c", _PROGRAM, run, node, places.domain(), host, *sys.path]
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
    try:
        made = subprocess.run(
            command,
            input=f"{token}\n".encode(),  # not among the arguments, which everybody sees
            stdout=subprocess.PIPE,
            timeout=limits.KEEPER_START_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadArgument(f"memory of '{run}': no keeper can be started on node '{node}': {error}") from error
    said = made.stdout.decode("utf-8", "replace").strip()
    note = places.note_of(run, node)
    if said != "ready" or note is None:
        raise BadArgument(f"memory of '{run}': no keeper can be started on node '{node}': {said or 'it ended'}")
    return note


@contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock, so that the ranks of one node start only one keeper."""
    path = places.folder() / ".lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
