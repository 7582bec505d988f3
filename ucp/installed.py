"""What installed packages say about themselves, as far as the names of their folders and one small file tell.

`importlib.metadata` knows all of it. It has to be asked if packages lie in archives, or if another finder finds them.
But its import alone takes longer than opening a checkpoint, and most often the answer is "nothing".
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder


def may_declare(group: str) -> bool:
    """Whether a package may have entry points of this group. True also where this cannot be told."""
    if not _in_folders():
        return True
    return any(group.encode() in _read(os.path.join(folder, "entry_points.txt")) for folder in _metadata())


def version_of(package: str) -> str | None:
    """The version of this installed package, or None if it has to be looked up in another way."""
    if not _in_folders():
        return None
    wanted = _plain(package)
    for folder in _metadata():
        name, dash, version = os.path.basename(folder).removesuffix(".dist-info").rpartition("-")
        if dash and folder.endswith(".dist-info") and _plain(name) == wanted:
            return version
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _in_folders() -> bool:
    """Whether all installed packages lie in plain folders of the path."""
    others = [finder for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_distributions")]
    return not others and not any(os.path.isfile(place) or place.endswith(".egg") for place in sys.path)


def _metadata() -> Iterator[str]:
    """The folders with packages' metadata, in the order of the path."""
    for place in sys.path:
        try:
            with os.scandir(place or ".") as found:
                names = sorted(entry.name for entry in found)
        except OSError:
            continue
        yield from (os.path.join(place, name) for name in names if name.endswith((".dist-info", ".egg-info")))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""
