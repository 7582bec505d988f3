"""What the manifest of a damaged universal checkpoint still tells: every fault of its files, and what it lists."""

from __future__ import annotations

import os
from pathlib import Path

from ucp.errors import UcpError
from ucp.formats.nouns import Salvage
from ucp.formats.universal import manifest, schema
from ucp.storage import locations


def salvage(folder: Path) -> Salvage:
    """The files that are missing or have another size; where there are none, the catalog, without any check of it."""
    path = str(folder / manifest.NAME)
    faults = []
    try:
        body = manifest.load(path)
        files = body["files"]
        for name, size in zip(files["path"], files["size"], strict=True):
            full = str(folder / name) if locations.is_remote(folder) else os.path.normpath(os.path.join(folder, name))
            try:
                found = locations.stat(full).size
            except OSError as missing:
                faults.append((full, f"can't be read: {missing.strerror}; the manifest needs it"))
                continue
            if found != size:
                faults.append((full, f"has {found} bytes where the manifest says {size}"))
        if faults:
            return Salvage(tuple(faults))
        return Salvage((), schema.decode(path, body, complete=False, trust_paths=True))
    except (UcpError, KeyError, TypeError, ValueError):
        return Salvage(tuple(faults))  # the error that opening gave tells the rest
