"""Where a training program resumes from: its memory, where that has a whole generation, or else the disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ucp.memory.tier import Tier
from ucp.printable import logger

log = logger(__name__)

_STEP = re.compile(r"(\d{1,18})\D*$")


@dataclass(frozen=True)
class Recovered:
    """A generation in memory to resume from. location, tag: as `ucp.open` takes them; when: its commit, in nanoseconds
    since the epoch. refused: newer generations, and why they cannot be had."""

    location: str
    tag: str
    when: int
    refused: tuple[str, ...]


def find(tier: Tier) -> tuple[Recovered | None, tuple[str, ...]]:
    """The newest generation that all keepers together have whole, made so by this call; and what could not be had.

    Collective. Where the keepers fail, nothing is found, and that is said.
    """
    told = tier.recover()
    refused = tuple(f"generation {number(one['tag'])}: {one['why']}" for one in told["refused"])
    if told["tag"] is None:
        return None, refused
    return Recovered(tier.location, told["tag"], int(told["when"]), refused), refused


def number(tag: str) -> str:
    """The step that a tag ends with; the tag where it has none."""
    match = _STEP.search(tag)
    return match[1] if match else tag
