"""What a conversion writes: files described before their first byte exists."""

from __future__ import annotations

from dataclasses import dataclass

from ucp.transfer.gather import Want


@dataclass(frozen=True)
class TargetFile:
    """One file to be written: its size, its fixed bytes, and the elements that fill the rest.

    name: path relative to the destination folder. size: bytes. literals: (byte offset, bytes) that are known now,
    such as headers and pickles. wants: elements to gather from the source; their ``blocks.buffers`` are 0 and
    ``base`` is a byte offset in this file. Bytes that neither covers are zero (padding).
    """

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    wants: tuple[Want, ...]
