"""What a checkpoint may ask of the process that reads it: every bound that does not follow from a format, in one place.

Nothing that a file says is believed before it is compared with the file itself: a count is compared with the files
there are before it is counted up to, a size with the bytes that are left before they are taken.
"""

from __future__ import annotations

from ucp.errors import DamagedCheckpoint

METADATA_FACTOR = 16
METADATA_FREE = 64 << 20
"""Bytes; see `metadata_bytes`."""

NESTING = 100
"""How deep the values of a file may be nested. Checkpoints have about 10; Python's own writers end near 300."""

INTEGER_BYTES = 1785
"""The longest integer of a pickle: as many decimal digits as Python is willing to print."""

EMPTY_ITEMS = 1 << 16
"""Elements of an array whose elements have no bytes."""

EXPERTS = 1 << 16
"""The most experts of one layer: they are listed before their tensors are looked at."""


def metadata_bytes(file_bytes: int) -> int:
    """The most memory that reading a file's metadata (pickles, headers, manifests; no tensors) may take, in bytes."""
    return METADATA_FACTOR * file_bytes + METADATA_FREE


def check_json(path: str, raw: bytes) -> None:
    """Raise DamagedCheckpoint where parsing JSON text would take more than `metadata_bytes` of it: before it is parsed.

    Counted generously, as Python keeps it: an object as 240 bytes, a list as 72, a text as 56 beside its letters.
    """
    if 240 * len(raw) < METADATA_FREE:
        return
    needed = 2 * len(raw) + 240 * raw.count(b"{") + 72 * raw.count(b"[") + 28 * raw.count(b'"') + 40 * raw.count(b",")
    if needed > metadata_bytes(len(raw)):
        raise DamagedCheckpoint(
            f"{path}: {len(raw)} bytes of text would take about {needed} in memory, and "
            f"{metadata_bytes(len(raw))} is the most that is read"
        )
