"""What the packages beside this one say of themselves, as far as their folders' names and one small file tell.

`importlib.metadata` knows all of it, and has to be asked where packages lie in archives or are found by somebody else's
finder. But its import alone takes longer than opening a checkpoint, and most often the answer is "nothing".
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder


def may_declare(group: str) -> bool:
    """Whether a package may have entry points of this group; where it can't be told, it may."""
    if not _in_folders():
        return True
    return any(group.encode() in _read(os.path.join(folder, "entry_points.txt")) for folder in _metadata())


def version_of(package: str) -> str | None:
    """The version of this installed package; None where that has to be looked for in other ways."""
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
    """Whether everything that is installed lies in plain folders of the path."""
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
