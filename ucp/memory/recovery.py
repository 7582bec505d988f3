"""Where a training program resumes from: its memory, if that has a whole generation, or else the disk."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass

from ucp.errors import DamagedCheckpoint
from ucp.formats.universal import manifest
from ucp.job import ranks
from ucp.memory.tier import Tier
from ucp.printable import logger
from ucp.run_folder import latest_name
from ucp.storage import locations
from ucp.storage.locations import locate

log = logger(__name__)

TRAINER = "trainer_state.json"

_STEP = re.compile(r"(\d{1,18})\D*$")


@dataclass(frozen=True)
class Recovered:
    """A generation in memory to resume from. location, tag: as `ucp.open` takes them. when: the time of its commit, in
    nanoseconds since the epoch. refused: newer generations, and why they cannot be made whole."""

    location: str
    tag: str
    when: int
    refused: tuple[str, ...]


def find(tier: Tier) -> tuple[Recovered | None, tuple[str, ...]]:
    """Make the newest generation whole for which that is possible. Returns it, and the reasons against newer ones.

    Collective. If the keepers fail, nothing is found, and the reasons say so.
    """
    told = tier.recover()
    refused = tuple(f"generation {number(one['tag'])}: {one['why']}" for one in told["refused"])
    if told["tag"] is None:
        return None, refused
    return Recovered(tier.location, told["tag"], int(told["when"]), refused), refused


def source(tier: Tier, folder: str | os.PathLike[str]) -> tuple[str, str | None]:
    """Where a resume from this folder reads, and the tag there: from memory, unless the folder has something newer.

    A Trainer's checkpoint, which has a state of its own, is resumed from memory only where that is of the same step.
    Warnings name newer generations that memory could not give. Collective.
    """
    found, refused = find(tier)
    on_disk = ranks.from_first(lambda: _latest(folder))
    trainers = ranks.from_first(lambda: _trainers_step(folder))
    if found is not None and trainers not in (None, number(found.tag)):
        # The Trainer counts steps and places its data by its own file, whatever the engine loads.
        text = f"generation {number(found.tag)}: the Trainer's own state in {folder} is of step {trainers}"
        warn_of(tier, (*refused, text), trainers, "on disk")
        return os.fspath(folder), None
    newer = found is not None and (on_disk is None or on_disk[1] <= found.when or _same(on_disk[0], found.tag))
    if found is not None and newer:
        warn_of(tier, refused, found.tag, "in memory")
        return found.location, found.tag
    if found is not None and on_disk is not None and ranks.rank() == 0:
        log.warning("%s has the newer checkpoint '%s'; memory has '%s'", folder, on_disk[0], found.tag)
    warn_of(tier, refused, None if on_disk is None else on_disk[0], "on disk")
    return os.fspath(folder), None


def warn_of(tier: Tier, refused: tuple[str, ...], tag: str | None, where: str) -> None:
    """Log why newer generations cannot be used, and what that costs."""
    if ranks.rank():
        return
    for text in refused:
        instead = "nothing: there is no checkpoint" if tag is None else f"step {number(tag)} {where}"
        wanted = re.match(r"generation (\d+):", text)
        lost = int(wanted[1]) - int(number(tag)) if wanted and tag is not None and number(tag).isdigit() else None
        cost = "" if lost is None else f", which costs {lost} steps"
        log.warning("memory of '%s': %s; continuing from %s%s", tier.run, text, instead, cost)


def _latest(folder: str | os.PathLike[str]) -> tuple[str, int] | None:
    """The checkpoint that the folder's 'latest' names, and when its state was taken, which is the time of our own
    manifest; of other checkpoints it is not known, but when they were written. None if there is none."""
    place = locate(folder)
    name = latest_name(place)
    if name is None:
        return None
    try:
        own = place / name / manifest.NAME
        return name, locations.stat(own).mtime_ns if locations.is_file(own) else locations.newest_ns(place / name)
    except OSError:
        return None


def _trainers_step(folder: str | os.PathLike[str]) -> str | None:
    """The step of a Hugging Face Trainer's checkpoint. None for another folder."""
    path = locate(folder) / TRAINER
    if not locations.is_file(path):
        return None
    try:
        return str(int(json.loads(locations.read(path))["global_step"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: is not what a Trainer writes: {error}") from error


def _same(one: str, other: str) -> bool:
    return number(one) == number(other)


def number(tag: str) -> str:
    """The step at the end of a tag, or the tag itself if it has none."""
    match = _STEP.search(tag)
    return match[1] if match else tag
