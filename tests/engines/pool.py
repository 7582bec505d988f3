"""Real DeepSpeed ranks for tests: ``RankPool.run(function, *args, world_size=N)`` on N processes over gloo.

The ranks of each job are forked from one warm process (see ``zygote``), so that any world size may follow any other,
and no job sees what an earlier one left behind.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engines import operators, releases
from tests.engines.zygote import ENVIRONMENT, read_frame, write_frame

ROOT = Path(__file__).resolve().parents[2]
LOG_TAIL = 4000  # characters of each rank's output that a failure shows


@dataclass(frozen=True)
class RankFailure:
    """Why one rank has no result: it raised, it died, or it was still busy when the job was ended."""

    rank: int
    kind: str  # "raised", "died" or "blocked"
    type_name: str  # the exception's qualified name; "" unless it raised
    message: str
    traceback: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: each rank's value (None where it failed), the failures, and what the ranks printed."""

    values: tuple[Any, ...]
    failures: tuple[RankFailure, ...]
    logs: tuple[str, ...]

    @property
    def all_raised(self) -> bool:
        """Whether every rank raised, and none had to be ended: what a refusal by all ranks together looks like."""
        return len(self.failures) == len(self.values) and all(f.kind == "raised" for f in self.failures)


class RankError(Exception):
    """A job failed on at least one rank; ``outcome`` has all that is known."""

    def __init__(self, job: str, outcome: Outcome) -> None:
        self.outcome = outcome
        self.failures = outcome.failures
        lines = [f"{job}: {len(outcome.failures)} of {len(outcome.values)} ranks failed"]
        seen: dict[str, int] = {}
        for failure in outcome.failures:
            lines.append(f"rank {failure.rank} {failure.kind}: {failure.type_name} {failure.message}")
            if failure.traceback and failure.traceback not in seen:
                seen[failure.traceback] = failure.rank
                lines.append(failure.traceback.rstrip())
        for rank, log in enumerate(outcome.logs):
            if log.strip():
                lines.append(f"--- output of rank {rank} ---\n{log[-LOG_TAIL:].rstrip()}")
        super().__init__("\n".join(lines))


class RankPool:
    """Runs jobs on real ranks. Start it once per session; use it from one thread."""

    def __init__(self, start_timeout: float = 180.0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._server_log = Path(self._folder.name) / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._request_fd = -1
        self._response_fd = -1
        self._start_timeout = start_timeout

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the warm process unless it runs; takes as long as importing DeepSpeed."""
        if self._process is not None and self._process.poll() is None:
            return
        self._stop()
        request_read, self._request_fd = os.pipe()
        self._response_fd, response_write = os.pipe()
        with self._server_log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.engines.zygote", str(request_read), str(response_write)],
                pass_fds=(request_read, response_write),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **os.environ,
                    **ENVIRONMENT,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "TORCH_EXTENSIONS_DIR": str(operators.folder()),
                    **releases.environment(),
                },
            )
        os.close(request_read)
        os.close(response_write)
        if not select.select([self._response_fd], [], [], self._start_timeout)[0]:
            self._process.kill()
            raise RuntimeError(
                f"the warm process is not ready after {self._start_timeout:g} s:\n{_read_text(str(self._server_log))}"
            )
        greeting = self._receive()
        if greeting["threads"] != 1:
            raise RuntimeError(f"the warm process has {greeting['threads']} threads; forking it is not safe")

    def attempt(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout: float = 120.0,
        grace: float = 5.0,
        preload: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        distributed: bool = True,
        **kwargs: Any,
    ) -> Outcome:
        """Run ``function(*args, **kwargs)`` on ``world_size`` ranks and tell what became of each.

        ``function`` is a module-level function of an importable module. ``timeout`` seconds bound the whole job; once
        a rank has failed, the others have ``grace`` seconds. ``preload`` names modules that are worth importing once
        for all later jobs, or with ``operator:CPUAdamBuilder`` a compiled optimizer that was built before
        (`tests.engines.operators`). ``distributed=False`` leaves the process group to the function.
        """
        self.start()
        logs = [str(Path(self._folder.name) / f"rank-{rank}.log") for rank in range(world_size)]
        write_frame(
            self._request_fd,
            {
                "function": f"{function.__module__}:{function.__qualname__}",
                "arguments": pickle.dumps((args, kwargs)),
                "world_size": world_size,
                "timeout": timeout,
                "grace": grace,
                "preload": tuple(preload),
                "environment": dict(environment or {}),
                "cwd": None if cwd is None else os.fspath(cwd),
                "distributed": distributed,
                "logs": logs,
            },
        )
        reports = self._receive()
        values: list[Any] = [None] * world_size
        failures = []
        for rank in range(world_size):
            report = reports.get(rank)
            if report is None:
                message = "had not finished when the job was ended"
                failures.append(RankFailure(rank, "blocked", "", message, ""))
            elif report[0] == "value":
                values[rank] = pickle.loads(report[1])
            elif report[0] == "died":
                failures.append(RankFailure(rank, "died", "", f"exit code {report[1]}", ""))
            else:
                failures.append(RankFailure(rank, "raised", *report[1:]))
        return Outcome(tuple(values), tuple(failures), tuple(_read_text(log) for log in logs))

    def run(self, function: Callable[..., Any], *args: Any, world_size: int, **options: Any) -> list[Any]:
        """As ``attempt``, but return the ranks' values, in order; raise ``RankError`` unless all of them finished."""
        outcome = self.attempt(function, *args, world_size=world_size, **options)
        if outcome.failures:
            if reason := releases.fault(f"{f.message}\n{f.traceback}" for f in outcome.failures):
                pytest.skip(reason)
            raise RankError(f"{function.__module__}.{function.__qualname__}", outcome)
        return list(outcome.values)

    def close(self) -> None:
        """End the warm process and remove the logs."""
        self._stop()
        self._folder.cleanup()

    def _receive(self) -> Any:
        try:
            return read_frame(self._response_fd)
        except EOFError:
            raise RuntimeError(f"the warm process has ended:\n{_read_text(str(self._server_log))}") from None

    def _stop(self) -> None:
        for fd in (self._request_fd, self._response_fd):
            if fd >= 0:
                os.close(fd)
        self._request_fd = self._response_fd = -1
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except FileNotFoundError:
        return ""
