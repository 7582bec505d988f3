"""How long saves and loads took, rank by rank: JSON lines in a file beside the checkpoints.

Every record is one object:

- ``schema``;
- ``what``: 'save', 'load', or 'snapshot' for one in memory;
- ``id``: the same on all ranks;
- ``checkpoint``: its folder;
- ``rank``, ``world``;
- ``time``: seconds since the epoch;
- ``bytes``: written or read;
- ``seconds``: of work, by stage.

Every moment of a load is in one stage. In the stage ``wait`` the rank has done its part and others have not.
``overlapping`` has the seconds of what goes on within the stages, perhaps in several threads at once. The stages of a
save overlap each other, so ``wall`` says how long the save took altogether.

An 'event' says instead what has happened to the run (``event``): a restart, its layout, its first step.

The file lies in the folder of checkpoints, not in a checkpoint: a checkpoint's files are exactly those that its
manifest names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.printable import logger
from ucp.storage import locations

NAME = "ucp-metrics.jsonl"
SCHEMA = "ucp.metrics/1"

log = logger(__name__)


def append(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Add a record. It is no part of any checkpoint, so if it can't be written, there is only a debug line.

    Ranks append to one file. Each record is a single write, which the file system adds at the end. Files at URLs can't
    be appended to, so nothing is kept there.
    """
    if locations.is_remote(folder):
        return
    line = json.dumps({"schema": SCHEMA, **record}, separators=(",", ":")) + "\n"
    try:
        fd = os.open(Path(folder, NAME), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            os.write(fd, line.encode("utf-8"))
        finally:
            os.close(fd)
    except OSError as error:
        log.debug("%s: timings can't be written: %s", Path(folder, NAME), error.strerror or error)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records, in the order in which they were written. Lines that are not records are left out."""
    try:
        text = locations.read(folder / NAME).decode("utf-8", "replace")
    except OSError:
        return []
    out = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("seconds"), dict):
            out.append(record)
    return out
