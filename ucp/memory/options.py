"""What is asked of the memory tier: the ``memory`` section of a configuration, as plain numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ucp.errors import BadArgument

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?(/s)?")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"ki": 2**10, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Options:
    """How a run is kept in memory.

    - run: its name. None: the folder that it saves to and loads from.
    - every: take a snapshot every so many steps. 0: only when asked.
    - policy: what to do with a snapshot that is due while the last one is still under way. 'wait' for the last one, so
      that never more than ``every`` steps are lost. 'skip' this one, so that training never waits.
    - redundancy: how many nodes of a group may be lost.
    - group: at most how many nodes protect each other. None: all.
    - keep: how many generations there are, with the one that is being filled.
    - limit: how many bytes one node's keeper may hold. None: no bound.
    - persist_every: also write every so many'th snapshot to disk. 0: none.
    - network: how many bytes per second a keeper takes from the network for parity. None: no bound.
    """

    run: str | None = None
    every: int = 1
    policy: str = "wait"
    redundancy: int = 1
    group: int | None = None
    keep: int = 2
    limit: int | None = None
    persist_every: int = 0
    network: int | None = None


def nbytes(text: str | int, key: str) -> int:
    """Bytes of ``16GiB``, or bytes per second of ``1GB/s``. Raises BadArgument for what is neither."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match[1]) <= 0 or (key == "limit" and match[3]):
        raise BadArgument(f"\"{key}\" needs a size such as '16GiB' or '1GB/s', found {text!r}")
    unit = match[2] or ""
    return int(float(match[1]) * ({**_UNITS, **_BINARY}[unit]))
