"""Which checkpoints a folder keeps once a new one is committed there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ucp.formats.universal import manifest
from ucp.printable import logger
from ucp.run_folder import latest_name
from ucp.storage import atomic, locations
from ucp.storage.locations import locate

log = logger(__name__)


@dataclass(frozen=True)
class Keep:
    """Keep the ``last`` newest checkpoints, and also those whose step is a multiple of ``every``."""

    last: int
    every: int | None = None


def prune(folder: str | os.PathLike[str], tag: str, keep: Keep) -> list[str]:
    """Remove checkpoints that need not be kept. Returns their tags.

    Newest is what has the highest step, as everywhere (`ucp.run_folder`), since clocks step. Checkpoints of later steps
    than the one just committed are of a run that has gone back since, so they count as older than all others.

    Only universal checkpoints are considered whose tag differs from that of the one just committed only in the number
    at the end (``global_step``). Nothing of other programs or other series is touched. ``tag`` itself and what
    ``latest`` names are never removed. A checkpoint disappears in one rename before its files are deleted, so that none
    is ever half there. What cannot be removed is kept, with a warning.
    """
    prefix, committed = _number(tag)
    found = []
    place = locate(folder)
    for name in locations.names(place):
        path = place / name
        start, step = _number(name)
        whole = not _is_link(path) and locations.is_file(path / manifest.NAME)
        if step is not None and start == prefix and whole:
            found.append((committed is None or step <= committed, step, path))
    named = latest_name(place)
    # `latest` may name something deeper, in the folder of another checkpoint.
    spared = {tag, named.split("/")[0] if named else None}
    removed = []
    for _, step, path in sorted(found, reverse=True)[keep.last :]:
        if path.name in spared or (keep.every is not None and step % keep.every == 0):
            continue
        try:
            _remove(path)
        except OSError as error:
            log.warning("%s: cannot be removed, so it is kept: %s", path, error.strerror or error)
            continue
        removed.append(path.name)
    return removed


def _is_link(path: Path) -> bool:
    return not locations.is_remote(path) and path.is_symlink()


def _remove(path: Path) -> None:
    """Remove a checkpoint. Behind a URL its manifest goes first, without which it is no checkpoint."""
    if locations.is_remote(path):
        locations.remove(path / manifest.NAME)
        locations.remove_tree(path)
    else:
        atomic.remove_whole(path)


def _number(tag: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*?)(\d{1,18})", tag)
    return (match[1], int(match[2])) if match else (tag, None)
