"""Files against the SHA-256s that a checkpoint has recorded of them, as Megatron-Core's ``integrity.json`` does."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ucp import limits
from ucp.inspection.bits import Advance
from ucp.storage import locations, names


def total(folder: Path, recorded: Mapping[str, str]) -> int:
    """How many bytes are compared."""
    return sum(locations.stat(path).size for name in recorded if locations.is_file(path := _at(folder, name)))


def differing(folder: Path, recorded: Mapping[str, str], advance: Advance) -> Generator[tuple[str, str], None, None]:
    """(file, what is wrong with it) of every file that is missing or has another SHA-256. The caller closes it."""

    def work(item: tuple[str, str]) -> tuple[str, str] | None:
        name, wanted = item
        path = _at(folder, name)
        if not locations.is_file(path):
            return str(path), "is not there, and its SHA-256 is recorded"
        digest = hashlib.sha256()
        with locations.opened(path) as stream:
            while block := stream.read(limits.CRC_BATCH_BYTES):
                digest.update(block)
                advance(len(block))
        found = digest.hexdigest()
        return (
            None if found == wanted else (str(path), f"has the SHA-256 {found[:16]}…, and {wanted[:16]}… is recorded")
        )

    with ThreadPoolExecutor(max(1, min(limits.THREADS_MAX_COUNT, limits.processors()))) as pool:
        yield from filter(None, pool.map(work, recorded.items()))


def _at(folder: Path, name: str) -> Path:
    return Path(names.below(folder, name))
