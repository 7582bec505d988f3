"""Timings of saves and loads as records beside the checkpoints, rank by rank."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ucp.formats.universal import manifest
from ucp.job import ranks
from ucp.storage import locations, metrics


class Finished(Protocol):
    """What is recorded of a save (`ucp.saving.save.SaveReport`). seconds: by stage. wall: from its call to its end."""

    @property
    def path(self) -> str: ...

    @property
    def tag(self) -> str: ...

    @property
    def written(self) -> int: ...

    @property
    def seconds(self) -> Mapping[str, float]: ...

    @property
    def wall(self) -> float: ...


def record_save(report: Finished, rank: int, world: int) -> None:
    """Add this rank's record of a finished save. Does not communicate."""
    ident = f"{report.tag}:{_manifest(report.path)}"
    _record("save", report.path, ident, rank, world, report.written, report.seconds, wall=round(report.wall, 6))


def record_snapshot(report: Finished, folder: str, rank: int, world: int) -> None:
    """Add this rank's record of a snapshot in memory to the run's folder, which is made if it does not exist."""
    place = locations.locate(folder)
    if not locations.is_remote(folder):
        place.mkdir(parents=True, exist_ok=True)
    ident = f"{report.tag}:{_manifest(report.path)}"
    wall = round(report.wall, 6)
    _record("snapshot", report.path, ident, rank, world, report.written, report.seconds, place, wall=wall)


def record_event(folder: str, event: str, rank: int, world: int, seconds: Mapping[str, float], **more: Any) -> None:
    """Add a record of an event in a run, such as how long each phase of a restart took. Only on rank 0."""
    if rank == 0:
        named = {stage: round(value, 6) for stage, value in seconds.items()}
        common = {"what": "event", "event": event, "world": world, "time": time.time(), "seconds": named}
        metrics.append(folder, {**common, **more})


def record_load(path: str, bytes_read: int, seconds: Mapping[str, float], overlapping: Mapping[str, float]) -> None:
    """Add this rank's record of a load. Collective."""
    ident = ranks.from_first(lambda: secrets.token_hex(8))
    within = {stage: round(value, 6) for stage, value in overlapping.items()}
    _record("load", path, ident, ranks.rank(), ranks.world_size(), bytes_read, seconds, overlapping=within)


def _record(
    what: str,
    path: str,
    ident: str,
    rank: int,
    world: int,
    nbytes: int,
    seconds: Mapping[str, float],
    folder: Path | None = None,
    **more: Any,
) -> None:
    record = {
        "what": what,
        "id": ident,
        "checkpoint": path,
        "rank": rank,
        "world": world,
        "time": time.time(),
        "bytes": nbytes,
        "seconds": {stage: round(value, 6) for stage, value in seconds.items()},
        **more,
    }
    metrics.append(folder or locations.locate(path).parent, record)


def _manifest(path: str) -> str:
    """The manifest's own digest. On every rank it distinguishes this save from others under the same tag."""
    try:
        return manifest.digest_of(locations.locate(path) / manifest.NAME)
    except OSError:  # a later save has removed it already
        return ""
