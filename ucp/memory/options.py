"""What is asked of the memory tier: the ``memory`` section of a configuration, as plain numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ucp.errors import BadArgument
from ucp.printable import short
from ucp.saving.background import POLICIES

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?(/s)?")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LEAST = {"every": 0, "redundancy": 0, "group": 2, "keep": 2, "limit": 1, "persist_every": 0, "network": 1}
_MOST = {"redundancy": 32, "keep": 1024}
_RUN_MAX_CHARACTERS = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

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

    def __post_init__(self) -> None:
        """Raises BadArgument for what no option can be."""
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is None and key in ("group", "limit", "network"):
                continue
            if type(value) is not int or not least <= value <= _MOST.get(key, 2**63 - 1):
                raise BadArgument(f'"memory": "{key}" needs a whole number from {least}{_upto(key)}, found {value!r}')
        if self.policy not in POLICIES:
            raise BadArgument(f'"memory": "policy" is one of {", ".join(POLICIES)}, found {self.policy!r}')
        if self.run is not None:
            check_run(self.run)

    @staticmethod
    def said(**fields: Any) -> Options:
        """The options as people write them: sizes may be text, and a group "node". Raises BadArgument."""
        for key in fields:
            if key not in Options.__dataclass_fields__:
                raise BadArgument(
                    f"no option of memory is called '{key}'; there are {', '.join(Options.__dataclass_fields__)}"
                )
        for key in ("limit", "network"):
            if isinstance(fields.get(key), str):
                fields[key] = nbytes(fields[key], key)
        if fields.get("group") == "node":
            fields["group"] = None
        return Options(**fields)


def check_run(run: object) -> None:
    """Raises BadArgument for what cannot be a run's name: it is an argument, a line of output and part of a URL."""
    if not isinstance(run, str) or not run.strip() or len(run) > _RUN_MAX_CHARACTERS or _CONTROL.search(run):
        raise BadArgument(
            f"a run's name is text of 1 to {_RUN_MAX_CHARACTERS} characters without control characters, "
            f"found {short(run)}; "
            'give it another one with "memory": {"run": ...}'
        )


def _upto(key: str) -> str:
    return f" to {_MOST[key]}" if key in _MOST else " on"


def nbytes(text: str | int, key: str) -> int:
    """Bytes of ``16GiB``, or bytes per second of ``1GB/s``. Raises BadArgument for what is neither."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or float(match[1]) <= 0 or (key == "limit" and match[3]):
        raise BadArgument(f"\"{key}\" needs a size such as '16GiB' or '1GB/s', found {text!r}")
    unit = match[2] or ""
    return int(float(match[1]) * ({**_UNITS, **_BINARY}[unit]))
