"""``integrity.json``: the SHA-256 of every file of a folder (megatron/core/dist_checkpointing/validation.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ucp.errors import DamagedCheckpoint, Unsupported
from ucp.formats.megatron import INTEGRITY
from ucp.formats.shared.malformed import malformed
from ucp.printable import short
from ucp.storage import locations, names

_SHA256 = re.compile(r"[0-9a-f]{64}")


def recorded(folder: Path) -> dict[str, str]:
    """Each file's SHA-256 in hexadecimal, by its name; {} where none is recorded.

    Raises DamagedCheckpoint for a file that is none of these, Unsupported for another algorithm.
    """
    path = folder / INTEGRITY
    if not locations.is_file(path):
        return {}
    with malformed(path):
        found = json.loads(locations.read(path))
        algorithm, files = found.get("algorithm", "sha256"), dict(found["files"])
    if algorithm != "sha256":
        raise Unsupported(f"{path}: its digests are {short(algorithm)}, and SHA-256 is what can be checked")
    for name, digest in files.items():
        names.entry(name, f"{path}: a file", DamagedCheckpoint)
        if not isinstance(digest, str) or _SHA256.fullmatch(digest.lower()) is None:
            raise DamagedCheckpoint(f"{path}: what it has for '{name}' is no SHA-256")
    return {name: digest.lower() for name, digest in files.items()}
