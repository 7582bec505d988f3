"""What the manifest of a damaged universal checkpoint still tells: every fault of its files, and what it lists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ucp.errors import UcpError
from ucp.formats.nouns import Salvage
from ucp.formats.universal import manifest, schema
from ucp.storage import locations


def salvage(folder: Path) -> Salvage:
    """The files that are missing or have another size. If there are none, the catalog, unchecked."""
    path = str(folder / manifest.NAME)
    faults: list[tuple[str, str]] = []
    try:
        body = manifest.load(path)
        faults = [(_full(folder, name), text) for name, text in missing_files(folder, body).items()]
        if faults:
            return Salvage(tuple(faults))
        return Salvage((), schema.decode(path, body, complete=False, trust_paths=True))
    except (UcpError, KeyError, TypeError, ValueError):
        return Salvage(tuple(faults))  # the error that opening gave tells the rest


def missing_files(folder: Path, body: Mapping[str, Any]) -> dict[str, str]:
    """The files that are missing or have another size, as the manifest names them, each with what is wrong.

    Raises KeyError, TypeError or ValueError for a manifest that lists no files.
    """
    found = {}
    for name, size in zip(body["files"]["path"], body["files"]["size"], strict=True):
        try:
            there = locations.stat(_full(folder, name)).size
        except OSError as error:
            found[name] = f"can't be read: {error.strerror}; the manifest needs it"
            continue
        if there != size:
            found[name] = f"has {there} bytes where the manifest says {size}"
    return found


def _full(folder: Path, name: str) -> str:
    return str(folder / name) if locations.is_remote(folder) else os.path.normpath(os.path.join(folder, name))
