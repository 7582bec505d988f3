"""What a conversion writes: files described before their first byte exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ucp.catalog import Catalog
from ucp.logical.record import Recorded
from ucp.parallel.mesh import Layout
from ucp.storage.crc32 import Crc32Entry
from ucp.storage.digests import ChunkDigests
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


@dataclass(frozen=True)
class WritePlan:
    """A conversion before its first byte is written.

    source: the catalog to read from. files: in the order of writing; the last one, or those of ``finish``, are what
    readers find the checkpoint by. finish: small files that depend on what was written, name -> bytes, made of the
    files' digests by name and the tensors' logical digests; they come after all others; None for none. records:
    whether these are wanted of all tensors, and not only where the source has them, to compare. tag: the folder below
    the destination that holds the checkpoint, None where that is the destination itself. layout: what was written for,
    None where it fits all. is_virtual: whether it points into the source's files instead of holding the tensors.
    """

    source: Catalog
    files: tuple[TargetFile, ...]
    finish: Callable[[dict[str, ChunkDigests], Mapping[tuple[str, str], Recorded]], dict[str, bytes]] | None = None
    tag: str | None = None
    layout: Layout | None = None
    is_virtual: bool = False
    records: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of ``files``."""
        return sum(file.size for file in self.files)
