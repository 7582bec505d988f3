"""Where attacks run: in a process of their own, each with a clock and a look at the memory that it took."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ucp.errors import UcpError

SECONDS = 5.0
MEMORY = 512 << 20
"""What one attack may take, in seconds and in bytes beyond what the process had."""


@dataclass(frozen=True)
class Verdict:
    """How an attack ended. kind: 'refused' by an error of ours, 'read' (text: what the attack returned), 'broken' by
    any other exception, 'died', or 'hung'."""

    kind: str
    text: str
    seconds: float
    memory: int

    @property
    def within_limits(self) -> bool:
        return self.kind in ("refused", "read") and self.seconds < SECONDS and self.memory < MEMORY


def fight(attacks: Sequence[Callable[[], Any]]) -> Iterator[Verdict]:
    """Run the attacks in turn, in a fork of this process; another one where it hangs or dies."""
    at = 0
    while at < len(attacks):
        mine, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_run, args=(theirs, attacks[at:]), daemon=True)
        child.start()
        theirs.close()
        try:
            while at < len(attacks):
                if not mine.poll(4 * SECONDS):
                    child.kill()
                    yield Verdict("hung", "", 4 * SECONDS, 0)
                    at += 1
                    break
                try:
                    yield mine.recv()
                except EOFError:
                    child.join()
                    yield Verdict("died", f"exit code {child.exitcode}", 0.0, 0)
                    at += 1
                    break
                at += 1
        finally:
            child.kill()
            child.join()
            mine.close()


def _run(results: Connection, attacks: Sequence[Callable[[], Any]]) -> None:
    gc.freeze()
    logging.disable()
    for attack in attacks:
        before = _forget_peak()
        start = time.process_time()  # others use this machine, too; what hangs is noticed by its clock
        try:
            kind, text = "read", str(attack())
        except UcpError as error:
            kind, text = "refused", f"{type(error).__name__}: {error}"
        except BaseException:  # noqa: BLE001 - whatever it is, it is the verdict
            kind, text = "broken", traceback.format_exc()
        results.send(Verdict(kind, text, time.process_time() - start, _peak() - before))
    results.close()
    os._exit(0)


def _forget_peak() -> int:
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")
    return _peak()


def _peak() -> int:
    """The most memory that this process had since it was last forgotten, in bytes."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmHWM"))
