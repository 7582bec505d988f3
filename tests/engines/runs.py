"""What a training run leaves for a test to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.engines.configs import Case
from tests.engines.truth import Truth

STEPS = 3  # before the save
FURTHER = 2  # steps of the same run after the save: what an exact resume must reproduce
CLIENT_STATE: dict[str, Any] = {"note": "from the client", "numbers": [1, 2.5, None], "nested": {"epoch": 4}}


@dataclass(frozen=True, eq=False)
class Run:
    """A run as rank 0 knows it; the other ranks have no truth."""

    case: Case
    folder: str
    tag: str
    steps: int  # before the save, or before the checkpoint that was loaded
    losses: tuple[float, ...]  # of the steps before the save; none after a load
    further: tuple[float, ...]  # of the steps after it
    truth: Truth | None  # at the save, or right after the load
    truth_after: Truth | None  # after the further steps
