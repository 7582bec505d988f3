"""What a conversion writes: files described before their first byte exists."""

from __future__ import annotations

from dataclasses import dataclass

from ucp.storage.crc32 import Crc32Entry
from ucp.transfer.gather import Want


@dataclass(frozen=True)
class TargetFile:
    """One file to be written: its size, its fixed bytes, and the elements that fill the rest.

    name: path relative to the destination folder. size: bytes. literals: (byte offset, bytes) that are known now,
    such as headers and pickles. wants: elements to gather from the source; their ``blocks.buffers`` are 0 and
    ``base`` is a byte offset in this file. Bytes that neither covers are zero (padding). crc32_entries: ranges whose
    CRC-32 the file itself stores and that is known only once they are written (the records of a zip file).
    """

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    wants: tuple[Want, ...]
    crc32_entries: tuple[Crc32Entry, ...] = ()
