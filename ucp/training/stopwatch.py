"""How long a rank's work takes, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")

WAIT = "wait"
"""The stage in which a rank has done its part and waits for others: the slowest rank waits least."""


class Stopwatch:
    """The seconds of one rank's work by stage, from now on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stages: dict[str, float] = {}

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Do some work, which counts for that stage."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self._stages[stage] = self._stages.get(stage, 0.0) + time.perf_counter() - began

    def stop(self) -> dict[str, float]:
        """The stages in the order in which they began; what is left of the time until now is `WAIT`."""
        passed = time.perf_counter() - self._began
        return {**self._stages, WAIT: max(passed - sum(self._stages.values()), 0.0)}


def stages_text(seconds: Mapping[str, float]) -> str:
    """``2.31 s (plan 0.10, read 1.90, wait 0.31)``: the sum, and every stage that took a hundredth of a second."""
    parts = [f"{stage} {value:.2f}" for stage, value in seconds.items() if value >= 0.005]
    return f"{sum(seconds.values()):.2f} s" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
