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

    name: path relative to the destination folder.
    size: bytes.
    literals: (byte offset, bytes) that are known now, such as headers and pickles.
    wants: elements to gather from the source. Their ``blocks.buffers`` are 0, and ``base`` is a byte offset in this
    file. Bytes that neither literals nor wants cover are zero (padding).
    crc32_entries: ranges whose CRC-32 the file itself stores. It is known only once they are written (the records of a
    zip file).
    """

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    wants: tuple[Want, ...]
    crc32_entries: tuple[Crc32Entry, ...] = ()


@dataclass(frozen=True)
class WritePlan:
    """A conversion before its first byte is written.

    source: the catalog to read from.
    files: in the order of writing. Readers find the checkpoint by the last one, or by those of ``finish``.
    finish: makes small files that depend on what was written, name -> bytes, from the files' digests by name and the
    tensors' logical digests. They come after all others. None if there are none.
    tag: the folder below the destination that holds the checkpoint, None if that is the destination itself.
    layout: what is written for, None if it fits all layouts.
    is_virtual: whether it points into the source's files instead of holding the tensors.
    records: whether logical digests are wanted of all tensors, not only of those whose digests the source has.
    """

    source: Catalog
    files: tuple[TargetFile, ...]
    finish: Callable[[dict[str, ChunkDigests], Mapping[tuple[str, str], Recorded]], dict[str, bytes]] | None = None
    tag: str | None = None
    layout: Layout | None = None
    is_virtual: bool = False
    records: bool = False

    @property
    def tensors(self) -> set[tuple[str, str]]:
        """Name and state of each of the source's tensors that the destination has."""
        if self.is_virtual:
            return set(self.source.tensors)
        return {(want.tensor.name, want.tensor.state) for file in self.files for want in file.wants}

    @property
    def nbytes(self) -> int:
        """Bytes of ``files``."""
        return sum(file.size for file in self.files)
