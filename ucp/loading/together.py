"""What no rank reads whole, ranks verify together: they tell one another of the parts that they have read.

Of records it is the CRC-32s of parts, which make up the whole one's. Of chunks one rank reads all, and tells the others
the digests of their parts (`ucp.transfer.chunk_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ucp import limits
from ucp.catalog import Catalog
from ucp.job import ranks
from ucp.transfer.checking import Ranges
from ucp.transfer.chunk_parts import ChunkParts, parts_in, shared_out
from ucp.transfer.reader import Reader


@dataclass(frozen=True, eq=False)
class Together:
    """What the ranks of a load verify together. records: whether they do so with records. parts: of chunks, if they do
    so with chunks."""

    records: bool = False
    parts: ChunkParts | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to `compare`. The same on all ranks."""
        return self.records or self.parts is not None

    def compare(self, agreed: Callable[[Callable[[], None]], object], *readers: Reader) -> None:
        """Compare what this rank has read of records and chunks, by what all have read of them. Collective.

        readers: the last one reads on, and takes as compared what the others have compared so. agreed: as
        `ranks.all_or_none`. Raises what reading raises, and DigestMismatch, on all ranks.
        """
        if self.records:
            _compare_records(agreed, readers)
        if self.parts is not None:
            told = ranks.gather(self.parts.told())
            agreed(lambda: readers[-1].compare_parts(told))


def find(
    catalog: Catalog, agreed: Callable[[Callable[[], Ranges]], Ranges], used: Callable[[], Ranges]
) -> tuple[Together, Ranges]:
    """What the ranks verify together, and the byte ranges of files that this rank reads: what ``used`` returns.
    Collective. Raises what it raises, on all ranks."""
    records = bool(catalog.crc_records)
    if not catalog.chunk_digests:
        return Together(records), agreed(used)
    ranges: Ranges = {}

    def parts() -> NDArray[np.int64]:
        nonlocal ranges
        ranges = used()
        return parts_in(ranges, sizes)[:most]

    sizes = {file: digests.size for file, digests in catalog.chunk_digests.items()}
    most = limits.CHUNK_PARTS_ALL_COUNT // ranks.world_size()
    shared = shared_out(ranks.every(parts), ranks.rank())
    return Together(records, shared), ranges


def _compare_records(agreed: Callable[[Callable[[], None]], object], readers: Sequence[Reader]) -> None:
    most = max(limits.RECORD_PIECES_COUNT // ranks.world_size(), 1)
    own = [piece for reader in readers for piece in reader.records.parts(most)]
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    for table in ranks.gather(_table(own)):
        for file, start, size, crc in table.tolist():
            pieces.setdefault(file, []).append((start, size, crc))

    def compare() -> None:
        for reader in readers:
            reader.records.compare_together(pieces)

    agreed(compare)
    for reader in readers[:-1]:
        readers[-1].records.trust(reader.records)


def _table(pieces: list[tuple[int, int, int, int]]) -> NDArray[np.int64]:
    return np.array(pieces, np.int64).reshape(-1, 4)
