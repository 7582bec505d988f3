"""Several processes, on one machine or many, that share a conversion. They speak through files in a shared folder.

Any launcher will do that numbers its processes in the environment (torchrun, srun, mpirun). No library for
communication is needed. Process 0 leads:

1. The others announce themselves (`hello-*`, a file that grows while they wait). The leader takes those that it sees
   growing, so a file left by a dead process never counts. It begins an attempt by naming its members (`attempt.json`).
2. Every process writes its share of the files and notes each piece in its own journal. Meanwhile the others' signs of
   life (`beat-*`) grow. A process stops if its attempt has been replaced or its folder is gone.
3. The leader waits for all journals to be finished. A process that fails says why (`failed-*`). One whose sign of life
   stops growing is lost. Either ends the attempt; what was written and noted is there for the next one.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ucp import limits
from ucp.errors import BadArgument, ProcessLost, UcpError, described
from ucp.printable import logger
from ucp.storage import locations
from ucp.storage.atomic import write_atomic

log = logger(__name__)

# (number of this process, number of processes) as launchers give them. SLURM_STEP_* is used because the allocation's
# own variables are also set for the script of a batch job, which is one process.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_HELLO = re.compile(r"hello-(\d+)-([0-9a-f]{16})-([0-9a-f]{32})")
_ATTEMPT = "attempt.json"


@dataclass(frozen=True)
class Team:
    """This process's number, and how many processes share the work.

    join: seconds to wait for all to begin.
    lost: seconds without a sign of life until a process counts as lost.
    beat: seconds between signs of life.
    gathers: process 0 reports what all have read, and not each for itself: they are one command to its user.
    watch: called now and then; raises ProcessLost if one of the others is known to have died. Who has started them
    knows that at once, and who has not waits for signs of life.
    """

    process: int = 0
    processes: int = 1
    join: float = limits.TEAM_JOIN_SECONDS
    lost: float = limits.TEAM_LOST_SECONDS
    beat: float = limits.TEAM_BEAT_SECONDS
    gathers: bool = False
    watch: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    @property
    def leads(self) -> bool:
        return self.process == 0


def from_environment(environment: Mapping[str, str]) -> Team:
    """The team that a launcher made; a single process without one. Raises BadArgument for impossible numbers."""
    for number, count in _LAUNCHERS:
        if number in environment and count in environment:
            texts = environment[number], environment[count]
            if not all(text.isascii() and text.isdigit() for text in texts) or int(texts[0]) >= int(texts[1]):
                raise BadArgument(f"{number}={texts[0]} and {count}={texts[1]} do not number the processes of a launch")
            return Team(int(texts[0]), int(texts[1]))
    return Team()


@dataclass
class Attempt:
    """One run of the whole team.

    members: process -> where it runs, for the other processes; only the leader knows them.
    stopped: whether it has been given up or replaced by another.
    """

    name: str
    folder: Path
    team: Team
    members: Mapping[int, str] = field(default_factory=dict)
    _looked: float = 0.0
    stopped: bool = False
    _seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ProcessLost if the attempt can no longer succeed. Cheap enough to be called often."""
        if self.stopped:
            raise ProcessLost(
                f"process {self.team.process} stops: process 0 has given up, or another conversion has begun"
            )
        now = time.monotonic()
        if now - self._looked < self.team.beat:
            return
        self._looked = now
        for process, where in self.members.items():
            path = self.failure(process)
            if path.exists():
                raise ProcessLost(
                    f"process {process} ({where}) failed: {locations.read(path).decode('utf-8', 'replace')}"
                )
            size = _size(self.sign(process))
            if size != self._seen.get(process, (-1, 0.0))[0]:
                self._seen[process] = (size, now)
        self.team.watch()

    def await_all(self, finished: Callable[[int], bool]) -> None:
        """Return once ``finished`` is true for every other process. Raises ProcessLost."""
        waiting = set(self.members)
        while True:
            waiting = {process for process in waiting if not finished(process)}
            if not waiting:
                return
            self.check()
            now = time.monotonic()
            for process in sorted(waiting):
                still = now - self._seen.setdefault(process, (-1, now))[1]
                if still > self.team.lost:
                    raise ProcessLost(
                        f"process {process} ({self.members[process]}) was lost: it has given no sign of life for "
                        f"{still:.0f} seconds; run the same conversion again to continue it"
                    )
            time.sleep(self.team.beat / 5)

    def sign(self, process: int) -> Path:
        return self.folder / f"beat-{self.name}-{process}"

    def failure(self, process: int) -> Path:
        return self.folder / f"failed-{self.name}-{process}"


def lead(team: Team, folder: Path, identity: str) -> Attempt:
    """Wait for the other processes and begin an attempt with them. For process 0, which has the folder to itself.

    Raises ProcessLost if they do not all come, or if one wants another conversion.
    """
    (folder / _ATTEMPT).unlink(missing_ok=True)
    _await_silence(folder, team)
    before = {path.name: _size(path) for path in folder.glob("hello-*")}
    deadline = time.monotonic() + team.join
    while True:
        nonces: dict[int, list[str]] = {}
        places: dict[int, str] = {}
        for path in folder.glob("hello-*"):
            match = _HELLO.fullmatch(path.name)
            if match is None or _size(path) <= before.get(path.name, 0):
                continue
            process = int(match[1])
            if match[3] != identity:
                raise ProcessLost(
                    f"process {process} ({_place(path)}) sees another source, or has other arguments, than process 0"
                )
            nonces.setdefault(process, []).append(match[2])
            places[process] = _place(path)
        if set(range(1, team.processes)) <= set(nonces):
            break
        team.watch()
        if time.monotonic() > deadline:
            missing = sorted(set(range(1, team.processes)) - set(nonces))
            raise ProcessLost(
                f"of {team.processes} processes, {', '.join(map(str, missing[:8]))} did not come within "
                f"{team.join:g} seconds; they died, or do not see '{folder}'"
            )
        time.sleep(team.beat / 5)
    attempt = Attempt(os.urandom(8).hex(), folder, team, places)
    write_atomic(folder / _ATTEMPT, json.dumps({"attempt": attempt.name, "members": nonces}).encode())
    return attempt


@contextmanager
def joined(team: Team, folder: Path, identity: str) -> Iterator[Attempt]:
    """Take part in the attempt that process 0 begins, and tell it of an error in the block. For the other processes.

    Raises ProcessLost if the attempt does not begin.
    """
    nonce = os.urandom(8).hex()
    attempt = Attempt(_await_attempt(team, folder, nonce, identity), folder, team)
    beat = _Beat(attempt)
    try:
        yield attempt
    except BaseException as error:
        if not attempt.stopped:
            _tell(attempt.failure(team.process), described(error))
        raise
    finally:
        beat.end()


def _await_attempt(team: Team, folder: Path, nonce: str, identity: str) -> str:
    hello = folder / f"hello-{team.process}-{nonce}-{identity}"
    deadline = time.monotonic() + team.join
    try:
        while True:
            _grow(hello, f"{os.uname().nodename}\n")
            for _ in range(5):
                begun = _read_attempt(folder)
                if nonce in begun.get("members", {}).get(str(team.process), ()):
                    return str(begun["attempt"])
                team.watch()
                time.sleep(team.beat / 5)
            if time.monotonic() > deadline:
                raise ProcessLost(
                    f"process {team.process}: process 0 did not begin in '{folder}' within {team.join:g} seconds"
                )
    finally:
        hello.unlink(missing_ok=True)


def _await_silence(folder: Path, team: Team) -> None:
    """Return once no process of an earlier attempt is still working. They stop when they find their attempt gone."""
    deadline = time.monotonic() + team.lost
    while signs := _sizes(folder.glob("beat-*")):
        time.sleep(3 * team.beat)
        if signs == _sizes(folder.glob("beat-*")):
            break
        if time.monotonic() > deadline:
            raise ProcessLost(f"processes of an earlier attempt still work in '{folder}'; end them first")
    for name in signs:
        Path(name).unlink(missing_ok=True)


class _Beat:
    """A thread that gives signs of life, and notices when this process's attempt is no longer the current one."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ucp-beat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        attempt = self._attempt
        while not self._ended.is_set():
            _grow(attempt.sign(attempt.team.process), ".")
            if _read_attempt(attempt.folder).get("attempt") != attempt.name:
                attempt.stopped = True
                return
            self._ended.wait(attempt.team.beat)


def _read_attempt(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(locations.read(folder / _ATTEMPT))
        return found
    except (OSError, ValueError):
        return {}


def _grow(path: Path, text: str) -> None:
    try:
        with open(path, "a", opener=_without_waiting) as stream:
            stream.write(text)
    except OSError as error:
        log.debug("%s: %s", path, error)  # the folder is not there yet, or no longer there


def _without_waiting(path: str, flags: int) -> int:
    # A pipe of that name would wait for a reader, and a link would lead elsewhere.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)


def _tell(path: Path, text: str) -> None:
    try:
        write_atomic(path, text.encode("utf-8", "replace"))
    except UcpError as error:
        log.warning("process 0 cannot be told that this one failed: %s", error)


def _place(hello: Path) -> str:
    try:
        return locations.read(hello).decode("utf-8", "replace").partition("\n")[0]
    except OSError:
        return "unknown host"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _sizes(paths: Iterable[Path]) -> dict[str, int]:
    return {os.fspath(path): _size(path) for path in paths}
