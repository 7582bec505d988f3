"""How long a rank's work takes, stage by stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

WAIT = "wait"
"""The stage in which a rank has done its part and waits for others: the slowest rank waits least."""


class Stopwatch:
    """Counts the seconds of one rank's work by stage, from now on. Stages that overlap are each counted in full.

    parts: seconds of what goes on within stages, perhaps in several threads at once; then all of theirs are added up.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()
        self.parts: dict[str, float] = {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """Stage -> seconds, in the order in which the stages first ended."""
        return self._seconds

    @property
    def passed(self) -> float:
        """The seconds from the beginning until now."""
        return time.perf_counter() - self._began

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Count the time of this block for a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work, and count its time for a stage."""
        with self.of(stage):
            return work()

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of this block for a part of the stage that it is in. Thread-safe."""
        began = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - began
            with self._lock:
                self.parts[name] = self.parts.get(name, 0.0) + passed

    def with_wait(self) -> dict[str, float]:
        """The stages, and the rest of the time until now as `WAIT`. This is for stages that do not overlap."""
        return {**self._seconds, WAIT: max(self.passed - sum(self._seconds.values()), 0.0)}


def stages_text(seconds: Mapping[str, float]) -> str:
    """``2.31 s (plan 0.10, read 1.90, wait 0.31)``: the sum, and every stage that took a hundredth of a second."""
    parts = [f"{stage} {value:.2f}" for stage, value in seconds.items() if value >= 0.005]
    return f"{sum(seconds.values()):.2f} s" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
